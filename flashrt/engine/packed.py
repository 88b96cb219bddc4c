"""Observations of cameras and a task, kept as they came until a plan needs numbers of them.

IS: `Packed`, from parts by name or from a vector, and as a vector again, for recordings. IS NOT:
rows (prefix). It exists because a loop observes far more often than it plans: what a tick pays for
is a copy of each image, as it is.

As a vector an observation is float32 [observation_dim]: the state; the images, [H, W, 3] from 0 to
1, zeros where a camera is missing; then of the task three kinds of numbers, all integers: which
cameras there are, camera i as bit i; how many tokens; the tokens, filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from flashrt.base.errors import ObservationError
from flashrt.base.messages import listed, shown
from flashrt.engine.numbers import LEVELS, Action, as_array, checked_vector
from flashrt.models.features import STATE
from flashrt.models.prefix import TASK, PrefixModel

Pixels = NDArray[np.uint8] | NDArray[np.float32]
TASK_WORDS = 2  # of a task in a vector, before its tokens


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """An observation, checked, and nobody else's. `images`: [H, W, 3], uint8 where they came so or
    hold just its levels, float32 from 0 to 1 else; None where there is none.
    """

    model: PrefixModel
    state: Action
    images: tuple[Pixels | None, ...]
    tokens: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers of the vector."""
        return int(self.model.config.observation_dim)

    def __array__(
        self, dtype: DTypeLike | None = None, copy: bool | None = None
    ) -> NDArray[np.generic]:
        """The vector, anew each time."""
        del copy
        parts = {part.name: part for part in self.model.parts}
        vector = np.zeros(self.size, np.float32)
        vector[parts[STATE].start : parts[STATE].stop] = self.state
        there = 0
        for i, (camera, image) in enumerate(zip(self.model.cameras, self.images, strict=True)):
            if image is not None:
                part = parts[camera.name]
                levels = LEVELS[image] if image.dtype == np.uint8 else image
                vector[part.start : part.stop] = levels.reshape(-1)
                there |= 1 << i
        first = parts[TASK].start
        vector[first : first + TASK_WORDS] = there, len(self.tokens)
        vector[first + TASK_WORDS : first + TASK_WORDS + len(self.tokens)] = self.tokens
        return vector if dtype is None else vector.astype(dtype)


def packed_parts(model: PrefixModel, observation: Mapping[str, ArrayLike | str]) -> Packed:
    """An observation by names: a state, images as `actions.packed` takes them, and a task, which is
    a text. Cameras may be missing, but not all. Raises ObservationError; TokenError.
    """
    cameras = {camera.name: camera for camera in model.cameras}
    lost = sorted({STATE, TASK} - set(observation))
    more = sorted(map(str, set(observation) - {STATE, TASK} - set(cameras)))
    what = [f"lacks {listed(lost)}"] if lost else []
    what += [f"has {listed(more)}, which the policy does not take"] if more else []
    if not any(name in observation for name in cameras):
        what.append(f"lacks {listed(sorted(cameras))}, one of which is needed at least")
    if what:
        raise ObservationError(f"the observation {' and '.join(what)}")
    task = observation[TASK]
    if not isinstance(task, str):
        raise ObservationError(f"{TASK} is {shown(task)}, expected a text")
    state = checked_vector(STATE, observation[STATE], model.config.state_dim)
    images = tuple(
        _pixels(name, observation[name], (camera.height, camera.width, 3))
        if name in observation
        else None
        for name, camera in cameras.items()
    )
    return Packed(model, state, images, tuple(model.task_tokens(task, state)))


def unpacked(model: PrefixModel, vector: Action) -> Packed:
    """Of a vector that is finite. Raises ObservationError for a task that is none."""
    parts = {part.name: part for part in model.parts}
    task = vector[parts[TASK].start : parts[TASK].stop]
    there, count = (_whole(n) for n in task[:TASK_WORDS])
    tokens = [_whole(n) for n in task[TASK_WORDS:][: max(count, 0)]]
    is_fine = 0 <= count <= task.size - TASK_WORDS and 0 < there < 1 << len(model.cameras)
    if not is_fine or any(not 0 <= token < model.vocab_size for token in tokens):
        raise ObservationError(
            f"the last {task.size} numbers of the observation are {shown(task.tolist())}: expected "
            f"bits of {len(model.cameras)} cameras, a count, and so many tokens in "
            f"[0, {model.vocab_size})"
        )
    images: list[Pixels | None] = []
    for i, camera in enumerate(model.cameras):
        part = parts[camera.name]
        pixels = vector[part.start : part.stop].reshape(part.shape)
        images.append(_narrowed(pixels) if there >> i & 1 else None)
    state = vector[parts[STATE].start : parts[STATE].stop].copy()
    return Packed(model, state, tuple(images), tuple(tokens))


def _whole(number: np.float32) -> int:
    """-1 for what is no integer."""
    return int(number) if number == np.rint(number) and abs(number) < 1 << 24 else -1


def _pixels(name: str, image: ArrayLike, shape: tuple[int, int, int]) -> Pixels:
    given, (height, width, channels) = as_array(name, image), shape
    is_first = given.shape == (channels, height, width)  # the channels
    if not is_first and given.shape != shape:
        raise ObservationError(
            f"{name}: {given.dtype} {given.shape}, expected an image {shape} or "
            f"{(channels, height, width)}"
        )
    pixels = given.transpose(1, 2, 0) if is_first else given
    if given.dtype == np.uint8:
        return np.array(pixels, order="C")
    if given.dtype.kind != "f":
        raise ObservationError(
            f"{name}: {given.dtype}; uint8 from 0 to 255 or float from 0 to 1 is needed"
        )
    with np.errstate(over="ignore"):
        values = np.array(pixels, np.float32, order="C")
    if not np.isfinite(values).all():
        raise ObservationError(f"{name}: some pixels are not finite in float32")
    return _narrowed(values)


def _narrowed(values: Action) -> Pixels:
    """uint8 where all values are levels of it, to the bit: so that content has one form. A copy."""
    with np.errstate(over="ignore", invalid="ignore"):
        levels = np.rint(values * np.float32(255))
    if levels.size and levels.min() >= 0 and levels.max() <= 255:
        narrow: NDArray[np.uint8] = levels.astype(np.uint8)
        if np.array_equal(LEVELS[narrow].view(np.int32), values.view(np.int32)):
            return narrow
    return values.copy()
