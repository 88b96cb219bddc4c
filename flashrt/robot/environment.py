"""Environments: what a loop needs of one, what it hands in and out, and the saver of plain ones.

IS: the gymnasium interface as a protocol, checked calls of it, and `PlainState`: a copy of every
attribute that is plain data, of an environment and of the wrappers around it. IS NOT: any
environment, nor a saver for simulators that keep their state elsewhere (MuJoCo, Box2D): those need
an EnvironmentState of their own. gymnasium is imported only for an environment of its own.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import logging
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, SupportsFloat

import numpy as np

from flashrt.base.checks import shown
from flashrt.base.errors import EnvironmentFailed, FlashrtError, ObservationError
from flashrt.base.messages import listed
from flashrt.engine.numbers import as_array
from flashrt.robot.policy import Array

_SCALARS = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum)
_CODE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_STATELESS = ("gymnasium.spaces.", "gymnasium.envs.registration", "gymnasium.logger", "pygame")


class Environment(Protocol):
    """A gymnasium environment, or anything that steps like one."""

    def reset(self, *, seed: int | None = None) -> tuple[Any, Mapping[str, Any]]: ...
    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, Mapping[str, Any]]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an environment's step came to."""

    observation: Array  # the one after it
    reward: float
    is_over: bool  # terminated or truncated
    info: Mapping[str, Any]


Pack = Callable[[Mapping[str, Any]], Array]  # arrays by name, as a policy has them, to a vector


def reset_environment(environment: Environment, seed: int, pack: Pack | None = None) -> Array:
    """The first observation of an episode, float32 [n]; `pack` makes it of arrays by name.

    Raises EnvironmentFailed when the environment raises, or returns no pair (observation, info).
    """
    with _guard("reset"):
        result: object = environment.reset(seed=seed)
        is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)
        if not isinstance(result, tuple) or not is_pair:
            raise EnvironmentFailed(
                f"the environment's reset returned {_form(result)}; a pair (observation, info) is "
                "needed, as gymnasium's environments return it"
            )
        return observation_of(result[0], pack)


def step_environment(
    environment: Environment,
    to_command: Callable[[Array], Any],
    action: Array,
    pack: Pack | None = None,
) -> StepResult:
    """One step with what `to_command` makes of an action.

    Raises EnvironmentFailed when the environment raises, or returns anything but (observation,
    reward, terminated, truncated, info) with a finite reward; ObservationError for an observation
    that is no array of numbers.
    """
    with _guard("step"):
        result: object = environment.step(to_command(action))
        if not isinstance(result, tuple | list) or len(result) != 5:
            is_old = isinstance(result, tuple | list) and len(result) == 4
            old = ": an old gym environment, which gymnasium's compatibility wrapper serves"
            raise EnvironmentFailed(
                f"the environment's step returned {_form(result)}{old if is_old else ''}; needed "
                "are five values: observation, reward, terminated, truncated, info"
            )
        seen, reward, is_terminated, is_truncated, info = result
        return StepResult(
            observation_of(seen, pack), _reward(reward), bool(is_terminated or is_truncated), info
        )


def observation_of(given: Any, pack: Pack | None = None) -> Array:
    """An environment's observation as float32 [n]: a vector, or arrays by name: as `pack` has them,
    or else in their order.

    Raises ObservationError for what holds anything but numbers.
    """
    if isinstance(given, Mapping):
        if pack is not None:
            return pack(given)
        parts = [_numbers(f"observation[{name!r}]", part) for name, part in given.items()]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return _numbers("observation", given)


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


class EnvironmentState(Protocol):
    """Access to all that decides how an environment goes on."""

    def save_state(self) -> object:
        """A copy. Raises EnvironmentFailed when that cannot be done."""
        ...

    def load_state(self, state: object) -> None:
        """Put back what `save_state` returned, here or on another environment of the kind."""
        ...


