"""Saving an environment: the protocol, and the saver for environments made of plain data.

IS: a copy of every attribute that is plain data, of an environment and of the wrappers around it;
and a refusal where there is anything else that might be state. IS NOT: for simulators that keep
their state elsewhere (MuJoCo, Box2D): those need an EnvironmentState of their own. Called by:
environment.
"""

from __future__ import annotations

import copy
import enum
import logging
import types
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from flashrt.base.errors import EnvironmentFailed

_SCALARS = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum)
_CODE = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_STATELESS = ("gymnasium.spaces.", "gymnasium.envs.registration", "gymnasium.logger", "pygame")


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
            f"{type(layer).__name__} cannot be saved as plain data because of {', '.join(odd)}; "
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
