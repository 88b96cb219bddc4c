"""Rollouts: an environment and a control loop in step, saved together, forked together.

IS: the pairing of an environment's state with a capsule: a policy alone cannot go back, its world
must, too. IS NOT: an environment, nor how one is saved (environment), nor a run by the clock (run).

An environment cannot be asked whether a step was taken. So when a call of the rollout does not end,
the loop goes back where the environment surely stands still; else the rollout says that the two are
apart, until it is reset or a moment is restored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flashrt.base.checks import shown
from flashrt.base.errors import EnvironmentFailed, SessionError
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.turn import Turn, exclusive
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
from flashrt.robot.policy import Array, packing
from flashrt.robot.together import slack_together, tick_together


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


class _Seen(NamedTuple):
    """What the environment showed last; swapped as a whole."""

    observation: Array | None  # None: not begun
    is_over: bool


class Rollout:
    """An environment and a control loop, in step. A fork forks both. Not for two threads at once:
    an environment is none's to share.
    """

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
        self._pack = packing(loop.engine)
        self._seen = _Seen(None, False)
        self._acting_from: int | None = None  # a tick that the loop may be ahead by
        self._is_apart = False  # the environment may be elsewhere than the loop
        self._is_closed = False

    @property
    def turn(self) -> Turn:
        """The engine's."""
        return self.loop.turn

    @property
    def lock(self) -> Any:
        """The loop's."""
        return self.loop.lock

    @property
    def observation(self) -> Array:
        """What is seen now. Raises EnvironmentFailed before the first reset, and where environment
        and loop are apart.
        """
        self._check_open()
        if self._is_apart:
            raise EnvironmentFailed(
                "the rollout was interrupted, and its environment may have moved without the loop; "
                "reset the rollout, or restore a moment"
            )
        if self._seen.observation is None:
            raise EnvironmentFailed("the rollout has not begun; call reset first")
        return self._seen.observation

    @property
    def is_over(self) -> bool:
        """Whether the episode ended."""
        return self._seen.is_over

    def reset(self, seed: int = 0) -> Array:
        """Begin an episode of both; the first observation.

        Raises EnvironmentFailed when the environment fails: the loop is then where it was before,
        and the rollout has to be reset again.
        """
        self._check_open()
        seed = checked_seed(seed)
        self._is_apart = True
        observation = reset_environment(self.environment, seed, self._pack)
        self.loop.reset(seed)
        self._together(observation, is_over=False)
        return observation

    def step(self) -> Transition:
        """One tick of the loop and one step of the environment.

        Raises EnvironmentFailed when the environment is closed or fails, or the episode is over,
        ObservationError for an observation that the policy cannot take, DeadlineMissed: the loop is
        then where it was before.
        """
        observation = self._about_to_step()
        self._acting_from = self.loop.position
        try:
            action = self.loop.tick(observation)
        except Exception:
            self._take_back()
            raise
        transition = self._stepped(observation, action)
        self.loop.slack()
        return transition

    def snapshot(self, name: str | None = None) -> Moment:
        """Both, frozen. Raises PoolFull; EnvironmentFailed if the environment cannot be saved."""
        observation = self._in_step()
        return self._freeze(name, self._state.save_state(), observation)

    def restore(self, moment: Moment) -> None:
        """Both, back to a moment; of a fork's, or of this rollout's own.

        Raises CapsuleError for a dropped or foreign capsule, and what the environment's state
        raises; nothing has changed then.
        """
        self._check_open()
        if not isinstance(moment, Moment):
            raise SessionError(f"restore: {shown(moment)} is not a moment of a rollout")
        self.loop.check_capsule(moment.capsule)
        was_apart, before = self._is_apart, self._saved()
        self._is_apart = True
        try:
            self._state.load_state(moment.environment)
            self.loop.restore(moment.capsule)
        except Exception:
            if before is not None:
                self._state.load_state(before)
                self._is_apart = was_apart
            raise
        self._together(moment.observation, is_over=moment.is_over)

    def fork(self, n: int = 1, seeds: Sequence[int] | None = None) -> list[Rollout]:
        """`n` more rollouts in this one's state, each with an environment of its own; `seeds` as in
        ControlLoop.fork. Raises LaneBusy or PoolFull, and makes none, when lanes or room are short.
        """
        observation, state = self._in_step(), self._state.save_state()
        loops = self.loop.fork(n, seeds)
        rollouts: list[Rollout] = []
        try:
            for loop in loops:
                other = Rollout(self._make, loop, self._save)
                rollouts.append(other)
                reset_environment(other.environment, 0, other._pack)
                other._state.load_state(state)
                other._together(observation, is_over=self._seen.is_over)
        except BaseException:
            for other in rollouts:
                other.close()
            for loop in loops:
                loop.close()
            raise
        return rollouts

    def close(self) -> None:
        """Close the environment and the loop. A second close does nothing."""
        try:
            if not self._is_closed:
                self._is_closed = True
                self.environment.close()
        finally:
            self.loop.close()

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise EnvironmentFailed("the rollout's environment is closed; make another rollout")

    def _in_step(self) -> Array:
        """What every call begins with; what is seen now."""
        observation = self.observation
        self._take_back()
        return observation

    def _about_to_step(self) -> Array:
        """The same for a step: the episode is not over."""
        observation = self._in_step()
        if self._seen.is_over:
            raise EnvironmentFailed("the episode is over; reset the rollout, or restore a moment")
        return observation

    def _stepped(self, observation: Array, action: Array) -> Transition:
        """The environment's part of a step. Raises what is wrong with it, the loop taken back."""
        try:
            self._is_apart = True
            result = step_environment(self.environment, self._to_command, action, self._pack)
        except Exception:
            self._is_apart = False  # the environment did not take the action
            self._take_back()
            raise
        self._together(result.observation, is_over=result.is_over)
        return Transition(
            observation, action, result.reward, result.observation, result.is_over, result.info
        )

    def _together(self, observation: Array, *, is_over: bool) -> None:
        """Environment and loop are in step."""
        self._seen = _Seen(observation, is_over)
        self._acting_from = None
        self._is_apart = False

    def _take_back(self) -> None:
        """The loop's last tick, if there was one that the environment has not seen."""
        if self._acting_from is not None and self.loop.position > self._acting_from:
            self.loop.rewind_ticks(1)
        self._acting_from = None

    def _saved(self) -> object | None:
        """The environment's state, to go back to; None where it cannot be saved any more."""
        try:
            return self._state.save_state()
        except Exception:  # of any kind: it may be broken, which is why a moment is restored
            return None

    @exclusive
    def _freeze(self, name: str | None, state: object, observation: Array) -> Moment:
        return Moment(self.loop.snapshot(name), state, observation, self._seen.is_over)


