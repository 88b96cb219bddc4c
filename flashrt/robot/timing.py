"""Time in a control loop: pacing by absolute deadlines, and what ticks took.

IS: a pace that does not drift, and samples in arrays that are allocated once. IS NOT: anything that
results depend on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CAPACITY = 1 << 16  # samples kept of each series: the latest
_SPIN_NS = 100_000  # of a wait that is spent looking at the clock: a sleep may end later than asked
QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


class Samples:
    """The latest durations of one kind, in nanoseconds; `add` allocates nothing."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._ns = np.zeros(capacity, np.int64)
        self.count = 0  # of all that were ever added

    def add(self, duration_ns: int) -> None:
        """One more."""
        self._ns[self.count % len(self._ns)] = duration_ns
        self.count += 1

    def clear(self) -> None:
        """Forget all."""
        self.count = 0

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Those kept, in seconds, in no particular order once the oldest were overwritten."""
        kept = self._ns[: min(self.count, len(self._ns))]
        return np.multiply(kept, 1e-9, dtype=np.float64)

    def quantiles(self, what: str) -> dict[str, float]:
        """`{what}_p50_s`, p99, p999 and max: nearest rank, so each is a sample; empty without
        any.
        """
        values = np.sort(self.seconds)
        if not len(values):
            return {}
        ranks = {n: min(len(values) - 1, int(q * len(values))) for n, q in QUANTILES.items()}
        found = {f"{what}_{name}_s": float(values[at]) for name, at in ranks.items()}
        return found | {f"{what}_max_s": float(values[-1])}


class LoopTiming:
    """What a loop did, how long it took, and what its engine did besides since this was made."""

    FROZEN = ("allocations", "captures", "compilations")  # counters that a sealed engine keeps

    def __init__(self, engine_stats: Callable[[], Mapping[str, Any]]) -> None:
        self._engine_stats = engine_stats
        self._before = engine_stats()
        self.ticks = self.misses = self.overruns = 0
        self.latency = Samples()  # from the call of a tick to its action
        # Of a slack in which something was planned. A device may still be at it afterwards: then
        # this is the time that the launches took.
        self.planning = Samples()
        self.lateness = Samples()  # of the start of a tick, where a run paces it

    def summary(self) -> dict[str, Any]:
        """Counts, quantiles in seconds, and what the counters moved by."""
        now = self._engine_stats()
        return {
            "ticks": self.ticks,
            "misses": self.misses,
            "overruns": self.overruns,
            **self.latency.quantiles("latency"),
            **self.planning.quantiles("planning"),
            **self.lateness.quantiles("lateness"),
            **{name: now[name] - self._before[name] for name in self.FROZEN},
        }


@dataclass(slots=True)
class Pace:
    """Instants a fixed period apart, from an absolute origin: a late tick delays no later one.

    A tick that took longer than the period leaves out the instants that it missed.
    """

    period_ns: int
    due_ns: int = -1

    def wait(self) -> int:
        """Sleep until the next instant, `due_ns`; how late this is, in nanoseconds."""
        now = time.perf_counter_ns()
        if self.due_ns < 0:
            self.due_ns = now
        if self.due_ns - now > _SPIN_NS:
            time.sleep((self.due_ns - now - _SPIN_NS) * 1e-9)
        while (now := time.perf_counter_ns()) < self.due_ns:
            pass
        return now - self.due_ns

    def advance(self) -> int:
        """On to the next instant that has not passed; how many were left out."""
        self.due_ns += self.period_ns
        late_ns = time.perf_counter_ns() - self.due_ns
        skipped = max(0, late_ns) // self.period_ns
        self.due_ns += skipped * self.period_ns
        return int(skipped)
