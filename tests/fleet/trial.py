"""Sessions over HTTP to a fleet on Ray, of which one replica is drained and one is killed, beside
the same sessions to a single server. `python -m tests.fleet.trial --help`.

A third of the sessions are named ones, with streams; a third sends the whole conversation each
time; a third goes on from its last response. Each has a system message of its own, so what one
finds warm does not depend on who was there before.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import ray

import flashrt
from flashrt.commands.bench.document import provenance
from flashrt.commands.doctor import cpu_name
from flashrt.fleet.replicas import deployments
from flashrt.fleet.replicas.deployments import ServingOptions
from flashrt.fleet.replicas.station import StationOptions
from flashrt.serve.access import Access
from flashrt.serve.run import Server
from flashrt.store.store import Store
from flashrt.weights.bundled import bundled_checkpoint

_SPOKEN = "north south east west start in column row one two three four five six where am i the"
WORDS = _SPOKEN.split()
MAX_POSITIONS, LANES, MAX_TOKENS = 1024, 2, 8
POOL_NBYTES = 192 << 20  # for all: what is known of a prompt then depends on nobody's evictions
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn gave. tries: how often it was sent, by the front again too; replica: which one
    answered.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    replica: str = ""
    tries: int = 1
    seconds: float = 0.0


@dataclass(slots=True)
class Trial:
    """What came of it. Differences: (session, turn, what one server gave, what the fleet gave)."""

    sessions: int
    turns: int
    replicas: int
    lost: list[str] = field(default_factory=list)
    other_text: list[tuple[int, int]] = field(default_factory=list)
    other_counts: list[dict[str, Any]] = field(default_factory=list)
    moved: int = 0  # turns that another replica answered than the turn before
    moved_with_other_counts: int = 0
    sent_again: int = 0
    kept_unseen: int = 0  # of these: turns that had ended, and whose answer was lost on the way
    seconds_start: float = 0.0  # of Ray, Serve and the replicas
    seconds_one: float = 0.0
    seconds_fleet: float = 0.0
    drained: str = ""
    killed: str = ""
    status: dict[str, Any] = field(default_factory=dict)


class Trap:
    """Once it has pids, the replica that the next stream comes from is killed within it."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        self.killed = ""

    def spring(self, replica: str) -> None:
        if not self.killed and (pid := self.pids.get(replica)) is not None:
            assert pid not in (1, os.getpid())
            os.kill(pid, signal.SIGKILL)
            self.killed = replica


_Made = tuple[str, int, int, str, int]  # as Turn has them; tries are the front's


