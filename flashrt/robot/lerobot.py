"""The interface that LeRobot's policies have: `select_action(observation)` and `reset()`.

IS: batches of one, names of observations, seeds by episode. IS NOT: torch; arrays in and out, and
anything that numpy can view. It lets code that was written for LeRobot's policies drive a loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashrt.base.errors import ObservationError
from flashrt.base.messages import listed
from flashrt.engine.actions import as_array
from flashrt.robot.loop import ControlLoop
from flashrt.robot.options import checked_seed
from flashrt.robot.policy import Array

STATE = "observation.state"


class PolicyAgent:
    """A control loop, asked for one action at a time."""

    def __init__(self, loop: ControlLoop, seed: int = 0) -> None:
        """Episode i, counted from 0, begins with seed `seed` + i."""
        self.loop = loop
        self._seed = checked_seed(seed)
        self._episodes = 0
        self.reset()

    def reset(self) -> None:
        """The next episode."""
        self.loop.reset(self._seed + self._episodes)
        self._episodes += 1

    def select_action(self, observation: Mapping[str, Any] | Any) -> Array:
        """The action for an observation [n], or for {"observation.state": observation}.

        A batch of one, [1, n], gives a batch of one. Raises ObservationError.
        """
        if isinstance(observation, Mapping):
            if set(observation) != {STATE}:
                names = listed(sorted(map(str, observation)))
                raise ObservationError(f"observations {names}: the policy takes {STATE!r} alone")
            observation = observation[STATE]
        given = as_array("observation", observation)
        if given.ndim != 2:
            return self.loop.tick(given)
        if len(given) != 1:
            raise ObservationError(f"a batch of {len(given)}; a loop drives one robot")
        return self.loop.tick(given[0])[None]
