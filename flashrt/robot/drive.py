"""A lane of a policy engine, and the schedule that is kept in step with it.

IS: the engine's verbs in the order that the schedule says. IS NOT: boundaries, deadlines or
history; see control. Called by: control.
"""

from __future__ import annotations

from flashrt.capsule.capsule import Capsule
from flashrt.robot.history import NO_CUT, History, Told
from flashrt.robot.policy import Array, Policy
from flashrt.robot.schedule import Schedule


class Drive:
    """One lane, driven. An interruption between two graphs loses no more than the schedule, which
    is read back from the lane.
    """

    def __init__(self, engine: Policy, overlap: int) -> None:
        """Takes a free lane. Raises LaneBusy."""
        config = engine.config
        self.engine = engine
        self.lane = engine.take_lane()
        self._schedule = Schedule(
            config.chunk_size, config.n_action_steps, config.num_inference_steps, overlap
        )
        self._is_known = False  # whether the schedule is the lane's

    @property
    def schedule(self) -> Schedule:
        """Not to be changed by others."""
        if not self._is_known:
            self._schedule.read(self.engine.cursor(self.lane))
            self._is_known = True
        return self._schedule

    def step(self, observation: Array) -> Array:
        """One tick: its action, float32 [action_dim]."""
        engine, lane, schedule = self.engine, self.lane, self.schedule
        self._is_known = False
        if schedule.has_run_out:
            engine.observe(lane, observation)
            engine.plan(lane, 0)
            schedule.planned(schedule.tick, 0)
            action = engine.act(lane)
        else:
            action = engine.tick(lane, observation)
        schedule.acted()
        self._is_known = True
        return action

    def plan_ahead(self) -> bool:
        """The part of a plan that is due in the slack; whether there was one."""
        engine, lane, schedule = self.engine, self.lane, self.schedule
        committed = schedule.committed
        if not committed and not schedule.steps_left:
            return False
        self._is_known = False
        if committed == 1:  # this slack is all there is
            engine.plan(lane, 1)
            schedule.planned(schedule.observed, 1)
        else:
            if committed:
                engine.begin_plan(lane, committed)
                schedule.began()
            for _ in range(schedule.slices):
                engine.continue_plan(lane)
                schedule.stepped()
        self._is_known = True
        return True

    def cut(self, stop: int) -> int:
        """Promise nothing from tick `stop` on; what is promised up to, which may be less."""
        schedule = self.schedule
        self._is_known = False
        schedule.cut(stop)
        self.engine.cut(self.lane, schedule.stop)
        self._is_known = True
        return schedule.stop

    def tell_again(self, told: Told) -> Array:
        """A tick of a history, the interrupt before it and its slack included; what was executed,
        float32 [action_dim].
        """
        if told.cut != NO_CUT:
            self.cut(told.cut)
        action = self.step(told.observation)
        if told.executed is not None:
            action = told.executed
            self.engine.override(self.lane, action)
        self.plan_ahead()
        return action

    def reset(self, seed: int) -> None:
        """To the empty state."""
        self._is_known = False
        self.engine.reset(self.lane, seed)

    def restore(self, capsule: Capsule) -> None:
        """To a capsule's. Raises CapsuleError."""
        self.engine.restore(self.lane, capsule)
        self._is_known = False

    def copy(self, other: Drive) -> None:
        """To the present state of another lane."""
        self.engine.fork(other.lane, self.lane)
        self._is_known = False

    def give_back(self, history: History) -> None:
        """The lane, and what boundaries there are."""
        history.clear()
        self.engine.release(self.lane)