class Talk:
    """One session's client."""

    def __init__(self, client: httpx.AsyncClient, number: int, kind: str, trap: Trap) -> None:
        self._client, self._kind, self._trap = client, kind, trap
        draw = random.Random(number)
        self._system = " ".join(["be", "brief", *draw.choices(WORDS, k=12), "."])
        self._draw, self._number = draw, number
        self._messages: list[dict[str, str]] = [{"role": "system", "content": self._system}]
        self.session = self._etag = self._response = ""
        self.turns: list[Turn] = []
        self.n_kept = 0  # turns that the server knows of at the end

    async def turn(self) -> None:
        """The next turn, sent again until it is answered."""
        said = " ".join(self._draw.choices(WORDS, k=self._draw.randrange(4, 12)))
        body = {"temperature": 0.8, "seed": self._number, "model": "default"}
        began = time.monotonic()
        tries = 0
        while True:
            tries += 1
            if time.monotonic() - began > PATIENCE_S:
                raise TimeoutError(f"session {self._number}, turn {len(self.turns)}")
            try:
                *made, of_front = await getattr(self, f"_{self._kind}")(said, body)
            except (httpx.HTTPError, _Again):
                await asyncio.sleep(0.3)
                continue
            seconds = time.monotonic() - began
            self.turns.append(Turn(*made, tries + of_front - 1, round(seconds, 4)))
            return

    async def _named(self, said: str, body: dict[str, Any]) -> _Made:
        new = [*self._messages[len(self.turns) > 0 :], {"role": "user", "content": said}]
        if not self.session:
            made = await self._client.post("/v1/sessions", json={})
            _need(made)
            self.session, self._etag = made.json()["id"], made.json()["etag"]
        asked = {
            **body, "messages": new, "max_tokens": MAX_TOKENS, "session": self.session,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        text, usage, node = "", {}, None
        headers = {"if-match": f'"{self._etag}"'}
        url = "/v1/chat/completions"
        async with self._client.stream("POST", url, json=asked, headers=headers) as reply:
            if reply.status_code == 412:
                return await self._kept_already()
            if reply.is_error:
                await reply.aread()
            _need(reply)
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                self._trap.spring(reply.headers.get("x-flashrt-replica", ""))
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise _Again
                text += "".join(c["delta"].get("content") or "" for c in chunk.get("choices", ()))
                usage = chunk.get("usage") or usage
                if chunk.get("session"):
                    node, self._etag = chunk["session"]["node"], chunk["session"]["etag"]
        if not usage or node is None:
            raise _Again
        return text, *_counts(usage), *_told(reply)

    async def _kept_already(self) -> _Made:
        """The turn was kept, and its answer was lost on the way."""
        view = await self._client.get(f"/v1/sessions/{self.session}")
        _need(view)
        self._etag = view.json()["etag"]
        tip = view.json()["tip"]
        node = await self._client.get(f"/v1/sessions/{self.session}/nodes/{tip}")
        _need(node)
        text = node.json()["messages"][-1]["content"]
        return text, -1, -1, *_told(node)

    async def _whole(self, said: str, body: dict[str, Any]) -> _Made:
        messages = [*self._messages, {"role": "user", "content": said}]
        asked = {**body, "messages": messages, "max_tokens": MAX_TOKENS}
        reply = await self._client.post("/v1/chat/completions", json=asked)
        _need(reply)
        told = reply.json()
        text = told["choices"][0]["message"]["content"]
        self._messages = [*messages, {"role": "assistant", "content": text}]
        return text, *_counts(told["usage"]), *_told(reply)

    async def _responses(self, said: str, body: dict[str, Any]) -> _Made:
        asked = {**body, "input": said, "max_output_tokens": MAX_TOKENS}
        asked.pop("seed")
        asked["temperature"] = 0
        if self._response:
            asked["previous_response_id"] = self._response
        else:
            asked["input"] = [*self._messages, {"role": "user", "content": said}]
        reply = await self._client.post("/v1/responses", json=asked)
        _need(reply)
        told = reply.json()
        self._response = told["id"]
        text = told["output"][-1]["content"][0]["text"]
        usage = told["usage"]
        cached = usage["input_tokens_details"]["cached_tokens"]
        return text, usage["input_tokens"], cached, *_told(reply)

    async def n_nodes(self) -> int:
        """Of the session as the server has it, without its root."""
        tree = await self._client.get(f"/v1/sessions/{self.session}/tree")
        return len(tree.json()["nodes"]) - 1


class _Again(Exception):
    """The turn is to be sent again."""


def _need(reply: httpx.Response) -> None:
    if reply.status_code in (409, 429, 503):
        raise _Again
    if reply.is_error:
        raise RuntimeError(f"{reply.request.url}: {reply.status_code} {reply.text}")


def _told(reply: httpx.Response) -> tuple[str, int]:
    """Who answered, and how often the front sent it."""
    headers = reply.headers
    return headers.get("x-flashrt-replica", ""), int(headers.get("x-flashrt-tries", 1))


def _counts(usage: dict[str, Any]) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


Event = Callable[[asyncio.Event], Awaitable[None]]  # of an event that no turn begins without


async def talk(
    url: str, sessions: int, turns: int, clients: int, events: dict[int, Event], trap: Trap
) -> list[Talk]:
    """All sessions, turn by turn, so many at once; `events`: by turns that have begun."""
    kinds = ("named", "whole", "responses")
    n = 0
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
        talks = [Talk(client, i, kinds[i % 3], trap) for i in range(sessions)]
        free, going = asyncio.Semaphore(clients), asyncio.Event()
        going.set()
        happening: list[asyncio.Task[None]] = []

        async def one(session: Talk) -> None:
            nonlocal n
            for _ in range(turns):
                async with free:
                    await going.wait()
                    if n in events:
                        happening.append(asyncio.ensure_future(events[n](going)))
                    n += 1
                    await session.turn()

        await asyncio.gather(*map(one, talks), return_exceptions=False)
        await asyncio.gather(*happening)
        for session in talks:
            session.n_kept = await session.n_nodes() if session.session else turns
    return talks


@contextlib.contextmanager
def single(store: Path) -> Iterator[str]:
    """One server, as `flashrt serve` runs it."""
    engine = flashrt.load(
        bundled_checkpoint(),
        device="cpu",
        max_positions=MAX_POSITIONS,
        lanes=LANES,
        pool_bytes=POOL_NBYTES,
    )
    server = Server(engine, "tiny", Access(), port=0, store=Store(store))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.end()
        thread.join()
        server.close()
        engine.close()


@contextlib.contextmanager
def fleet(store: Path, replicas: int, port: int) -> Iterator[str]:
    """A fleet on a Ray of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", object_store_memory=100 << 20,
    )  # fmt: skip
    station = StationOptions(
        checkpoint=str(bundled_checkpoint()), store=str(store), name="tiny", device="cpu",
        max_positions=MAX_POSITIONS, lanes=LANES, pool_bytes=POOL_NBYTES,
    )  # fmt: skip
    options = ServingOptions(
        station, replicas, num_cpus=0, environment={"FLASHRT_THREADS": "1"}, health_s=1.0
    )
    try:
        deployments.deploy(options, port=port)
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()


def trial(store: Path, replicas: int, sessions: int, turns: int, clients: int, port: int) -> Trial:
    """The same sessions to one server and to a fleet; a drain after a third of the turns, a kill
    after two thirds.
    """
    made, n, trap = Trial(sessions, turns, replicas), sessions * turns, Trap()
    began = time.monotonic()
    with single(store / "one") as url:
        one = asyncio.run(talk(url, sessions, turns, clients, {}, Trap()))
    made.seconds_one = round(time.monotonic() - began, 2)

    async def drain(going: asyncio.Event) -> None:
        members = (await asyncio.to_thread(deployments.status))["members"]
        made.drained = max(members, key=lambda m: m["running"])["id"]
        await asyncio.to_thread(deployments.drain, made.drained)

    async def kill(going: asyncio.Event) -> None:
        going.clear()  # until another has taken the place of the drained one
        there: list[dict[str, Any]] = []
        while len(there) < replicas:
            await asyncio.sleep(0.2)
            members = (await asyncio.to_thread(deployments.status))["members"]
            there = [m for m in members if not m["is_draining"]]
        assert {m["host"] for m in there} == {socket.gethostname()}
        trap.pids = {m["id"]: m["pid"] for m in there}
        going.set()

    began = time.monotonic()
    with fleet(store / "fleet", replicas, port) as url:
        made.seconds_start = round(time.monotonic() - began, 2)
        began = time.monotonic()
        events: dict[int, Event] = {n // 3: drain, 2 * n // 3: kill}
        many = asyncio.run(talk(url, sessions, turns, clients, events, trap))
        made.killed = trap.killed
        made.seconds_fleet = round(time.monotonic() - began, 2)
        made.status = deployments.status()
    for i, (a, b) in enumerate(zip(one, many, strict=True)):
        if b.n_kept != turns:
            made.lost.append(f"session {i} has {b.n_kept} turns, {turns} were answered")
        for t, (x, y) in enumerate(zip(a.turns, b.turns, strict=True)):
            is_moved = t > 0 and b.turns[t - 1].replica != y.replica
            made.moved += is_moved
            made.sent_again += y.tries > 1
            if x.text != y.text:
                made.other_text.append((i, t))
            if y.prompt_tokens < 0:
                made.kept_unseen += 1
            elif (x.prompt_tokens, x.cached_tokens) != (y.prompt_tokens, y.cached_tokens):
                made.moved_with_other_counts += is_moved
                made.other_counts.append({
                    "session": i, "turn": t, "one": asdict(x), "fleet": asdict(y),
                    "is_moved": is_moved,
                })  # fmt: skip
    return made


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--port", type=int, default=8217)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    document: dict[str, Any] = {
        **provenance("ray"),
        "command": shlex.join(["python", "-m", "tests.fleet.trial", *sys.argv[1:]]),
        "machine": {
            "processor": cpu_name(), "cores": os.cpu_count(), "system": platform.platform(),
        },
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = trial(
            Path(folder), given.replicas, given.sessions, given.turns, given.clients, given.port
        )
    document |= asdict(made)
    for member in document["status"]["members"]:
        del member["host"], member["pid"]
    text = json.dumps(document, indent=1)
    if given.json:
        given.json.write_text(text + "\n")
    print(text)
    return int(bool(made.lost or made.other_text))


if __name__ == "__main__":
    sys.exit(main())
