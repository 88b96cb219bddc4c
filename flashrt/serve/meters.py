"""Counters and timings of serving.

IS: plain numbers, added to by the scheduler's thread alone; `copy` may be called by others. IS NOT:
a metrics format.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field

BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
LAST_TURNS = 64


@dataclass(slots=True)
class Histogram:
    """Seconds: `counts[i]` are those up to BOUNDS_S[i], and above the bound before; one count
    more than bounds.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def copy(self) -> Histogram:
        """As it is now."""
        return Histogram(list(self.counts), self.sum_s)


@dataclass(frozen=True, slots=True)
class TurnTiming:
    """One request that ended."""

    ended_at: float  # seconds since the epoch
    owner: str  # its key
    session: str | None
    action: str  # how its lane got to the prompt: continue, rollback, restore or cold
    reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    wait_s: float
    first_token_s: float | None  # since it was submitted
    total_s: float


@dataclass(slots=True)
class Meters:
    """Since the start."""

    asks: int = 0
    refused: int = 0  # the queue was full
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    wait: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    next_token: Histogram = field(default_factory=Histogram)
    turns: deque[TurnTiming] = field(default_factory=lambda: deque(maxlen=LAST_TURNS))

    def copy(self) -> Meters:
        """As they are now."""
        return Meters(
            self.asks, self.refused, self.failed, self.cancelled, self.timed_out,
            self.prompt_tokens, self.cached_tokens, self.generated_tokens, self.steps,
            self.wait.copy(), self.first_token.copy(), self.next_token.copy(),
            deque(list(self.turns), maxlen=LAST_TURNS),
        )  # fmt: skip
