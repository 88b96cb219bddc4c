"""Features of a LeRobot policy, as its config.json lists them: what is observed, and the action.

IS: names, types and shapes, every problem noted in a list. IS NOT: statistics (weights.lerobot),
nor sizes of a model, which each family has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.messages import printable, shown

STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
IMAGE_PREFIX = "observation.image"
VISUAL_KIND, STATE_KIND, ENVIRONMENT_KIND, ACTION_KIND = "VISUAL", "STATE", "ENV", "ACTION"
_MOST_NUMBERS, _MOST_SIDE, _MOST_PIXELS, _MOST_CAMERAS = 1 << 14, 1 << 12, 1 << 22, 16


@dataclass(frozen=True, slots=True)
class Camera:
    """An image of an observation."""

    name: str
    height: int
    width: int

    @property
    def size(self) -> int:
        """Numbers of an image of three channels."""
        return 3 * self.height * self.width


def size_of(config: Mapping[str, object], name: str, most: int, problems: list[str]) -> int:
    """A field that is an integer from 1 to `most`; 1 where it is not, which is a problem."""
    value = config.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
        return value
    problems.append(f"{name} is {shown(value)}, expected an integer from 1 to {most:,}")
    return 1


def _features(
    given: object, what: str, problems: list[str]
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each."""
    if not isinstance(given, dict) or not given:
        problems.append(f"{what} is {shown(given)}, expected features by name")
        return []
    found = []
    for name, feature in given.items():
        kind = feature.get("type") if isinstance(feature, dict) else None
        shape = feature.get("shape") if isinstance(feature, dict) else None
        is_shape = isinstance(shape, list) and all(
            isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape
        )
        if not isinstance(kind, str) or not is_shape or not isinstance(shape, list):
            problems.append(f"{what} has {printable(name)} as {shown(feature)}")
        else:
            found.append((name, kind, tuple(shape)))
    return found


def inputs_of(given: object, problems: list[str]) -> tuple[int, int, tuple[Camera, ...]]:
    """Sizes of state and environment state, and the cameras."""
    vectors = {STATE: 0, ENVIRONMENT: 0}
    kinds = {STATE: STATE_KIND, ENVIRONMENT: ENVIRONMENT_KIND}
    cameras = []
    for name, kind, shape in _features(given, "input_features", problems):
        if kinds.get(name) == kind and len(shape) == 1 and shape[0] <= _MOST_NUMBERS:
            vectors[name] = shape[0]
        elif (
            kind == VISUAL_KIND
            and name.startswith(IMAGE_PREFIX)
            and len(shape) == 3
            and shape[0] == 3
            and max(shape) <= _MOST_SIDE
            and shape[1] * shape[2] <= _MOST_PIXELS
        ):
            cameras.append(Camera(name, shape[1], shape[2]))
        else:
            problems.append(
                f"input_features has {printable(name)} of {shown(kind)} {shown(shape)}; supported: "
                f"{STATE} and {ENVIRONMENT}, vectors, and {IMAGE_PREFIX}*, [3, height, width]"
            )
    if len(cameras) > _MOST_CAMERAS:
        problems.append(f"{len(cameras)} cameras, at most {_MOST_CAMERAS}")
    return vectors[STATE], vectors[ENVIRONMENT], tuple(cameras)


def action_dim_of(given: object, problems: list[str]) -> int:
    """Size of an action."""
    found = _features(given, "output_features", problems)
    if len(found) == 1:
        name, kind, shape = found[0]
        if (name, kind) == (ACTION, ACTION_KIND) and len(shape) == 1 and shape[0] <= 1 << 10:
            return shape[0]
    if found:
        problems.append(f"output_features are {shown(found)}; supported: {ACTION}, a vector")
    return 1