def step_together(rollouts: Sequence[Rollout]) -> list[Transition]:
    """`step` of several rollouts, whose loops share replays: see `tick_together`. Environments step
    one after another, in this order.

    Raises what `step` raises where a rollout cannot step, and DeadlineMissed: all are then where
    they were before. Where an environment fails, its loop is where it was before, the others have
    stepped, and the first failure is raised, with a note of whose it is.
    """
    for rollout in rollouts:
        if not isinstance(rollout, Rollout):
            raise SessionError(f"step_together: {shown(rollout)} is not a rollout")
    loops = [rollout.loop for rollout in rollouts]
    if len({id(loop) for loop in loops}) < len(loops):
        raise SessionError("step_together: a loop is named twice; fork the rollout first")
    observations = [rollout._about_to_step() for rollout in rollouts]
    transitions: list[Transition] = []
    failures: list[Exception] = []
    moved: list[ControlLoop] = []
    try:
        for rollout in rollouts:
            rollout._acting_from = rollout.loop.position
        actions = tick_together(loops, observations)
    except Exception:
        for rollout in rollouts:
            rollout._take_back()
        raise
    for index, rollout in enumerate(rollouts):
        try:
            transitions.append(rollout._stepped(observations[index], actions[index]))
            moved.append(rollout.loop)
        except Exception as error:
            error.add_note(f"in rollout {index} of step_together; the others have stepped")
            failures.append(error)
    slack_together(moved)
    if failures:
        raise failures[0]
    return transitions
