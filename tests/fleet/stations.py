"""Replicas in this process, behind a link without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Message

from flashrt.fleet.replicas.front import Front, Gone, Moved
from flashrt.fleet.replicas.ring import Member
from flashrt.fleet.replicas.station import Arrival, NotHere, Station, StationOptions
from flashrt.weights.bundled import bundled_checkpoint


def options_of(store: Path | str, **changed: Any) -> StationOptions:
    given: dict[str, Any] = {
        "checkpoint": str(bundled_checkpoint()), "store": str(store), "name": "tiny",
        "device": "cpu", "max_positions": 512, "lanes": 2, "pool_bytes": 16 << 20,
        **changed,
    }  # fmt: skip
    return StationOptions(**given)


class LocalLink:
    """See front.Link. `kill`: a replica answers no more, and what it was writing is cut off."""

    def __init__(self, stations: list[Station]) -> None:
        self.stations = {station.id: station for station in stations}
        self.killed: set[str] = set()
        self.hidden: set[str] = set()  # not started yet, as far as anybody knows
        self.strayed: list[str] = []  # where the next calls arrive, whomever they are for
        self.sent: list[tuple[str, str, Arrival]] = []  # to, path, arrival
        self.kill_at: tuple[str, int] | None = None  # a replica, after so many messages

    def kill(self, id_: str) -> None:
        self.killed.add(id_)

    async def members(self, *, with_roster: bool) -> list[Member]:
        there = [s for id_, s in self.stations.items() if id_ not in self.killed | self.hidden]
        return [await s.about(with_roster=with_roster, rank=rank) for rank, s in enumerate(there)]

    async def send(
        self, to: str, scope: Mapping[str, Any], body: bytes, arrival: Arrival
    ) -> AsyncGenerator[Message, None]:
        self.sent.append((to, scope["path"], arrival))
        if to in self.killed:
            raise Gone(f"{to} is dead")
        n = 0
        try:
            at = self.strayed.pop() if self.strayed else to
            answer = self.stations[at].answer(to, dict(scope), body, arrival)
            async with contextlib.aclosing(answer) as messages:
                async for message in messages:
                    if self.kill_at == (to, n):
                        self.kill(to)
                        raise Gone(f"{to} died")
                    n += 1
                    yield message
        except NotHere as error:
            raise Moved(str(error)) from error

    async def leave(self, to: str) -> int:
        return await self.stations[to].leave()

    def homes_of(self, path: str) -> list[str]:
        """Where requests to a path went, in turn."""
        return [to for to, at, _ in self.sent if at == path]


@contextlib.asynccontextmanager
async def fleet(
    *options: StationOptions,
) -> AsyncIterator[tuple[Front, LocalLink, httpx.AsyncClient]]:
    """A front before replicas a, b, ..., and a client of it."""
    stations = [Station.opened(name, o) for name, o in zip("abcdef", options, strict=False)]
    link = LocalLink(stations)
    front = Front(link)
    transport = httpx.ASGITransport(app=front)
    async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
        try:
            yield front, link, client
        finally:
            for station in stations:
                await asyncio.to_thread(station.close)
