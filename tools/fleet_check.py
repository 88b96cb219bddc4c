"""A fleet on this machine against one engine: the same bits, whoever dies; how fast; what it costs.

    python tools/fleet_check.py --workers 4 --branches 1000 --kills 20 --json fleet.json

Needs `pip install 'flashrt[ray]'`. Every branch of every run is compared with one engine's, tokens
and digest; a trunk must come to each worker process once at most. Each engine has one thread, the
one here too. Throughput is the median of --repeats runs; on a machine with fewer cores than workers
it is flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import flashrt
from flashrt.fleet import Branch, Fleet, Rollout, Trunk
from flashrt.weights.bundled import bundled_checkpoint

POSITIONS, PROMPT, TEMPERATURE = 512, np.arange(200, dtype=np.int32), 0.9
SHORT = 300  # branches of one token, for the overhead
os.environ.setdefault("FLASHRT_THREADS", "1")  # of the engine here, as of those of the workers

Told = tuple[list[int], str | None]


def main() -> None:
    """All of it, printed as it goes; exits with 1 on the first bit that differs."""
    options = parsed(sys.argv[1:])
    report: dict[str, Any] = {
        "command": " ".join(["python", "tools/fleet_check.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    given = [
        Branch(seed=i, temperature=TEMPERATURE, max_tokens=options.tokens)
        for i in range(options.branches)
    ]
    expected, report["one_engine"] = by_one_engine(given, options)
    print("one engine:", report["one_engine"])
    report["throughput"] = {}
    for n_workers in options.throughput:
        found = asyncio.run(throughput(n_workers, options, given, expected))
        report["throughput"][str(n_workers)] = found
        print(f"{n_workers} workers:", found)
    report["overhead"] = asyncio.run(overhead(options))
    print("a branch of one token:", report["overhead"])
    report["kills"] = asyncio.run(with_kills(options, given, expected))
    print("with kills:", report["kills"])
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=4, help="of the run with kills")
    parser.add_argument("--branches", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64, help="of a branch")
    parser.add_argument("--lanes", type=int, default=8, help="of a worker")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--boundary-every", type=int, default=16)
    parser.add_argument("--throughput", type=int, nargs="*", default=[1, 2, 4], metavar="WORKERS")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="who is killed when")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def by_one_engine(
    given: Sequence[Branch], options: argparse.Namespace
) -> tuple[list[Told], dict[str, Any]]:
    """What one engine says, and tokens/s: a branch after the other, and as many at once as there
    are lanes.
    """
    with flashrt.load(
        bundled_checkpoint(), "cpu", max_positions=POSITIONS, lanes=options.lanes
    ) as engine:
        sessions = [engine.session() for _ in range(options.lanes)]
        sessions[0].prefill(PROMPT)
        trunk = sessions[0].snapshot()
        told, alone = rounds(sessions[:1], trunk, given)
        took = []
        for _ in range(options.repeats):
            again, seconds = rounds(sessions, trunk, given)
            took.append(seconds)
            if again != told:
                raise SystemExit("lanes of one engine differ from its sessions alone")
    n_tokens = sum(len(tokens) for tokens, _ in told)
    return told, {
        "one_lane_tokens_per_s": round(n_tokens / alone),
        "seconds": [round(s, 2) for s in took],
        "tokens_per_s": round(n_tokens / statistics.median(took)),
    }


def rounds(
    sessions: Sequence[flashrt.Session], trunk: flashrt.Capsule, given: Sequence[Branch]
) -> tuple[list[Told], float]:
    """All branches, as many at once as there are sessions; and the seconds it takes."""
    told: list[Told] = []
    began = time.perf_counter()
    for first in range(0, len(given), len(sessions)):
        now = list(zip(sessions, given[first : first + len(sessions)], strict=False))
        for session, _ in now:
            session.restore(trunk)
        said: list[list[int]] = [[] for _ in now]
        going = [s.generate(b.max_tokens, TEMPERATURE, seed=b.seed) for s, b in now]
        for index, token in flashrt.together(*going):
            said[index].append(token)
        told += [(said[i], session.digest()) for i, (session, _) in enumerate(now)]
    return told, time.perf_counter() - began


def started(n_workers: int, lanes: int) -> Fleet:
    """Workers of one thread each."""
    return Fleet(
        bundled_checkpoint(), n_workers, "cpu", lanes=lanes, threads=1, max_positions=POSITIONS
    )


def compared(found: Sequence[Rollout], expected: Sequence[Told]) -> None:
    """Every bit, and that no branch is missing or told twice."""
    for rollout in found:
        if rollout.error is not None:
            raise SystemExit(f"branch {rollout.index}: {rollout.error}")
        if (rollout.tokens.tolist(), rollout.digest) != expected[rollout.index]:
            raise SystemExit(f"branch {rollout.index} differs from one engine's")
    if sorted(r.index for r in found) != list(range(len(expected))):
        raise SystemExit(f"{len(found)} results for {len(expected)} branches")


def moved_once(fleet: Fleet, trunk: Trunk) -> list[list[int]]:
    """Bytes of the trunk that came to each process of each worker: once, or never."""
    moved = [[m.get(trunk.address, 0) for m in w.moved] for w in fleet.stats().workers]
    if {nbytes for worker in moved for nbytes in worker} - {0, trunk.nbytes}:
        raise SystemExit(f"a trunk of {trunk.nbytes} bytes was moved more than once: {moved}")
    return moved


async def throughput(
    n_workers: int,
    options: argparse.Namespace,
    given: Sequence[Branch],
    expected: Sequence[Told],
) -> dict[str, Any]:
    """Tokens/s of all branches, by so many workers."""
    with started(n_workers, options.lanes) as fleet:
        trunk = await fleet.trunk(PROMPT)
        took = []
        for _ in range(options.repeats):
            began = time.perf_counter()
            found = [r async for r in fleet.rollouts(trunk, given)]
            took.append(time.perf_counter() - began)
            compared(found, expected)
        moved = moved_once(fleet, trunk)
    n_tokens, seconds = sum(len(tokens) for tokens, _ in expected), statistics.median(took)
    return {
        "seconds": [round(s, 2) for s in took],
        "tokens_per_s": round(n_tokens / seconds),
        "trunk_nbytes": trunk.nbytes,
        "trunk_moved": moved,
    }


async def overhead(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a branch of one token: a restore here, and by a worker with one lane, whose
    branches come and go one by one; medians.
    """
    given = [Branch(seed=i, temperature=TEMPERATURE, max_tokens=1) for i in range(SHORT)]
    local, waited, streamed = [], [], []
    with flashrt.load(bundled_checkpoint(), "cpu", max_positions=POSITIONS) as engine:
        session = engine.session()
        session.prefill(PROMPT)
        trunk = session.snapshot()
        for branch in given:
            began = time.perf_counter()
            session.restore(trunk)
            list(session.generate(1, TEMPERATURE, seed=branch.seed))
            session.digest()
            local.append(time.perf_counter() - began)
    with started(1, 1) as fleet:
        there = await fleet.trunk(PROMPT)
        began = time.perf_counter()
        async for _ in fleet.rollouts(there, given, in_flight=1):
            waited.append(time.perf_counter() - began)
            began = time.perf_counter()
        for _ in range(options.repeats):
            began = time.perf_counter()
            async for _ in fleet.rollouts(there, given):
                pass
            streamed.append((time.perf_counter() - began) / SHORT)
    one, alone, among = map(statistics.median, (local, waited, streamed))
    return {
        "local_ms": round(1e3 * one, 2),
        "in_flight_1_ms": round(1e3 * alone, 2),
        "in_flight_4_ms": round(1e3 * among, 2),
        "overhead_alone_ms": round(1e3 * (alone - one), 2),
        "overhead_among_others_ms": round(1e3 * (among - one), 2),
    }


