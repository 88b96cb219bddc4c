"""What all formats of codes in safetensors share: a matrix of codes, and the tensors it is made of.

IS: `CodedMatrix`, a StoredMatrix that a format gives a function to; `Parts`, the tensors of one
module, with the checks and the one shape of a refusal; and the small conversions of scales, zero
points and nibbles. IS NOT: a format (float8, packed_integers, nvfp4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import printable, shown
from flashrt.core.groups import SIZES, Groups, Planes, Scales
from flashrt.core.region import DType
from flashrt.weights.formats.stored import Reader, Tensor, read_array

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
OTHER_CHECKPOINT = (
    "take another quantised checkpoint of the model (FP8, NVFP4, AWQ, GPTQ without desc_act), or "
    "the model that this one was made from"
)
FETCH_AGAIN = "fetch the file and config.json again"
FLOATS: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
WIDEST = SIZES[-1]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """A StoredMatrix of codes. `rows` reads [first, first + n): the part that is a format's own."""

    shape: tuple[int, int]
    dtype: DType
    groups: Groups
    tensors: tuple[Tensor, ...]
    description: str
    rows: Callable[[int, int, Reader], Planes] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Of the tensors, in the file."""
        return sum(t.nbytes for t in self.tensors)

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Planes:
        """See StoredMatrix."""
        return self.rows(first_row, n_rows, reader)


class Kept(Generic[T]):
    """What is read whole with row 0 and given up with the last row."""

    def __init__(self, n_rows: int, load: Callable[[Reader], T]) -> None:
        self._n_rows, self._load = n_rows, load
        self._value: T | None = None

    def at(self, first_row: int, n_rows: int, reader: Reader) -> T:
        """The value, for rows [first_row, first_row + n_rows)."""
        value = self._load(reader) if first_row == 0 or self._value is None else self._value
        self._value = value if first_row + n_rows < self._n_rows else None
        return value


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of a module by what follows its name: `weight`, `qweight`, `scales`, ..."""

    module: str
    tensors: Mapping[str, Tensor]

    def need(self, part: str, dtypes: tuple[str, ...], sizes: int | None = None) -> Tensor:
        """A tensor of one of these dtypes, with that many sizes, none of them zero."""
        tensor = self.tensors.get(part)
        if tensor is None:
            first = next(iter(self.tensors.values()))
            raise refused(first, f"has no {printable(self.module)}.{part} beside it", FETCH_AGAIN)
        if tensor.dtype not in dtypes:
            raise refused(
                tensor, f"is {tensor.dtype}; {' or '.join(dtypes)} is read", OTHER_CHECKPOINT
            )
        if (sizes is not None and len(tensor.shape) != sizes) or not all(tensor.shape):
            wanted = "sizes that are not 0" if sizes is None else f"{sizes} sizes, none of them 0"
            raise refused(tensor, f"is {shown(list(tensor.shape))}; expected {wanted}", FETCH_AGAIN)
        return tensor


def refused(tensor: Tensor, what: str, way_out: str) -> CheckpointError:
    """The error to raise: file, tensor, what is wrong with it, what to do."""
    return CheckpointError(f"{tensor.path}: {printable(tensor.stored_name)} {what}; {way_out}")


def need_shape(tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Refuses a tensor of another shape; `why` says what makes this shape the expected one."""
    if tensor.shape != shape:
        raise refused(
            tensor,
            f"is {shown(list(tensor.shape))}, expected {list(shape)} ({why})",
            FETCH_AGAIN,
        )


# -- groups ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """How groups of a checkpoint become groups of a size that kernels know: each one repeated.

    size: columns of a group here; times: how many of them a stored group is; count: all in a row.
    """

    size: int
    times: int
    count: int

    def of(self, plane: NDArray[np.generic]) -> NDArray[np.generic]:
        """A plane [n, stored groups] as [n, count]."""
        spread = np.repeat(plane, self.times, axis=1) if self.times > 1 else plane
        return np.ascontiguousarray(spread[:, : self.count])


def spread_of(tensor: Tensor, stored_size: int, columns: int) -> Spread:
    """For groups of `stored_size` columns; refuses a size that no group of ours divides."""
    if stored_size >= columns and stored_size not in SIZES:
        count = math.ceil(columns / WIDEST)
        return Spread(WIDEST, count, count)
    fitting = [n for n in SIZES if stored_size % n == 0]
    if not fitting:
        what = f"has scales for groups of {shown(stored_size)} columns; multiples of 16 are read"
        raise refused(tensor, what, OTHER_CHECKPOINT)
    size = fitting[-1]
    return Spread(size, stored_size // size, math.ceil(columns / size))


def scales_kind(scale: Tensor, *, has_min: bool) -> Scales:
    """Planes that hold the scales without loss: 16 bits where they are stored so."""
    if has_min:  # a minimum is a product, wider than its scale
        return Scales.F32_MIN
    return Scales.F16 if scale.dtype == "F16" else Scales.F32


def planes(
    codes: NDArray[np.generic],
    scales: Floats,
    zeros: Ints | None,
    groups: Groups,
    spread: Spread,
    scale: Tensor,
) -> Planes:
    """Planes of codes with (q - zero) s; `zeros` is None where kernels know the zero."""
    first = groups.planes[0].dtype
    found = [spread.of(scales.astype(first))]  # exact: see `scales_kind`
    if zeros is not None:
        found.append(spread.of(_minima(scales, zeros, scale)))
    return Planes(codes, tuple(found))


def _minima(scales: Floats, zeros: Ints, scale: Tensor) -> Floats:
    """m = -z s; refused where it is no float32, since then (q - z) s would be rounded twice."""
    with np.errstate(over="ignore", invalid="ignore"):
        exact = -(zeros.astype(np.float64) * scales)
        minima = exact.astype(np.float32)
        if ((minima != exact) & np.isfinite(exact)).any():
            what = "times its zero points needs more bits than float32 has"
            raise refused(scale, what, OTHER_CHECKPOINT)
    return minima


# -- arrays ---------------------------------------------------------------------------------------


def read_floats(reader: Reader, tensor: Tensor) -> Floats:
    """All of a tensor of floats, as float32: exactly."""
    return read_array(reader, tensor, 0, tensor.shape, FLOATS[tensor.dtype]).astype(np.float32)


def nibbles(packed: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Two codes per byte, the low one first, along the last axis: [..., n bytes] -> [..., 2 n]."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    codes = np.empty((*raw.shape[:-1], 2 * raw.shape[-1]), np.uint8)
    np.bitwise_and(raw, 15, out=codes[..., ::2])
    np.right_shift(raw, 4, out=codes[..., 1::2])
    return codes