class PlainState:
    """The attributes of an environment, and of its wrappers (each has the next in `env`): numbers,
    text, arrays, random generators, and lists, tuples, sets and dicts of these.

    That is all there is to gymnasium's classic control, toy text, and most environments written in
    numpy. Spaces, specs and drawing surfaces are left where they are; anything else is refused.
    """

    def __init__(self, environment: Any) -> None:
        self._layers = layers(environment)

    def save_state(self) -> object:
        """See EnvironmentState."""
        return [_saved(layer) for layer in self._layers]

    def load_state(self, state: object) -> None:
        """See EnvironmentState."""
        if not isinstance(state, list) or len(state) != len(self._layers):
            raise EnvironmentFailed(
                f"the state is not one of an environment of {len(self._layers)} layers"
            )
        for layer, saved in zip(self._layers, state, strict=True):
            _load(layer, saved)


def layers(environment: Any) -> list[Any]:
    """A wrapped environment from the outside in."""
    found = [environment]
    while "env" in vars(found[-1]):
        found.append(vars(found[-1])["env"])
    return found


def _saved(layer: Any) -> dict[str, Any]:
    own = {name: value for name, value in vars(layer).items() if name != "env"}
    odd = [f"{n} ({type(v).__name__})" for n, v in own.items() if not _is_known(v)]
    if odd:
        raise EnvironmentFailed(
            f"{type(layer).__name__} cannot be saved as plain data because of {listed(odd)}; "
            "give Rollout an EnvironmentState that saves it"
        )
    return {name: copy.deepcopy(value) for name, value in own.items() if _is_state(value)}


def _load(layer: Any, saved: Mapping[str, Any]) -> None:
    attributes = vars(layer)
    for name in [n for n, v in attributes.items() if n != "env" and n not in saved]:
        if _is_state(attributes[name]):
            del attributes[name]
    attributes.update(copy.deepcopy(dict(saved)))


def _is_known(value: Any) -> bool:
    return _is_state(value) or _is_stateless(value)


def _is_state(value: Any) -> bool:
    """Plain data: what decides how the environment goes on."""
    if isinstance(value, Mapping):
        return all(_is_state(k) and _is_state(v) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_state(v) for v in value)
    if isinstance(value, np.ndarray):
        return bool(value.dtype != object)
    return isinstance(value, (*_SCALARS, np.random.Generator, np.random.RandomState))


def _is_stateless(value: Any) -> bool:
    """Code, descriptions and drawings."""
    if isinstance(value, list | tuple | set):
        return all(_is_known(v) for v in value)
    if isinstance(value, Mapping):
        return all(_is_known(v) for v in value.values())
    module = f"{type(value).__module__}."
    return isinstance(value, (*_CODE, logging.Logger)) or module.startswith(_STATELESS)


@contextlib.contextmanager
def _guard(what: str) -> Iterator[None]:
    """What an environment raises becomes EnvironmentFailed."""
    try:
        yield
    except FlashrtError:
        raise
    except Exception as error:
        raise EnvironmentFailed(
            f"the environment failed in {what}: {error!r}; the loop is at the boundary before it"
        ) from error


def _form(result: object) -> str:
    """What kind of thing was returned, for an error."""
    if isinstance(result, tuple | list):
        return f"a {type(result).__name__} of {len(result)} values"
    return f"one {type(result).__name__}"


def _numbers(what: str, given: Any) -> Array:
    array = as_array(what, given)
    if array.dtype.kind not in "fiub":
        raise ObservationError(
            f"{what}: a {type(given).__name__} that holds more than numbers ({array.dtype}); give "
            "one array of numbers, or a dict of such arrays"
        )
    with np.errstate(over="ignore"):
        return np.array(array, np.float32).ravel()


def _reward(given: Any) -> float:
    try:
        reward = float(given)
    except (TypeError, ValueError, OverflowError):
        reward = math.nan
    if isinstance(given, str | bytes) or not math.isfinite(reward):
        raise EnvironmentFailed(
            f"the environment's reward is {shown(given)}; a finite number is needed"
        )
    return reward


def _unchanged(action: Array) -> Array:
    return action
