"""The router as an ASGI app: each request goes to the replica that has its state.

IS: placing, forwarding, and what happens when a replica leaves or dies. IS NOT: Ray: replicas are
behind a `Link`; or what is in a request (keys), or answers that sum up several replicas (sums).

One front decides, so that two turns of one session never run in two replicas. Should there be two
all the same, as when a network parts, the stamps in the store keep the later one from writing over
the other (serve.sharing).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from flashrt.base.errors import FleetError
from flashrt.fleet.replicas import sums
from flashrt.fleet.replicas.keys import Key, Wish, response_key, session_key, wish_of
from flashrt.fleet.replicas.ring import Directory, Member, choose
from flashrt.fleet.replicas.station import Arrival
from flashrt.serve.gate import refuse, shape_of
from flashrt.serve.refusal import Refusal

log = logging.getLogger("flashrt.serve")

POLL_S = 1.0  # between two looks at who is there
TRIES = 4  # of a request that replicas send back, or die of
DRAIN_S = 60.0  # for requests that run on a replica that is drained
_PLAIN = (str, bytes, int, float, bool, type(None), list, tuple)
_MADE_RESPONSE = re.compile(rb'"(resp_[0-9a-f]{32})"')
_MADE_SESSION = re.compile(rb'"id":"([0-9a-f]{32})"')
_MOST_SNIFFED = 1 << 16


class Gone(Exception):
    """A replica died, or cannot be reached; what it was doing is not known."""


class Moved(Exception):
    """A replica did not begin with a request: it was not the one, or it has left."""


class Link(Protocol):
    """How a front reaches replicas."""

    async def members(self, *, with_roster: bool) -> list[Member]:
        """Those that are there."""
        ...

    def send(
        self, to: str, scope: Mapping[str, Any], body: bytes, arrival: Arrival
    ) -> AsyncGenerator[Message, None]:
        """What a replica answers, as ASGI messages. Raises Moved before the first, Gone."""
        ...

    async def leave(self, to: str) -> int:
        """See Station.leave. Raises Gone."""
        ...


@dataclass(slots=True)
class Tally:
    """What happened, since the start."""

    placed: int = 0  # conversations that nobody knew
    moved: int = 0  # conversations whose replica had gone, or was drained
    repeated: int = 0  # requests that were sent again by the front
    broken: int = 0  # requests that a client has to send again
    drained: int = 0  # sessions that replicas left in the store


@dataclass(slots=True)
class _Flights:
    """Requests that run, by replica, and by replica and conversation."""

    by_home: Counter[str] = field(default_factory=Counter)
    by_key: Counter[tuple[str, Key]] = field(default_factory=Counter)
    landed: asyncio.Condition = field(default_factory=asyncio.Condition)


class Front:
    """An ASGI app. Used in one event loop."""

    def __init__(self, link: Link, *, body_nbytes: int = 16 << 20, body_s: float = 30.0) -> None:
        self._link, self._body_nbytes, self._body_s = link, body_nbytes, body_s
        self._members: dict[str, Member] = {}
        self._draining: set[str] = set()
        self._dead: set[str] = set()
        self._directory = Directory()
        self._flights = _Flights()
        self._looked = -1e9
        self._looking = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self.tally = Tally()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        try:
            body = await _body_of(scope, receive, self._body_nbytes, self._body_s)
            if body is None:
                return
            headers = dict(Headers(scope=scope).items())
            wish = wish_of(scope["method"], scope["path"], headers, body)
            head = {k: v for k, v in scope.items() if isinstance(v, _PLAIN)}
            answer = self._summed if wish.kind in sums.KINDS else self._carried
            async with contextlib.aclosing(answer(wish, head, body)) as messages:
                async for message in messages:
                    await send(message)
        except Refusal as refusal:
            await refuse(refusal, shape_of(scope))(scope, receive, send)

    async def status(self) -> dict[str, Any]:
        """Replicas, what they do, and what happened."""
        await self._look(at_once=True)
        members = [
            {
                **asdict(member),
                "running": self._flights.by_home[member.id],
                "is_draining": member.id in self._draining,
            }
            for member in sorted(self._members.values(), key=lambda m: m.rank)
        ]
        for member in members:
            del member["roster"]
        return {"members": members, "known": len(self._directory), **asdict(self.tally)}

    async def drain(self, id_: str, most_s: float = DRAIN_S) -> int:
        """Let a replica end what it does, and send it nothing more; its conversations go elsewhere,
        each with its next request. How many sessions it had. Raises FleetError.
        """
        await self._look(at_once=True)
        if id_ not in self._members:
            there = ", ".join(sorted(self._members)) or "none"
            raise FleetError(f"there is no replica {id_!r} to drain; there are: {there}")
        if not set(self._members) - self._draining - {id_}:
            raise FleetError(f"{id_} is the only replica that serves; add one before you drain it")
        self._draining.add(id_)
        flights = self._flights
        try:
            async with asyncio.timeout(most_s), flights.landed:
                await flights.landed.wait_for(lambda: not flights.by_home[id_])
        except TimeoutError as error:
            self._draining.discard(id_)
            raise FleetError(
                f"{id_} still has {flights.by_home[id_]} requests after {most_s:g} s and goes on "
                "serving; drain it again"
            ) from error
        n = await self._link.leave(id_)
        self.tally.drained += n
        return n

    # -- forwarding -----------------------------------------------------------------------------

    async def _carried(
        self, wish: Wish, head: Mapping[str, Any], body: bytes
    ) -> AsyncGenerator[Message, None]:
        """Forwarded, and tried again where nothing can have happened yet."""
        for n in range(1, TRIES + 1):
            home, is_new_here = await self._home(wish)
            arrival = Arrival(wish.session, is_new_here)
            scope, shift = sums.slot_scope(wish, head, self._members[home])
            has_begun = False
            try:
                flown = self._flown(wish, home, scope, body, arrival)
                async with contextlib.aclosing(flown) as messages:
                    async for message in messages:
                        if not has_begun:
                            told = [(b"x-flashrt-replica", home.encode())]
                            told += [(b"x-flashrt-tries", b"%d" % n)] * (n > 1)
                            message["headers"] = [*message["headers"], *told]
                        has_begun = True
                        yield sums.shifted(message, shift)
                return
            except Moved:
                await self._look(at_once=True)
            except Gone as error:
                self._bury(home)
                if has_begun:
                    self.tally.broken += 1
                    raise ConnectionAbortedError(f"replica {home} died within an answer") from error
                if not wish.is_repeatable:
                    self.tally.broken += 1
                    raise Refusal(
                        503,
                        "the replica that served this died. What it was asked for may have "
                        "happened, or not: look at the session's tip, and send it again",
                        code="replica_died",
                        retry_after_s=1.0,
                    ) from error
            self.tally.repeated += 1
        raise Refusal(503, "no replica took this request; send it again", retry_after_s=1.0)

    async def _flown(
        self, wish: Wish, home: str, head: Mapping[str, Any], body: bytes, arrival: Arrival
    ) -> AsyncGenerator[Message, None]:
        """One try, counted; what it makes is known to be there."""
        flights, key = self._flights, wish.keys[:1] if wish.session is not None else ()
        flights.by_home[home] += 1
        flights.by_key.update([(home, k) for k in key])
        is_making = head["method"] == "POST" and wish.kind in ("kept", "prompt")
        sniffed = 0
        try:
            async with contextlib.aclosing(self._link.send(home, head, body, arrival)) as messages:
                async for message in messages:
                    data: bytes = message.get("body", b"")
                    if is_making and data and sniffed < _MOST_SNIFFED:
                        sniffed += len(data)
                        self._directory.learn(_made(head["path"], data), home)
                    yield message
        finally:
            flights.by_home -= Counter([home])  # what is at 0 is gone
            flights.by_key -= Counter([(home, k) for k in key])
            async with flights.landed:
                flights.landed.notify_all()

    async def _home(self, wish: Wish) -> tuple[str, bool]:
        """Where a request goes, and whether its state may be known elsewhere alone."""
        await self._look()
        flights = self._flights
        while True:
            live = sorted(set(self._members) - self._draining - self._dead)
            if not live:
                raise Refusal(503, "no replica is ready; try again", retry_after_s=2.0)
            if wish.kind == "slot":
                return self._of_slot(wish.slot), False
            home = self._directory.find(wish.keys)
            if home in live:
                self._directory.learn(wish.learned, home)
                return home, self._is_new_root(wish, home)
            if home is not None and home not in self._dead and flights.by_key[home, wish.keys[0]]:
                await self._landing(home, wish.keys[0])  # one turn after the other
                continue
            chosen = choose(wish.root, live, flights.by_home)
            assert chosen is not None, "some are live"
            self.tally.moved += home is not None
            self.tally.placed += home is None and wish.root is not None
            self._directory.learn(wish.learned, chosen)
            is_new_root = self._is_new_root(wish, chosen)
            return chosen, is_new_root or (wish.is_continued and wish.session is None)

    async def _landing(self, home: str, key: Key) -> None:
        """Wait until nothing of a conversation runs at a replica."""
        flights = self._flights
        async with flights.landed:
            await flights.landed.wait_for(lambda: not flights.by_key[home, key])

    def _is_new_root(self, wish: Wish, home: str) -> bool:
        """Whether a replica is asked for a root for the first time: others may know it."""
        if wish.root is None or wish.kind != "prompt":
            return False
        key = wish.root + home.encode()
        if self._directory.find((key,)) is not None:
            return False
        self._directory.learn((key,), home)
        return True

    def _of_slot(self, slot: int) -> str:
        at = 0
        for member in sorted(self._members.values(), key=lambda m: m.rank):
            if slot < at + member.lanes and member.id not in self._draining | self._dead:
                return member.id
            at += member.lanes
        raise Refusal(400, f"there is no slot {slot}; GET /slots lists them", "id", "invalid_slot")

    # -- who is there ---------------------------------------------------------------------------

    async def _look(self, *, at_once: bool = False) -> None:
        """Ask who is there: before this returns, or, where somebody is known, meanwhile. A replica
        that hangs keeps nobody waiting.
        """
        clock = asyncio.get_running_loop().time
        if self._members and not at_once:
            if clock() - self._looked > POLL_S and (self._watch is None or self._watch.done()):
                self._watch = asyncio.create_task(self._look(at_once=True))
                self._watch.add_done_callback(_noted)
            return
        began = clock()
        async with self._looking:
            if self._looked >= began:  # somebody looked while this waited
                return
            is_first = not self._members
            found = await self._link.members(with_roster=is_first)
            self._looked = clock()
            self._members = {m.id: m for m in found if m.id not in self._dead}
            self._draining &= set(self._members)
            if is_first:  # a front that was started again
                for member in found:
                    self._directory.learn(map(session_key, member.roster), member.id)

    def _bury(self, home: str) -> None:
        self._dead.add(home)
        self._members.pop(home, None)
        self._draining.discard(home)

    # -- sums -----------------------------------------------------------------------------------

    async def _summed(
        self, wish: Wish, head: Mapping[str, Any], body: bytes
    ) -> AsyncGenerator[Message, None]:
        """One answer from all replicas'."""
        await self._look()
        members = sorted(self._members.values(), key=lambda m: m.rank)
        members = [m for m in members if m.id not in self._draining]
        if not members:
            raise Refusal(503, "no replica is ready; try again", retry_after_s=2.0)
        asked = [self._whole(m.id, head, body) for m in members]
        answers = [a for a in await asyncio.gather(*asked) if a is not None]
        if not answers:
            raise Refusal(503, "no replica answered; try again", retry_after_s=2.0)
        made = sums.summed(wish.kind, answers, [m.lanes for m in members])
        if wish.kind == "sessions" and made.status == 200:
            made = await self._with_stored(made, members[0].id, head)
        for message in made.messages():
            yield message

    async def _with_stored(
        self, listed: sums.Whole, home: str, head: Mapping[str, Any]
    ) -> sums.Whole:
        """With the sessions that no replica has taken over since theirs died: asked for one by one,
        so that each has a home from then on.
        """
        known = {session["id"] for session in json.loads(listed.body)["data"]}
        stored = await self._whole(home, head, b"", Arrival(lists=True))
        ids = [] if stored is None or stored.status != 200 else json.loads(stored.body)
        for id_ in ids:
            if id_ not in known:
                path = f"/v1/sessions/{id_}"
                scope = {**head, "path": path, "raw_path": path.encode()}
                found = sums.Whole("")
                try:
                    async for message in self._carried(wish_of("GET", path, {}, b""), scope, b""):
                        found.take(message)
                except Refusal:
                    continue
                if found.status == 200:
                    listed = sums.with_session(listed, found)
        return listed

    async def _whole(
        self, home: str, head: Mapping[str, Any], body: bytes, arrival: Arrival | None = None
    ) -> sums.Whole | None:
        """A replica's answer; None of one that has gone."""
        made = sums.Whole(home)
        try:
            async for message in self._link.send(home, head, body, arrival or Arrival()):
                made.take(message)
        except (Moved, Gone):
            return None
        return made


def _made(path: str, data: bytes) -> list[Key]:
    """Keys of the response or the session that an answer tells of."""
    if path == "/v1/responses":
        return [response_key(id_.decode()) for id_ in _MADE_RESPONSE.findall(data)[:1]]
    if path == "/v1/sessions":
        return [session_key(id_.decode()) for id_ in _MADE_SESSION.findall(data)[:1]]
    return []


async def _body_of(scope: Scope, receive: Receive, most: int, seconds: float) -> bytes | None:
    """A request's body; None for a client that went."""
    pieces, count = list[bytes](), 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                pieces.append(message.get("body", b""))
                count += len(pieces[-1])
                if count > most:
                    raise Refusal(413, f"the body has over {most:,} bytes, the most that is taken")
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {seconds:g} s") from error


def _noted(watch: asyncio.Task[None]) -> None:
    """Who is there was not told: the next look may be."""
    if not watch.cancelled() and (error := watch.exception()) is not None:
        log.warning("replicas did not tell of themselves: %s", type(error).__name__)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
