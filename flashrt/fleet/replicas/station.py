"""A replica without Ray: an engine, its server app, and the way of sessions to it.

IS: answering one request that a router sent, as ASGI messages; telling of itself; leaving. IS NOT:
routes (serve), or who sends what here (front).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashrt.base.errors import FlashrtError, StoreError
from flashrt.capsule.eviction import Budgets
from flashrt.fleet.replicas.migration import Homing, StoreShelf
from flashrt.fleet.replicas.ring import Member
from flashrt.load import KvDType, Precision, Weights, load
from flashrt.serve.access import Access
from flashrt.serve.app import make_app
from flashrt.serve.core import Core
from flashrt.serve.gate import refuse, shape_of
from flashrt.serve.history import History
from flashrt.serve.refusal import refusal_of
from flashrt.serve.served import Served
from flashrt.serve.sharing import Sharing
from flashrt.serve.work import Limits
from flashrt.session.engine import SessionEngine
from flashrt.store.store import Store

PATIENCE_S = 10.0  # for an app whose client has gone
_ARRIVAL = "arrival"  # in the scope's state


class NotHere(FlashrtError):
    """A request came to a replica that it was not sent to, or that has left: it was not begun."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a router tells a replica of a request. session: the one that it names; is_new_here: what
    it goes on from may be known to other replicas alone; lists: the answer is the ids of all of the
    owner's sessions that are in the store.
    """

    session: str | None = None
    is_new_here: bool = False
    lists: bool = False


@dataclass(frozen=True, slots=True)
class StationOptions:
    """What a replica is. store: a folder or an fsspec URL that all replicas reach; name: of the
    model, for clients; access, limits: as of a server; all else: as of `flashrt.load`.
    """

    checkpoint: str
    store: str
    name: str
    device: str = "auto"
    precision: Precision = "bfloat16"
    max_positions: int = 4096
    lanes: int = 4
    kv_dtype: KvDType = "bfloat16"
    pool_bytes: int | None = None
    draft: bool | None = None
    weights: Weights | None = None
    prefill_rows: int | None = None
    images: bool | None = False
    host_nbytes: int = 0  # memory for states that the pool has no room for
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)


class Station:
    """Use it in one event loop; the engine's thread is its own."""

    def __init__(
        self, id_: str, engine: SessionEngine, store: Store, options: StationOptions
    ) -> None:
        """Begins to serve. Raises CheckpointError for one without a tokenizer, StoreError."""
        served = Served(engine, options.name)
        digest = hashlib.blake2b(served.tokenizer.to_json().encode(), digest_size=8).hexdigest()
        self.id, self.engine = id_, engine
        self.core = Core(engine, store, limits=options.limits, sharing=Sharing(digest, id_))
        self.homing = Homing(self.core, store)
        self._app = make_app(
            self.core,
            served,
            options.access,
            history=History(StoreShelf(store)),
            inner=self._within,
        )
        self._has_left = False
        self.core.start()

    @classmethod
    def opened(cls, id_: str, options: StationOptions) -> Station:
        """With an engine and a store of its own. Raises whatever `flashrt.load` raises."""
        engine = load(
            options.checkpoint,
            device=options.device,
            max_positions=options.max_positions,
            lanes=options.lanes,
            kv_dtype=options.kv_dtype,
            pool_bytes=options.pool_bytes,
            draft=options.draft,
            precision=options.precision,
            weights=options.weights,
            prefill_rows=options.prefill_rows,
            images=options.images,
        )
        engine.budgets = Budgets(options.host_nbytes)
        try:
            return cls(id_, engine, Store(options.store, is_shared=True), options)
        except BaseException:
            engine.close()
            raise

    @property
    def has_left(self) -> bool:
        """Whether its sessions were given to others: it takes nothing more."""
        return self._has_left

    async def answer(
        self, to: str, scope: Mapping[str, Any], body: bytes, arrival: Arrival
    ) -> AsyncGenerator[Message, None]:
        """The messages that the app sends. Who stops to read ends the request, as a client that
        goes does. Raises NotHere at once.
        """
        if to != self.id or self._has_left:
            raise NotHere(f"this is {self.id}, not {to}")
        gone, outbox = asyncio.Event(), asyncio.Queue[Message | None](maxsize=64)
        inbox: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if inbox:
                return inbox.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if not gone.is_set():
                await outbox.put(message)

        async def run() -> None:
            try:
                await self._app({**scope, "state": {_ARRIVAL: arrival}}, receive, send)
            finally:
                await send_end()

        async def send_end() -> None:
            if not gone.is_set():
                await outbox.put(None)

        work = asyncio.create_task(run())
        try:
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            gone.set()
            while not outbox.empty():  # whoever waits to put something goes on
                outbox.get_nowait()
            done, _ = await asyncio.wait({work}, timeout=PATIENCE_S)
            if not done:
                work.cancel()
            elif not work.cancelled() and (error := work.exception()) is not None:
                raise error

    async def about(self, *, with_roster: bool = False, rank: int = 0) -> Member:
        """What it is, and has."""
        views = await asyncio.wrap_future(self.core.call(self.core.book.ids))
        return Member(
            id=self.id,
            rank=rank,
            lanes=len(self.core.scheduler.workers),
            fingerprint=self.engine.fingerprint,
            pid=os.getpid(),
            host=socket.gethostname(),
            sessions=len(views),
            adopted=self.homing.n_adopted,
            foreign=self.core.book.n_foreign,
            lent=self.homing.n_lent,
            roster=views if with_roster else (),
        )

    async def leave(self) -> int:
        """Take nothing more, and forget all sessions: they are in the store. Call it when nothing
        is sent here any more. How many sessions they were.
        """
        self._has_left = True
        return await self.homing.leave()

    def close(self) -> None:
        """Let run what runs, then give everything back. Blocks."""
        self.core.close(drain=True)
        self.engine.close()

    def _within(self, app: ASGIApp) -> ASGIApp:
        """The layer behind the gate: what a request needs is fetched before the app sees it."""

        async def arriving(scope: Scope, receive: Receive, send: Send) -> None:
            arrival: Arrival = scope["state"].get(_ARRIVAL, Arrival())
            owner: str = scope["state"]["owner"]
            try:
                if arrival.session is not None:
                    await self.homing.session(owner, arrival.session)
                if arrival.is_new_here:
                    with contextlib.suppress(StoreError):  # it costs speed alone
                        await self.homing.prefixes(owner)
                if arrival.lists:
                    ids = await self.homing.stored(owner)
                    await JSONResponse(list(ids))(scope, receive, send)
                    return
            except FlashrtError as error:
                await refuse(refusal_of(error), shape_of(scope))(scope, receive, send)
                return
            await app(scope, receive, send)

        return arriving
