"""The door that observations and actions come in by: checked, and as float32.

IS: vectors, images, observations by names, and what a policy answered. IS NOT: observations that
are kept as they came (packed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashrt.base.errors import CheckpointError, ObservationError
from flashrt.base.float_mode import DefaultFloatMode
from flashrt.base.messages import listed
from flashrt.models.actions import Part

Action = NDArray[np.float32]
LEVELS = np.arange(256, dtype=np.float32) / np.float32(255)  # of a pixel


@dataclass(frozen=True, slots=True)
class Given:
    """What a plan starts from. `noise`: [chunk_size, max_action_dim]; None: the lane's own, by seed
    and tick. `left_over`: rows that guide it, [n, action_dim], as the model has actions, of the
    chunk before from the present tick on; None: nothing does. `delay`: how many of them are
    executed while the chunk is made; `horizon`: rows from which on they guide no more; None: as the
    config has it.
    """

    noise: Action | None = None
    left_over: Action | None = None
    delay: int = 0
    horizon: int | None = None


def checked_rows(what: str, values: ArrayLike, shape: tuple[int | None, int]) -> Action:
    """float32 rows of a shape, any number of them for None. Raises ObservationError."""
    given = as_array(what, values)
    fits = given.ndim == 2 and given.shape[1] == shape[1] and shape[0] in (None, len(given))
    if not fits or given.dtype.kind not in "fiu" or not len(given):
        wanted = f"({'n' if shape[0] is None else shape[0]}, {shape[1]})"
        raise ObservationError(f"{what}: {given.dtype} {given.shape}, expected float32 {wanted}")
    return checked_vector(what, given.reshape(-1), given.size).reshape(given.shape)


def checked_vector(
    what: str, values: ArrayLike, size: int, kinds: str = "fiu", out: Action | None = None
) -> Action:
    """float32 [size], contiguous and finite; in `out`, if it is given.

    kinds: numpy's letters of the dtypes that are let in. Raises ObservationError that names `what`:
    for another shape or dtype, for what numpy cannot read as an array, NaN, infinity, and numbers
    beyond float32.
    """
    given = as_array(what, values)
    if given.shape != (size,) or given.dtype.kind not in kinds:
        is_array = isinstance(values, np.ndarray | list | tuple)
        found = "" if is_array else f"{type(values).__name__}, for numpy "
        raise ObservationError(
            f"{what}: {found}{given.dtype} {given.shape}, expected float32 ({size},)"
        )
    array = np.empty(size, np.float32) if out is None else out
    with DefaultFloatMode(), np.errstate(over="ignore"):
        np.copyto(array, given, casting="unsafe")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ObservationError(f"{what}[{at}] is {given[at]}, which is not finite in float32")
    return array


def checked_vectors(
    what: str, values: Sequence[ArrayLike], size: int, kinds: str = "fiu"
) -> list[Action]:
    """`checked_vector` of each: at once, where all are arrays of one dtype, so that many cost about
    as much as one. The error of one has a note of its index.
    """
    arrays = [v for v in values if isinstance(v, np.ndarray) and v.shape == (size,)]
    if arrays and len(arrays) == len(values) and len({a.dtype for a in arrays}) == 1:
        given, rows = np.array(arrays), np.empty((len(arrays), size), np.float32)
        if given.dtype.kind in kinds:
            with DefaultFloatMode(), np.errstate(over="ignore"):
                np.copyto(rows, given, casting="unsafe")
            if np.isfinite(rows).all():
                return list(rows)
    checked = []
    for index, value in enumerate(values):
        try:
            checked.append(checked_vector(what, value, size, kinds))
        except ObservationError as error:
            error.add_note(f"of {what} {index} of {len(values)}")
            raise
    return checked


def packed(parts: Sequence[Part], observation: Mapping[str, ArrayLike]) -> Action:
    """The vector of an observation by names: numbers as `checked_vector` takes them, images [H, W,
    3] or [3, H, W], in uint8 from 0 to 255 or in float from 0 to 1.

    Raises ObservationError for a part that is missing or unknown, and for another shape or dtype.
    """
    wanted = {part.name for part in parts}
    if not parts:
        raise ObservationError(
            f"observations {listed(observation)}: the policy takes a vector, float32, without names"
        )
    if set(observation) != wanted:
        lost, more = sorted(wanted - set(observation)), sorted(map(str, set(observation) - wanted))
        what = [f"lacks {listed(lost)}"] if lost else []
        what += [f"has {listed(more)}, which the policy does not take"] if more else []
        raise ObservationError(f"the observation {' and '.join(what)}")
    whole = np.empty(parts[-1].stop, np.float32)
    for part in parts:
        place = whole[part.start : part.stop]
        if len(part.shape) == 1:
            checked_vector(part.name, observation[part.name], place.size, out=place)
        else:
            _put_image(part, observation[part.name], place.reshape(part.shape))
    return whole


def _put_image(part: Part, image: ArrayLike, place: Action) -> None:
    """An image into its place, [H, W, 3] from 0 to 1."""
    given, (height, width, channels) = as_array(part.name, image), part.shape
    is_first = given.shape == (channels, height, width)  # the channels
    if not is_first and given.shape != part.shape:
        raise ObservationError(
            f"{part.name}: {given.dtype} {given.shape}, expected an image {part.shape} or "
            f"{(channels, height, width)}"
        )
    pixels = given.transpose(1, 2, 0) if is_first else given
    if given.dtype == np.uint8:
        np.take(LEVELS, pixels, out=place, mode="clip")  # faster than to divide
    elif given.dtype.kind == "f":
        with DefaultFloatMode(), np.errstate(over="ignore"):
            np.copyto(place, pixels, casting="unsafe")
        if not np.isfinite(place).all():
            raise ObservationError(f"{part.name}: some pixels are not finite in float32")
    else:
        raise ObservationError(
            f"{part.name}: {given.dtype}; uint8 from 0 to 255 or float from 0 to 1 is needed"
        )


def checked_action(action: Action) -> Action:
    """What a policy answered. Raises CheckpointError for NaN and infinity."""
    if not np.isfinite(action).all():
        raise CheckpointError(f"the action is {action}: the policy's weights overflow")
    return action


def as_array(what: str, values: ArrayLike) -> NDArray[Any]:
    """Numpy's array of something. Raises ObservationError for what it cannot read as one."""
    try:
        return np.asarray(values)
    except Exception as error:  # of any kind: an object may bring an __array__ of its own
        raise ObservationError(
            f"{what}: numpy cannot read this {type(values).__name__} as an array: {error}"
        ) from error
