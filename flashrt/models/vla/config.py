"""Fields that configs of vision-language-action policies share: checks of LeRobot's config.json.

IS: inputs, sizes and periods, every problem noted in a list. IS NOT: a family's own fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flashrt.base.messages import shown
from flashrt.models.actions import Part, parts_of
from flashrt.models.features import (
    ENVIRONMENT,
    STATE,
    Camera,
    action_dim_of,
    inputs_of,
    size_of,
)
from flashrt.models.prefix import TASK

_EMPTY_CAMERA = "observation.images.empty_camera_"  # LeRobot adds them; nobody ever sees them
_MOST_SIDE = 1 << 12


class Shape(NamedTuple):
    """What goes in and what comes out."""

    cameras: tuple[Camera, ...]
    state_dim: int
    action_dim: int


def observed_parts(state_dim: int, cameras: Sequence[Camera], tokens: int) -> tuple[Part, ...]:
    """Of an observation, in order; see engine.packed for what a task is as numbers."""
    shapes: list[tuple[str, tuple[int, ...]]] = [(STATE, (state_dim,))]
    shapes += [(c.name, (c.height, c.width, 3)) for c in cameras]
    shapes.append((TASK, (2 + tokens,)))
    return parts_of(shapes)


def integers_of(
    fields: Mapping[str, object], most: Mapping[str, int], problems: list[str]
) -> dict[str, int]:
    """Integers from 1 to `most` of each; `chunk_size` holds `n_action_steps`."""
    sizes = {name: size_of(fields, name, limit, problems) for name, limit in most.items()}
    if sizes["n_action_steps"] > sizes["chunk_size"]:
        problems.append(
            f"n_action_steps {sizes['n_action_steps']} exceeds chunk_size {sizes['chunk_size']}"
        )
    return sizes


def shape_of(fields: Mapping[str, object], sizes: Mapping[str, int], problems: list[str]) -> Shape:
    """Of features, which fit into what states and actions are padded to."""
    given = fields.get("input_features")
    if isinstance(given, dict):
        given = {n: about for n, about in given.items() if not n.startswith(_EMPTY_CAMERA)}
    state, environment, cameras = inputs_of(given, problems)
    if environment or not state or not cameras:
        problems.append(f"input_features need {STATE} and an image, and know no {ENVIRONMENT}")
    action = action_dim_of(fields.get("output_features"), problems)
    for size, limit in ((state, "max_state_dim"), (action, "max_action_dim")):
        if size > sizes[limit]:
            problems.append(f"a vector of {size} exceeds {limit} {sizes[limit]}")
    return Shape(cameras, state, action)


def period_of(fields: Mapping[str, object], name: str, problems: list[str]) -> float:
    """A positive number."""
    value = fields.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9:
        return float(value)
    problems.append(f"{name} is {shown(value)}, expected a positive number")
    return 1.0


def side_of(fields: Mapping[str, object], name: str, problems: list[str]) -> int:
    """Of square images, in pixels."""
    given = fields[name]
    if isinstance(given, list | tuple) and len(given) == 2 and given[0] == given[1]:
        side = given[0]
        if isinstance(side, int) and not isinstance(side, bool) and 0 < side <= _MOST_SIDE:
            return side
    problems.append(f"{name} is {shown(given)}; supported: [n, n], as the tower has it")
    return 1
