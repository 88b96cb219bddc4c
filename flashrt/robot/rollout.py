"""Environments beside a control loop: driven together, saved together, forked together.

IS: the gymnasium interface as a protocol, the pairing of an environment's state with a capsule
(`Rollout`), and a saver for environments whose state is plain data. IS NOT: any environment; this
module imports none, and gymnasium only where one of its environments was given. Called by: users,
control_run.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat

import numpy as np

from flashrt.base.errors import EnvironmentFailed, FlashrtError
from flashrt.capsule.capsule import Capsule
from flashrt.robot.environment import EnvironmentState, PlainState
from flashrt.robot.loop import ControlLoop
from flashrt.robot.policy import Array


class Environment(Protocol):
    """A gymnasium environment, or anything that steps like one."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, Mapping[str, Any]]: ...
    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Mapping[str, Any]]: ...
    def close(self) -> None: ...


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
        """Begin an episode of both; the first observation."""
        self._check_open()
        with in_step("reset"):
            observation, _ = self.environment.reset(seed=seed)
        self.loop.reset(seed)
        self._observation, self._is_over = observation_of(observation), False
        return self._observation

    def step(self) -> Transition:
        """One tick of the loop and one step of the environment.

        Raises EnvironmentFailed when the environment is closed or fails, or the episode is over:
        the loop is then where it was before.
        """
        observation = self.observation
        if self._is_over:
            raise EnvironmentFailed("the episode is over; reset the rollout, or restore a moment")
        action = self.loop.tick(observation)
        try:
            with in_step("step"):
                result = self.environment.step(self._to_command(action))
        except BaseException:
            self.loop.rewind_ticks(1)
            raise
        seen, reward, is_terminated, is_truncated, info = result
        self._observation = observation_of(seen)
        self._is_over = bool(is_terminated or is_truncated)
        self.loop.slack()
        return Transition(
            observation, action, float(reward), self._observation, self._is_over, info
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

    def fork(self, n: int = 1, seeds: list[int] | None = None) -> list[Rollout]:
        """`n` more rollouts in this one's state, each with an environment of its own; `seeds` as in
        ControlLoop.fork. Raises LaneBusy, and makes none, when lanes are short.
        """
        observation, state = self.observation, self._state.save_state()
        rollouts: list[Rollout] = []
        for loop in self.loop.fork(n, seeds):
            other = Rollout(self._make, loop, self._save)
            with in_step("reset"):
                other.environment.reset(seed=0)
            other._state.load_state(state)
            other._observation, other._is_over = observation, self._is_over
            rollouts.append(other)
        return rollouts

    def close(self) -> None:
        """Close the environment and the loop. A second close does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self.environment.close()
            self.loop.close()

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EnvironmentFailed("the rollout's environment is closed; make another rollout")


def observation_of(given: Any) -> Array:
    """An environment's observation as float32 [n]: a vector, or arrays by name, in their order."""
    if isinstance(given, Mapping):
        parts = [np.ravel(np.asarray(part, np.float32)) for part in given.values()]
        return np.concatenate(parts)
    return np.array(given, np.float32).ravel()


def command_for(environment: Any) -> Callable[[Array], Any]:
    """What an action is for an environment: an index where its actions are discrete (the policy's
    are one-hot), else an array of the space's shape and dtype, within its bounds.
    """
    if "gymnasium" not in sys.modules:
        return _unchanged
    import gymnasium

    if not isinstance(environment, gymnasium.Env):
        return _unchanged
    space = environment.action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        first = int(space.start)
        return lambda action: first + int(np.argmax(action))
    if isinstance(space, gymnasium.spaces.Box):
        shape, low, high = space.shape, space.low, space.high
        return lambda action: np.clip(action.reshape(shape), low, high).astype(space.dtype)
    raise EnvironmentFailed(f"{environment}: actions of {space} are not served; Box or Discrete")


@contextlib.contextmanager
def in_step(what: str) -> Iterator[None]:
    """What an environment raises becomes EnvironmentFailed."""
    try:
        yield
    except FlashrtError:
        raise
    except Exception as error:
        raise EnvironmentFailed(
            f"the environment failed in {what}: {error!r}; the loop is at the boundary before it"
        ) from error


def _unchanged(action: Array) -> Array:
    return action
