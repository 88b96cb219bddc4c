"""How a front reaches replicas on Ray Serve: a request router that obeys, and calls by handle.

IS: the seam to Ray. IS NOT: a choice: the front has made it. See docs/fleet-serve.md for why a
router of Serve's alone would not do.

The address of a request is its argument `to`. A router of Serve may give the call to another
replica, as when that one has died; the replica says so then, and the front places it anew. So
nothing here depends on more of Serve than that a call arrives somewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.types import Message

from flashrt.fleet.replicas.front import Gone, Moved
from flashrt.fleet.replicas.ring import Member
from flashrt.fleet.replicas.station import Arrival, NotHere


class AddressedRouter(RequestRouter):  # type: ignore[misc]  # Ray is not typed
    """Ray Serve's router for a deployment whose callers know which replica they want."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """See RequestRouter."""
        wanted = None if pending_request is None else pending_request.kwargs.get("to")
        found = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        return [found or candidate_replicas]


class HandleLink:
    """See front.Link. handle: of the replicas' deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def members(self, *, with_roster: bool) -> list[Member]:
        """See Link. Those that do not answer are not there."""
        told = self._handle.broadcast("about", with_roster=with_roster)
        found = await told.results_async(timeout_s=30.0, return_exceptions=True)
        there = [one for one in found if isinstance(one, Member)]
        faults = [e for e in found if isinstance(e, Exception) and not isinstance(e, RayActorError)]
        if faults and not there:
            raise faults[0]
        return there

    async def send(
        self, to: str, scope: Mapping[str, Any], body: bytes, arrival: Arrival
    ) -> AsyncGenerator[Message, None]:
        """See Link."""
        stream = self._streams.answer.remote(dict(scope), body, arrival, to=to)
        is_over = False
        try:
            async for message in stream:
                yield message
            is_over = True
        except RayActorError as error:
            is_over = True
            raise Gone(str(error)) from error
        except RayServeException as error:
            is_over = True
            raise Gone(str(error)) from error
        except RayTaskError as error:
            is_over = True
            if isinstance(error.cause, NotHere):
                raise Moved(str(error.cause)) from error
            raise
        finally:
            if not is_over:
                with contextlib.suppress(Exception):
                    stream.cancel()

    async def leave(self, to: str) -> int:
        """See Link."""
        try:
            return int(await self._handle.leave.remote(to=to))
        except RayActorError as error:
            raise Gone(str(error)) from error