async def with_kills(
    options: argparse.Namespace, given: Sequence[Branch], expected: Sequence[Told]
) -> dict[str, Any]:
    """All branches, while workers are killed at random."""
    chance = random.Random(options.seed)
    at = sorted(chance.sample(range(1, max(len(given) - 100, options.kills + 2)), options.kills))
    n_killed, found = 0, list[Rollout]()
    with started(options.workers, options.lanes) as fleet:
        trunk = await fleet.trunk(PROMPT)
        began = time.perf_counter()
        async for rollout in fleet.rollouts(
            trunk, given, boundary_every=options.boundary_every, in_flight=64
        ):
            found.append(rollout)
            while n_killed < len(at) and len(found) >= at[n_killed]:
                living = [w.state.pid for w in fleet.stats().workers if w.state is not None]
                if not living:  # all of them are being started again
                    break
                os.kill(chance.choice(living), signal.SIGKILL)
                n_killed += 1
        seconds = time.perf_counter() - began
        compared(found, expected)
        moved, restarts = moved_once(fleet, trunk), fleet.stats().restarts
    if n_killed < options.kills:
        raise SystemExit(f"only {n_killed} workers were killed; give more --branches")
    return {
        "seconds": round(seconds, 1),
        "killed": n_killed,
        "restarts": restarts,
        "branches_that_lost_a_worker": sum(r.losses > 0 for r in found),
        "of_those_resumed_from_a_boundary": sum(r.resumed > 0 for r in found),
        "most_losses_of_a_branch": max(r.losses for r in found),
        "trunk_nbytes": trunk.nbytes,
        "trunk_moved": moved,
    }


if __name__ == "__main__":
    main()
