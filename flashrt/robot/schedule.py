"""When to plan: the schedule of a control loop, a pure function of a lane's cursor.

IS: the host's copy of the few words of the cursor that decide what is due, and the rule. IS NOT:
state of its own: it is read back from the lane after a restore, so a capsule needs no company.
Called by: control.

A chunk planned from the observation of tick t has its row j for tick t + j. With tick n to come and
the actions promised up to `stop`, exclusive:

    before the action of tick n    n >= stop            plan from this tick's observation, at once
    in the slack after tick t      stop - t <= overlap  plan; rows [0, stop - t) are as promised

The second is real-time chunking (Black, Galliker, Levine 2025) by conditioning on the committed
prefix (Black, Ren, Equi, Levine 2025). Neither looks at a clock: results do not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Cursor(Protocol):
    """What the rule needs of a lane's cursor; see the policy engine."""

    @property
    def tick(self) -> int:
        """Actions taken since the reset; the number of the tick to come."""
        ...

    @property
    def observed(self) -> int:
        """Tick of the last observation; -1: none since the reset or since an interrupt."""
        ...

    @property
    def stop(self) -> int:
        """The first tick that no action is promised for."""
        ...

    @property
    def seed(self) -> int:
        """Of the noise of plans, with the tick."""
        ...

    @property
    def plan_tick(self) -> int:
        """Tick whose observation the plan in the making is for, or was."""
        ...

    @property
    def plan_steps_left(self) -> int:
        """Euler steps until it is done; 0: none is in the making."""
        ...


@dataclass(slots=True)
class Schedule:
    """Words of a cursor, kept in step with the lane's; the constants of a policy and of its loop.

    overlap is in [0, min(n_action_steps, chunk_size - n_action_steps)] ticks.
    """

    chunk_size: int
    n_action_steps: int
    n_euler_steps: int
    overlap: int
    tick: int = 0
    observed: int = -1
    stop: int = 0
    plan_tick: int = -1
    steps_left: int = 0

    def read(self, cursor: Cursor) -> None:
        """Take over what a lane says."""
        self.tick, self.observed, self.stop = cursor.tick, cursor.observed, cursor.stop
        self.plan_tick, self.steps_left = cursor.plan_tick, cursor.plan_steps_left

    @property
    def has_run_out(self) -> bool:
        """Whether nothing is promised for the tick to come."""
        return self.tick >= self.stop

    @property
    def committed(self) -> int:
        """Rows promised to a plan that begins in this slack; 0: none is due."""
        if self.steps_left or self.observed < 0 or self.observed != self.tick - 1:
            return 0
        left = self.stop - self.observed
        return left if 1 <= left <= self.overlap else 0

    @property
    def slices(self) -> int:
        """Euler steps for this slack: what is left, spread evenly over the slacks left."""
        slacks = max(1, self.stop - self.tick + 1)
        return -(-self.steps_left // slacks)

    def acted(self) -> None:
        """A tick was observed and acted upon."""
        self.observed = self.tick
        self.tick += 1

    def began(self) -> None:
        """A plan was begun in the slack."""
        self.plan_tick, self.steps_left = self.observed, self.n_euler_steps

    def stepped(self) -> None:
        """An Euler step was done; the last one puts the plan into force."""
        self.steps_left -= 1
        if self.steps_left == 0:
            self.planned(self.plan_tick, self.stop - self.plan_tick)

    def planned(self, tick: int, committed: int) -> None:
        """A plan from the observation of `tick` is in force."""
        self.plan_tick = tick
        self.stop = tick + min(committed + self.n_action_steps, self.chunk_size)

    def cut(self, stop: int) -> None:
        """Nothing is promised from `stop` on, nor may a plan use what was seen so far."""
        self.stop = min(self.stop, stop)
        self.observed, self.steps_left = -1, 0
