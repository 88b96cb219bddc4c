"""Rollouts: an environment and a control loop in step, saved together, forked together.

IS: the pairing of an environment's state with a capsule: a policy alone cannot go back, its world
must, too. IS NOT: an environment, nor how one is saved (environment), nor a run by the clock (run).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashrt.base.errors import EnvironmentFailed
from flashrt.capsule.capsule import Capsule
from flashrt.robot.environment import (
    Environment,
    EnvironmentState,
    PlainState,
    command_for,
    reset_environment,
    step_environment,
)
from flashrt.robot.loop import ControlLoop
from flashrt.robot.options import checked_seed
from flashrt.robot.policy import Array


@dataclass(frozen=True, slots=True)
class Transition:
    """One step: what was seen, done, and what came of it."""

    observation: Array
    action: Array
    reward: float
    following: Array  # the observation after it
    is_over: bool  # terminated or truncated
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """The state of an environment and of its loop at one boundary."""

    capsule: Capsule
    environment: object
    observation: Array
    is_over: bool

    def drop(self) -> None:
        """Give the capsule's memory back."""
        self.capsule.drop()


class Rollout:
    """An environment and a control loop, in step. A fork forks both."""

    def __init__(
        self,
        make: Callable[[], Environment],
        loop: ControlLoop,
        save: Callable[[Any], EnvironmentState] = PlainState,
    ) -> None:
        """`make` makes an environment: one now, and one for each fork. `save` gives access to its
        state; the default is for environments made of plain data.
        """
        self.environment = make()
        self.loop = loop
        self._make, self._save = make, save
        self._state = save(self.environment)
        self._to_command = command_for(self.environment)
        self._observation: Array | None = None  # None: not begun
        self._is_over = False
        self._is_closed = False

    @property
    def observation(self) -> Array:
        """What is seen now. Raises EnvironmentFailed before the first reset."""
        self._check_open()
        if self._observation is None:
            raise EnvironmentFailed("the rollout has not begun; call reset first")
        return self._observation

    @property
    def is_over(self) -> bool:
        """Whether the episode ended."""
        return self._is_over

    def reset(self, seed: int = 0) -> Array:
        """Begin an episode of both; the first observation.

        Raises EnvironmentFailed when the environment fails: the loop is then where it was before.
        """
        self._check_open()
        seed = checked_seed(seed)
        observation = reset_environment(self.environment, seed)
        self.loop.reset(seed)
        self._observation, self._is_over = observation, False
        return observation

    def step(self) -> Transition:
        """One tick of the loop and one step of the environment.

        Raises EnvironmentFailed when the environment is closed or fails, or the episode is over,
        ObservationError for an observation that the policy cannot take: the loop is then where it
        was before.
        """
        observation = self.observation
        if self._is_over:
            raise EnvironmentFailed("the episode is over; reset the rollout, or restore a moment")
        action = self.loop.tick(observation)
        try:
            result = step_environment(self.environment, self._to_command, action)
        except BaseException:
            self.loop.rewind_ticks(1)  # the environment did not take the action
            raise
        self._observation, self._is_over = result.observation, result.is_over
        self.loop.slack()
        return Transition(
            observation, action, result.reward, result.observation, result.is_over, result.info
        )

    def snapshot(self, name: str | None = None) -> Moment:
        """Both, frozen. Raises PoolFull; EnvironmentFailed if the environment cannot be saved."""
        observation = self.observation
        state = self._state.save_state()
        return Moment(self.loop.snapshot(name), state, observation, self._is_over)

    def restore(self, moment: Moment) -> None:
        """Both, back to a moment; of a fork's, or of this rollout's own.

        Raises CapsuleError for a dropped or foreign capsule; nothing has changed then.
        """
        self._check_open()
        self.loop.restore(moment.capsule)
        self._state.load_state(moment.environment)
        self._observation, self._is_over = moment.observation, moment.is_over

    def fork(self, n: int = 1, seeds: Sequence[int] | None = None) -> list[Rollout]:
        """`n` more rollouts in this one's state, each with an environment of its own; `seeds` as in
        ControlLoop.fork. Raises LaneBusy, and makes none, when lanes are short.
        """
        observation, state = self.observation, self._state.save_state()
        loops = self.loop.fork(n, seeds)
        rollouts: list[Rollout] = []
        try:
            for loop in loops:
                other = Rollout(self._make, loop, self._save)
                reset_environment(other.environment, 0)
                other._state.load_state(state)
                other._observation, other._is_over = observation, self._is_over
                rollouts.append(other)
        except BaseException:
            for loop in loops:
                loop.close()
            raise
        return rollouts

    def close(self) -> None:
        """Close the environment and the loop. A second close does nothing."""
        if not self._is_closed:
            self._is_closed = True
            try:
                self.environment.close()
            finally:
                self.loop.close()

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EnvironmentFailed("the rollout's environment is closed; make another rollout")
