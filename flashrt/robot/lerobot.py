"""The interface that LeRobot's policies have: `select_action`, `predict_action_chunk`, `reset`.

IS: batches of one, names of observations, seeds by episode. IS NOT: torch; arrays in and out, and
anything that numpy can view. It lets code that was written for LeRobot's policies drive a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import ArrayLike

from flashrt.base.errors import ObservationError
from flashrt.base.messages import listed
from flashrt.engine.numbers import Given, as_array
from flashrt.robot.loop import ControlLoop
from flashrt.robot.options import checked_seed
from flashrt.robot.policy import Array, naming

STATE, IMAGE_PREFIX, TASK = "observation.state", "observation.image", "task"


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
        """The action for an observation [n], or for one by names: {"observation.state": [n]},
        images [H, W, 3] or [3, H, W] where the policy has cameras, "task", a text, where it has
        tasks.

        A batch of one, [1, n], gives a batch of one. Raises ObservationError.
        """
        return self._answered(observation, self.loop.tick)

    def predict_action_chunk(
        self,
        observation: Mapping[str, Any] | Any,
        *,
        noise: ArrayLike | None = None,
        inference_delay: int = 0,
        prev_chunk_left_over: ArrayLike | None = None,
        execution_horizon: int | None = None,
    ) -> Array:
        """The chunk of actions, [chunk_size, action_dim], that an observation leads to; what is
        promised stays. Unlike LeRobot's, in the environment's units.

        noise: [chunk_size, max_action_dim]; None is the loop's own. The others are of real-time
        chunking: how many rows of the chunk before are executed meanwhile; that chunk's rows from
        the present tick on, [n, action_dim], normalised, as LeRobot has them before its
        postprocessor; and the row from which on they guide no more. Noise and rows may be a batch
        of one. Without either, what the loop has promised guides, as in plans of its own. Raises
        ObservationError, SessionError for a policy that cannot be given these.
        """
        given = None
        if noise is not None or prev_chunk_left_over is not None:
            rows = (_of_batch("noise", noise), _of_batch("left_over", prev_chunk_left_over))
            given = Given(*rows, inference_delay, execution_horizon)
        return self._answered(observation, lambda seen: self.loop.predict_chunk(seen, given))

    def _answered(self, observation: Any, ask: Callable[[Any], Array]) -> Array:
        if isinstance(observation, Mapping) and set(observation) != {STATE}:
            if naming(self.loop.engine) is None:
                names = listed(sorted(map(str, observation)))
                raise ObservationError(f"observations {names}: the policy takes {STATE!r} alone")
            task = {n: _one_task(text) for n, text in observation.items() if n == TASK}
            parts = {
                str(n): as_array(str(n), values) for n, values in observation.items() if n != TASK
            }
            batch = {len(values) for n, values in parts.items() if values.ndim == _ndim(n) + 1}
            if len(batch) == 1 and all(v.ndim == _ndim(n) + 1 for n, v in parts.items()):
                _check_batch(batch.pop())
                return ask({name: values[0] for name, values in parts.items()} | task)[None]
            return ask(parts | task)
        values = observation[STATE] if isinstance(observation, Mapping) else observation
        given = as_array("observation", values)
        if given.ndim != 2:
            return ask(given)
        _check_batch(len(given))
        return ask(given[0])[None]


def _one_task(task: object) -> object:
    """A task, or that of a batch of one."""
    return task[0] if isinstance(task, list | tuple) and len(task) == 1 else task


def _of_batch(what: str, rows: ArrayLike | None) -> Array | None:
    """Rows [n, m], or those of a batch of one."""
    if rows is None:
        return None
    given: Array = as_array(what, rows)
    if given.ndim != 3:
        return given
    _check_batch(len(given))
    one: Array = given[0]
    return one


def _ndim(name: str) -> int:
    """Of a part that is no batch."""
    return 3 if name.startswith(IMAGE_PREFIX) else 1


def _check_batch(size: int) -> None:
    if size != 1:
        raise ObservationError(f"a batch of {size}; a loop drives one robot")
