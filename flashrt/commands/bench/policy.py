"""`flashrt bench --policy`: a control loop in real time, and what its boundaries cost.

IS: the paced run with its latency histogram, a close look at a few ticks, restore, snapshot, fork
and rewind, and the checks that decide the exit code; one document. IS NOT: its tables
(report) or its picture (view.ticks).

Observations are drawn beforehand: what is measured is the loop, not an environment. Latency is from
the call of `tick` to its action; lateness is how long after the instant due the call began.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.base.errors import CheckpointError, FlashrtError
from flashrt.base.flags import flags
from flashrt.commands import console
from flashrt.commands.bench.document import (
    BenchOptions,
    check_outputs,
    deliver,
    of_engine,
    opening,
)
from flashrt.commands.bench.report import show_policy
from flashrt.core.backend import Progress
from flashrt.engine.actions import ActionEngine
from flashrt.load import load_policy
from flashrt.robot.loop import ControlLoop
from flashrt.robot.run import collector_waits, run
from flashrt.robot.timing import Pace, Samples
from flashrt.view.ticks import plot
from flashrt.weights.bundled_policies import policy_path
from flashrt.weights.random_policy import SHAPES, write_random_policy

RANDOM = "random-"  # a policy of that name is drawn: random-tiny, random-small, random-base
DEFAULT = "two-doors"
SECONDS, HZ, REPEATS = 60.0, 100.0, 200
MOST_HZ = 1e6  # beyond that a tick is shorter than what the clock can tell
TARGETS = {"latency_p50_s": 1e-3, "latency_p99_s": 3e-3, "restore_p50_s": 50e-6}
REWINDS = (0.1, 0.5, 2.0)  # seconds
LOOK = 3  # chunks to look at closely
EDGES_PER_DECADE = 20
_WARM_TICKS = 200


@dataclass(frozen=True, slots=True)
class PolicyBenchOptions:
    """What to measure: `policy` is a directory, a bundled name, or `random-` and a shape."""

    policy: str = DEFAULT
    device: str = "auto"
    seconds: float = SECONDS
    hz: float = HZ
    repeats: int = REPEATS


class Seen:
    """An environment whose observations were drawn before, and that takes no time."""

    def __init__(self, observation_dim: int) -> None:
        steps = np.random.default_rng(7).normal(size=(4096, observation_dim))
        self.observations = np.tanh(np.cumsum(0.1 * steps, axis=0)).astype(np.float32)
        self._next = 0

    def reset(self, *, seed: int | None = None) -> tuple[Any, Mapping[str, Any]]:
        """From the first observation again."""
        self._next = 0
        return self.observations[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Mapping[str, Any]]:
        """The next observation, whatever the action."""
        self._next = (self._next + 1) % len(self.observations)
        return self.observations[self._next], 0.0, False, False, {}

    def close(self) -> None:
        """Nothing to do."""


def bench_policy(
    options: PolicyBenchOptions, json_path: Path | None, plot_path: Path | None
) -> int:
    """The command. Returns 1 if a state that was restored went on differently, or if something
    allocated, compiled or captured while the loop ran. Raises FlashrtError for a run without a
    tick.
    """
    if not options.seconds * options.hz >= 1:
        raise FlashrtError(f"bench --policy: {options.seconds} s at {options.hz} Hz have no tick")
    check_outputs(json_path, plot_path, svg_is_ours=True)
    path = checkpoint_of(options.policy)
    facts = opening(BenchOptions(checkpoint=path)) | {"model": f"policy {options.policy}"}
    del facts["precision"]
    engine = load_policy(path, device=options.device, lanes=2)
    if engine.observation_names():
        engine.close()
        raise FlashrtError("bench --policy makes up vectors; this policy's observations have names")
    with console.progress_bars() as progress:
        document = {**facts, **of_engine(engine), **measure(engine, options, progress)}
    engine.close()
    deliver(document, json_path, show_policy, plot_path, plot)
    return 0 if document["is_exact"] and document["is_steady"] else 1


def measure(
    engine: ActionEngine, options: PolicyBenchOptions, progress: Progress
) -> dict[str, Any]:
    """All figures. Times in seconds."""
    seen, hz = Seen(engine.config.observation_dim), options.hz
    with ControlLoop(engine, hz, deadline_ms=1e3 / hz, on_miss="last") as loop:
        for i in range(_WARM_TICKS):
            loop.tick(seen.observations[i])
        ran = _run(loop, seen, options.seconds, progress)
        latencies = loop.timing.latency.seconds
        look = _look(loop, seen)
        is_exact = _is_exact(loop, seen)
        boundaries = _boundaries(loop, seen, options.repeats)
        counters = loop.stats()
    steady = {name: int(counters[name]) for name in ("allocations", "captures", "compilations")}
    figures = {**ran, **boundaries}
    return {
        "policy": _shape(engine),
        "hz": hz,
        "seconds": options.seconds,
        "repeats": options.repeats,
        **figures,
        **steady,
        "is_steady": not any(steady.values()),
        "is_exact": is_exact,
        "targets": {name: [limit, figures[name] < limit] for name, limit in TARGETS.items()},
        "histogram": histogram(latencies),
        "look": look,
    }


def checkpoint_of(policy: str) -> Path:
    """The directory of a policy. Raises CheckpointError for a name that is not known."""
    shape = policy.removeprefix(RANDOM)
    if policy == shape or shape not in SHAPES:
        try:
            return policy_path(policy)
        except CheckpointError as error:
            names = ", ".join(f"{RANDOM}{shape}" for shape in SHAPES)
            raise CheckpointError(f"{error}, {names}") from error
    path = flags().cache_dir / "checkpoints" / f"policy-{policy}-seed0"
    try:
        return path if path.is_dir() else write_random_policy(path, shape)
    except CheckpointError:
        if not path.is_dir():  # else another process was first, with the same bytes
            raise
        return path


def histogram(latencies: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, list[float]]:
    """Counts between edges that are evenly spaced on a logarithmic scale, in seconds."""
    decades = np.log10([latencies.min(), latencies.max()]) * EDGES_PER_DECADE
    first, last = int(np.floor(decades[0])), int(np.floor(decades[1])) + 1
    edges = 10.0 ** (np.arange(first, last + 1) / EDGES_PER_DECADE)
    counts, _ = np.histogram(latencies, edges)
    return {"edges_s": edges.tolist(), "counts": counts.tolist()}


def _run(loop: ControlLoop, seen: Seen, seconds: float, progress: Progress) -> dict[str, Any]:
    """In real time, as `robot.run` does it."""
    for samples in (loop.timing.latency, loop.timing.planning, loop.timing.lateness):
        samples.clear()
    loop.timing.ticks = loop.timing.misses = loop.timing.overruns = 0
    progress(f"running for {seconds:g} s", 0, 0)
    report = run(loop, seen, seconds)
    kept = ("ticks", "misses", "overruns")
    return {
        name: value
        for name, value in report.stats.items()
        if name in kept or name.startswith(("latency", "planning", "lateness"))
    }


def _look(loop: ControlLoop, seen: Seen) -> list[dict[str, float]]:
    """A few chunks of ticks at pace, with the time of each part since the instant due; those of one
    chunk before are not looked at.
    """
    pace, rows = Pace(int(1e9 / loop.options.hz)), []
    n_steps = loop.engine.config.n_action_steps
    loop.slack()
    with collector_waits():
        for i in range((LOOK + 1) * n_steps):
            pace.wait()
            before = loop.timing.planning.count
            started_ns = time.perf_counter_ns()
            loop.tick(seen.observations[i])
            acted_ns = time.perf_counter_ns()
            loop.slack()
            settled_ns = time.perf_counter_ns()
            rows.append(
                {
                    "tick": loop.position - 1,
                    "started_s": (started_ns - pace.due_ns) * 1e-9,
                    "acted_s": (acted_ns - pace.due_ns) * 1e-9,
                    "settled_s": (settled_ns - pace.due_ns) * 1e-9,
                    "is_planned": loop.timing.planning.count > before,
                }
            )
            pace.advance()
    return rows[n_steps:]


def _is_exact(loop: ControlLoop, seen: Seen) -> bool:
    """Whether what was restored goes on as what was never left; in between it went elsewhere."""
    capsule = loop.snapshot()
    first = _went(loop, seen.observations[:100])
    _went(loop, seen.observations[100:150])
    loop.restore(capsule)
    second = _went(loop, seen.observations[:100])
    loop.rewind_ticks(60)
    third = _went(loop, seen.observations[40:100])
    capsule.drop()
    return first == second and third[1] == first[1] and third[0] == first[0][40:]


def _went(loop: ControlLoop, observations: Any) -> tuple[list[bytes], str]:
    actions = [loop.tick(observation).tobytes() for observation in observations]
    return actions, loop.digest()


def _boundaries(loop: ControlLoop, seen: Seen, repeats: int) -> dict[str, Any]:
    """Restore, snapshot, fork onto a lane that is there, each after a tick; rewind by distance."""
    restore, snapshot, fork, base = Samples(), Samples(), Samples(), loop.snapshot()
    with loop.fork()[0] as other, collector_waits():
        for i in range(repeats):
            _went(loop, seen.observations[i % 97 : i % 97 + 2])
            loop.slack()
            snapshot_ns = time.perf_counter_ns()
            capsule = loop.snapshot()
            fork_ns = time.perf_counter_ns()
            other.adopt(loop)
            restore_ns = time.perf_counter_ns()
            loop.restore(base)
            end_ns = time.perf_counter_ns()
            capsule.drop()
            snapshot.add(fork_ns - snapshot_ns)
            fork.add(restore_ns - fork_ns)
            restore.add(end_ns - restore_ns)
    base.drop()
    return {
        **restore.quantiles("restore"),
        **snapshot.quantiles("snapshot"),
        **fork.quantiles("fork"),
        "rewind": [_rewind(loop, seen, seconds, max(5, repeats // 10)) for seconds in REWINDS],
    }


def _rewind(loop: ControlLoop, seen: Seen, seconds: float, repeats: int) -> dict[str, float]:
    samples, ticks = Samples(), round(seconds * loop.options.hz)
    loop.reset()
    for i in range(ticks + loop.options.boundary_ticks):
        loop.tick(seen.observations[i % len(seen.observations)])
    with collector_waits():
        for i in range(repeats):
            loop.slack()
            started_ns = time.perf_counter_ns()
            loop.rewind(seconds)
            samples.add(time.perf_counter_ns() - started_ns)
            for j in range(ticks + i % 3):  # from everywhere between two boundaries
                loop.tick(seen.observations[j % len(seen.observations)])
    return {"seconds": seconds, **samples.quantiles("rewind")}


def _shape(engine: ActionEngine) -> dict[str, int]:
    c, stats = engine.config, engine.stats()
    return {
        "observation_dim": c.observation_dim,
        "action_dim": c.action_dim,
        "chunk_size": c.chunk_size,
        "n_action_steps": c.n_action_steps,
        "num_inference_steps": c.num_inference_steps,
        "capsule_bytes": stats["fixed_bytes"],
        "graphs": stats["graphs"],
    }
