"""A member: one worker as the fleet sees it, and the actors that it was, one after the other.

IS: starting actors, telling a lost one from an error that it answered with, and starting the next
one in its place. IS NOT: what becomes of its branches (run).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

from flashrt.base.errors import FlashrtError, FleetError
from flashrt.fleet.actor import EngineActor, WorkerSpec
from flashrt.fleet.message import Installed, WorkerState
from flashrt.fleet.runtime import ray

_AT_ONCE = 16  # calls of an actor; each run waits in one, and a few are short
_MOST_FAILED_STARTS = 3  # one after the other


class WorkerLost(Exception):
    """The actor of a call is gone, or its engine failed: never seen outside of the fleet."""


class BytesLost(Exception):
    """What an argument refers to is gone, with the machine that it was on."""


class Incarnation:
    """One actor of a member."""

    def __init__(self, name: str, spec: WorkerSpec, resources: Mapping[str, Any]) -> None:
        """It is started; `wait` tells when it has loaded."""
        self.name = name
        self.holds: set[str] = set()  # addresses of the capsules that it has, as far as is known
        self.moved: dict[str, int] = {}  # bytes that came, by address
        self._resources = resources
        options = {"max_restarts": 0, "max_concurrency": _AT_ONCE}
        self._handle = ray.remote(EngineActor).options(**resources, **options).remote()
        self._loading = self._handle.load.remote(spec)

    def wait(self, timeout_s: float) -> WorkerState:
        """The worker, once its engine is loaded. Raises what `flashrt.load` raises, FleetError when
        it does not start, WorkerLost when it dies meanwhile.
        """
        try:
            state: WorkerState = ray.get(self._loading, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise FleetError(
                f"{self.name} has not started after {timeout_s:g} s: it wants "
                f"{dict(self._resources)}; the cluster has {ray.cluster_resources()}, of which "
                f"{ray.available_resources()} are free; start fewer workers, or give "
                "start_timeout_s"
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise _cause(error, f"{self.name} cannot load") from error
        except ray.exceptions.RayError as error:
            raise WorkerLost(str(error)) from error
        return state

    async def call(self, verb: str, *arguments: Any) -> Any:
        """A method of the worker. Raises its FlashrtErrors, WorkerLost, BytesLost."""
        return await self._answer(self._handle.call.remote(verb, *arguments))

    async def fetch(self, address: str, run: str = "") -> tuple[Any, int]:
        """Ray's reference to a parcel, once it is in the object store, and its bytes: 0 where the
        worker has it no more.
        """
        parcel, nbytes = self._handle.fetch.options(num_returns=2).remote(address, run)
        return parcel, await self._answer(nbytes)

    async def install(self, parcels: list[Any]) -> Installed:
        """Of references to parcels, bases first; what came is counted. Raises as `call`: BytesLost
        also where Ray names the death of the actor that had packed a parcel.
        """
        try:
            done: Installed = await self.call("install", *parcels)
        except WorkerLost as error:
            await self.call("state")  # or it is this one that is lost
            raise BytesLost(str(error)) from error
        for address, nbytes in done.nbytes.items():
            self.holds.add(address)
            self.moved[address] = self.moved.get(address, 0) + nbytes
        return done

    def state(self, timeout_s: float) -> WorkerState | None:
        """The worker as it is; None when it is gone, or does not answer."""
        try:
            state: WorkerState = ray.get(self._handle.call.remote("state"), timeout=timeout_s)
        except ray.exceptions.RayError:
            return None
        return state

    def kill(self) -> None:
        """It ends, whatever it does."""
        ray.kill(self._handle)

    async def _answer(self, reference: Any) -> Any:
        try:
            return await reference
        except ray.exceptions.RayTaskError as error:
            cause = _cause(error, f"{self.name} failed")
            if isinstance(cause, FleetError):
                raise WorkerLost(str(cause)) from error
            raise cause from error
        except ray.exceptions.ObjectLostError as error:
            raise BytesLost(str(error)) from error
        except ray.exceptions.RayError as error:
            raise WorkerLost(str(error)) from error


class Member:
    """See the module. `present` is swapped as a whole; runs in several threads may ask for it."""

    def __init__(
        self, index: int, spec: WorkerSpec, resources: Mapping[str, Any], timeout_s: float
    ) -> None:
        """An actor is started, not waited for."""
        self.index = index
        self.past: list[Incarnation] = []
        self._spec, self._resources, self._timeout_s = spec, resources, timeout_s
        self._fingerprint = ""
        self._is_closed = False
        self._lost: Incarnation | None = None
        self._coming: Incarnation | None = None  # the one that was started last
        self._lock = threading.Lock()
        self.present = self._begin()

    def wait(self, fingerprint: str | None) -> WorkerState:
        """The worker, once its engine is loaded; `fingerprint`: the fleet's, None for the first of
        its workers. Raises what `flashrt.load` raises there; FleetError when it does not start or
        is foreign.
        """
        self.present, state = self._loaded(self.present)
        self._fingerprint = fingerprint or state.fingerprint
        self._check(state)
        return state

    @property
    def is_lost(self) -> bool:
        """Whether the present actor is known to be gone, and the next one is not there yet."""
        return self._lost is self.present

    async def revive(self, lost: Incarnation) -> None:
        """Another actor in the place of a lost one, unless somebody has been here already. Raises
        what `wait` raises. Nobody who stops waiting is kept by it.
        """
        await _in_thread(lambda: self._revive(lost))

    def _revive(self, lost: Incarnation) -> None:
        with self._lock:
            if self.present is not lost:
                return
            self._lost = lost
            lost.kill()
            coming, state = self._loaded(self._begin())
            try:
                self._check(state)
            except FleetError:
                coming.kill()
                raise
            self.past.append(lost)
            self.present = coming

    def close(self) -> None:
        """No actor any more, and none to come."""
        self._is_closed = True
        self.present.kill()
        if self._coming is not None:
            self._coming.kill()

    def _begin(self) -> Incarnation:
        if self._is_closed:
            raise FleetError("the fleet was closed")
        coming = Incarnation(f"worker {self.index}", self._spec, self._resources)
        self._coming = coming
        if self._is_closed:
            coming.kill()
        return coming

    def _loaded(self, coming: Incarnation) -> tuple[Incarnation, WorkerState]:
        """This one, or another in its place where it dies while it loads."""
        for n_failed in range(1, _MOST_FAILED_STARTS + 1):
            try:
                return coming, coming.wait(self._timeout_s)
            except WorkerLost as error:
                coming.kill()
                if n_failed == _MOST_FAILED_STARTS:
                    raise FleetError(
                        f"{coming.name} died {n_failed} times while it was started: {error}"
                    ) from error
                coming = self._begin()
            except FlashrtError:
                coming.kill()
                raise
        raise AssertionError("the loop above returns or raises")

    def _check(self, state: WorkerState) -> None:
        """Raises FleetError for a worker whose capsules would be foreign to the others."""
        if state.fingerprint != self._fingerprint:
            raise FleetError(
                f"worker {self.index} on {state.host} ({state.device}) is foreign: its fingerprint "
                f"is {state.fingerprint}, the fleet's {self._fingerprint}; checkpoint, options of "
                "load, device and flashrt itself must be the same on all machines"
            )


async def _in_thread(work: Callable[[], None]) -> None:
    """`work()` in a thread of its own. Unlike those of asyncio.to_thread, it is not waited for when
    the loop ends: to start an engine takes long.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: Exception | None = None
        try:
            work()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name="flashrt-revive", daemon=True).start()
    await done


def _cause(error: Any, what: str) -> FlashrtError:
    """The error that a method raised, in its process."""
    cause = error.cause
    if isinstance(cause, FlashrtError):
        return cause
    return FleetError(f"{what}: {type(cause).__name__}: {cause}")
