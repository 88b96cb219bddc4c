"""The latest ticks of a control loop, and boundaries to go back to.

IS: a ring of ticks (observation, interrupt, what was executed in place of a late action) in arrays
allocated once, and a ring of automatic capsules. IS NOT: the rule when a boundary is due (loop).

A boundary is a capsule taken before a tick; the ticks from there on can be run again, exactly. This
is what `rewind` is made of.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from flashrt.capsule.capsule import Capsule
from flashrt.robot.policy import Array

NO_CUT = -1


@dataclass(frozen=True, slots=True)
class PastTick:
    """One tick, with all that is needed to run it again."""

    observation: Array  # [observation_dim], a view
    cut: int  # what the interrupt before it left promised up to; NO_CUT without one
    executed: Array | None  # [action_dim]: executed in place of the policy's own action


class History:
    """Ticks [first, end) since the loop last began or was put elsewhere, numbered from 0."""

    def __init__(self, capacity: int, observation_dim: int, action_dim: int) -> None:
        self._observations = np.zeros((capacity, observation_dim), np.float32)
        self._executed = np.zeros((capacity, action_dim), np.float32)
        self._is_override = np.zeros(capacity, np.bool_)
        self._cuts = np.full(capacity, NO_CUT, np.int64)
        self.capacity = capacity
        self.boundaries: deque[tuple[int, Capsule]] = deque()  # (tick, capsule), ascending
        self.end = 0
        self._pending_cut = NO_CUT

    @property
    def first(self) -> int:
        """The oldest tick that can be gone back to; `end` without any boundary."""
        return self.boundaries[0][0] if self.boundaries else self.end

    def cut(self, stop: int) -> None:
        """An interrupt before the coming tick."""
        self._pending_cut = stop

    def add(self, observation: Array) -> None:
        """One more tick; the oldest is overwritten, and boundaries before it are of no use."""
        at = self.end % self.capacity
        self._observations[at] = observation
        self._cuts[at] = self._pending_cut
        self._is_override[at] = False
        self._pending_cut = NO_CUT
        self.end += 1
        self._prune()

    def override(self, executed: Array) -> None:
        """In the last tick something else than the policy's action was executed."""
        at = (self.end - 1) % self.capacity
        self._executed[at], self._is_override[at] = executed, True

    def past_tick(self, tick: int) -> PastTick:
        """Tick `tick`, of [first, end)."""
        at = tick % self.capacity
        executed = self._executed[at] if self._is_override[at] else None
        return PastTick(self._observations[at], int(self._cuts[at]), executed)

    def keep(self, capsule: Capsule) -> None:
        """A boundary before the coming tick; those that lead nowhere any more are dropped."""
        self.boundaries.append((self.end, capsule))
        self._prune()

    def forget_oldest(self) -> bool:
        """Give the oldest boundary's memory back; False when there is none."""
        if not self.boundaries:
            return False
        self.boundaries.popleft()[1].drop()
        return True

    def at_or_before(self, tick: int) -> tuple[int, Capsule]:
        """The latest boundary at or before `tick`, which is at least `first`."""
        return next(b for b in reversed(self.boundaries) if b[0] <= tick)

    def cut_back(self, tick: int) -> None:
        """Ticks from `tick` on did not happen."""
        while self.boundaries and self.boundaries[-1][0] > tick:
            self.boundaries.pop()[1].drop()
        self.end = tick
        self._pending_cut = NO_CUT

    def clear(self) -> None:
        """Nothing happened yet."""
        while self.forget_oldest():
            pass
        self.end = 0
        self._pending_cut = NO_CUT

    def _prune(self) -> None:
        while self.boundaries and self.end - self.boundaries[0][0] > self.capacity:
            self.forget_oldest()
