"""From what a robot sees to a policy's parts: joints into the state, images to the policy's size.

IS: the match of a robot's features with a policy's parts, made once; and each observation by it.
IS NOT: LeRobot's pickles (payloads), or normalisation, which the engine does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import ObservationError
from flashrt.base.messages import listed, printable, shown
from flashrt.models.actions import Part
from flashrt.policy_server.images import resized
from flashrt.policy_server.payloads import Feature, Instructions, Seen

PREFIX, IMAGES, STATE, TASK = "observation", "observation.images.", "observation.state", "task"
MOST_SIDE = 1 << 13  # pixels of an image, either way
Values = NDArray[np.float32]


class Sight:
    """How one robot's observations become those of one policy."""

    def __init__(
        self,
        instructions: Instructions,
        names: Sequence[str],
        parts: Sequence[Part],
        size: int,
        optional: Collection[str] = (),
    ) -> None:
        """names, parts: of the policy's observation; none where it is a vector of `size` numbers.
        optional: names of which one is enough.

        Raises ObservationError that lists what the robot lacks, or has of another kind or size.
        """
        self._is_vector = not names
        self._shapes = {part.name: part.shape for part in parts} if names else {STATE: (size,)}
        names = tuple(names) or (STATE,)
        self._takes_task = TASK in names
        seen = [f for f in instructions.features if f.name.startswith(PREFIX)]
        self._numbered = [f for f in seen if not f.is_image]
        by_name = {instructions.renames.get(f.name, f.name): f for f in seen}
        if len(by_name) < len(seen):
            raise ObservationError("two of the robot's features have one name, by rename_map")
        wanted = [name for name in names if name != TASK]
        self._features = {name: by_name[name] for name in wanted if name in by_name}
        self.unused = tuple(sorted(set(by_name) - set(wanted)))  # which the policy does not take
        needed = [name for name in wanted if name not in optional]
        problems = [f"lacks {printable(name)}" for name in needed if name not in by_name]
        if optional and not by_name.keys() & set(optional):
            problems.append(f"lacks {listed(sorted(optional))}, one of which is needed at least")
        for name, feature in self._features.items():
            shape = self._shapes.get(name)
            if shape is None:
                continue
            if feature.is_image != (len(shape) == 3):
                problems.append(f"has {printable(name)} of another kind than the policy's {shape}")
            elif not feature.is_image and len(feature.numbers) != shape[0]:
                count = len(feature.numbers)
                problems.append(
                    f"has {count} numbers of {printable(name)}, the policy takes {shape[0]}"
                )
        if problems:
            raise ObservationError(
                f"the robot does not fit the policy: it {listed(problems, '; ')}. The policy takes "
                f"{listed(names)}; the robot has {listed(sorted(by_name))}"
            )

    def joints(self, seen: Seen) -> Values:
        """All numbers of an observation. Raises ObservationError."""
        vectors = [self._numbers(seen, feature) for feature in self._numbered]
        return np.concatenate([np.empty(0, np.float32), *vectors])

    def check(self, seen: Seen) -> None:
        """Raises ObservationError for what `parts` would refuse."""
        self.joints(seen)
        self.task(seen)
        for feature in self._features.values():
            if feature.is_image:
                self._image(seen, feature)

    def task(self, seen: Seen) -> str:
        """What the robot is to do, in words; none where the client says nothing."""
        task = seen.values.get(TASK, "")
        if not isinstance(task, str):
            raise ObservationError(f"{TASK} is {shown(task)}, expected text")
        return task

    def parts(self, seen: Seen) -> Values | Mapping[str, Any]:
        """As the engine takes it: by names, or the vector. Raises ObservationError."""
        found: dict[str, Any] = {}
        for name, feature in self._features.items():
            if feature.is_image:
                image, shape = self._image(seen, feature), self._shapes.get(name)
                found[name] = image if shape is None else resized(image, shape[0], shape[1])
            else:
                found[name] = self._numbers(seen, feature)
        if self._is_vector:
            return np.asarray(found[STATE], np.float32)
        if self._takes_task:
            found[TASK] = self.task(seen)
        return found

    @staticmethod
    def _numbers(seen: Seen, feature: Feature) -> Values:
        lost = [name for name in feature.numbers if name not in seen.values]
        if lost:
            raise ObservationError(f"{printable(feature.name)} lacks {listed(lost)}")
        values = np.empty(len(feature.numbers), np.float32)
        for i, name in enumerate(feature.numbers):
            value = seen.values[name]
            if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "fiu":
                value = value.item()
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or abs(value) > _LARGEST:
                raise ObservationError(
                    f"{printable(name)} is {_described(value)}, expected a finite number"
                )
            values[i] = value
        return values

    @staticmethod
    def _image(seen: Seen, feature: Feature) -> NDArray[np.uint8]:
        name = feature.name.removeprefix(IMAGES)
        image = seen.values.get(name)
        if (
            not isinstance(image, np.ndarray)
            or image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[2] != 3
            or not 0 < min(image.shape[:2]) <= max(image.shape[:2]) <= MOST_SIDE
        ):
            raise ObservationError(
                f"{printable(name)} is {_described(image)}, expected an image [height, width, 3] "
                "of uint8"
            )
        return image


_LARGEST = float(np.finfo(np.float32).max)


def _described(value: object) -> str:
    is_array = isinstance(value, np.ndarray)
    return f"{value.dtype} {value.shape}" if is_array else shown(value)  # type: ignore[attr-defined]
