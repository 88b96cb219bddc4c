"""What a control loop knows of itself: one record, the latest ticks, and boundaries to go back to.

IS: the record, swapped as a whole; a ring of past ticks; and which boundary to begin from. IS NOT:
the running of past ticks (loop), or when a boundary is due (loop). It exists because an exception
may fall anywhere: the record is what happened, and any state that it says can be made again from a
boundary and the ticks since. `rewind` is the same, to an earlier tick.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flashrt.capsule.capsule import Capsule
from flashrt.robot.policy import Array

NO_CUT = -1
NOTHING: Array = np.empty(0, np.float32)  # an observation that nothing was made of


class PastTick(NamedTuple):
    """One tick, with all that is needed to run it again."""

    observation: Array  # [observation_dim], or NOTHING
    cut: int  # what the interrupt before it left promised up to; NO_CUT without one
    executed: Array | None  # [action_dim]: executed in place of the policy's own action


class Boundary(NamedTuple):
    """A state before a tick that the lane can be put into."""

    tick: int
    capsule: Capsule | None  # None: the empty state, with `seed`
    seed: int = 0

    @property
    def is_there(self) -> bool:
        """Whether nobody dropped it."""
        return self.capsule is None or not self.capsule.is_dropped


class LoopState(NamedTuple):
    """What happened. Ticks [0, end) since the loop was reset or put elsewhere are its history."""

    origin: Boundary | None = None  # of tick 0; a capsule is the user's, who may drop it
    boundaries: tuple[Boundary, ...] = ()  # capsules of the loop's own, ascending
    end: int = 0
    cut: int = NO_CUT  # of an interrupt since the last tick
    is_slack_done: bool = True
    position: int | None = None  # ticks since the reset; None: the device was not asked yet
    seed: int | None = None  # of the noise of chunks; None likewise
    sent: Array | None = None  # what was executed last, where somebody may ask
    changes: int = 0  # another number after everything that a recording has to know

    def slack_done(self) -> LoopState:
        """The slack after the last tick is over."""
        return LoopState(
            self.origin, self.boundaries, self.end, self.cut, True,
            self.position, self.seed, self.sent, self.changes,
        )  # fmt: skip

    def ticked(self, sent: Array | None, capacity: int) -> LoopState:
        """One more tick. What lies more than `capacity` ticks back is not kept, so boundaries from
        before it are given up.
        """
        assert self.position is not None, "asked for before the tick"
        end, origin, boundaries = self.end + 1, self.origin, self.boundaries
        if end > capacity:
            origin = None
            if boundaries and end - boundaries[0].tick > capacity:
                boundaries = tuple(b for b in boundaries if end - b.tick <= capacity)
        return LoopState(
            origin, boundaries, end, NO_CUT, False,
            self.position + 1, self.seed, sent, self.changes + 1,
        )  # fmt: skip

    def bases(self, tick: int) -> Iterator[Boundary]:
        """Boundaries that tick `tick` can be made again from, the nearest first."""
        for boundary in reversed(self.boundaries):
            if boundary.tick <= tick and boundary.is_there:
                yield boundary
        if self.origin is not None and self.origin.is_there:
            yield self.origin

    def has_base(self, capacity: int) -> bool:
        """Whether the state after one more tick could be made again, whatever the user drops."""
        if self.boundaries:
            return self.end - self.boundaries[-1].tick < capacity
        return self.origin is not None and self.origin.capsule is None and self.end < capacity

    @property
    def first(self) -> int:
        """The oldest tick that can be gone back to; `end` without any boundary."""
        own = [b.tick for b in self.boundaries if b.is_there]
        if self.origin is not None and self.origin.capsule is None:
            own.append(0)
        return min(own, default=self.end)


class History:
    """The latest ticks, by number. A slot is written before the record says that it counts."""

    def __init__(self, capacity: int) -> None:
        """Keeps `capacity` ticks, and one that has not happened yet."""
        self.capacity = capacity
        self._ticks: list[PastTick] = []  # tick t at t % (capacity + 1)

    def put(self, tick: int, past: PastTick) -> None:
        """Tick `tick` is this; the one before was put already."""
        at = tick % (self.capacity + 1)
        if at < len(self._ticks):
            self._ticks[at] = past
        else:
            self._ticks.append(past)

    def past_tick(self, tick: int) -> PastTick:
        """Tick `tick`, one of the latest."""
        return self._ticks[tick % (self.capacity + 1)]
