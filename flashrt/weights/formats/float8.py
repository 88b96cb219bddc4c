"""Codes of a byte beside scales: float8 and int8, as several libraries write them.

IS: `weight` F8_E4M3 with `weight_scale_inv` in blocks (the official FP8 of Qwen), and what
compressed-tensors calls float-quantized and int-quantized, ModelOpt FP8 and fbgemm: `weight`
F8_E4M3 or I8 with `weight_scale` for the tensor, a row, a group or a block. IS NOT: codes of less
than a byte (packed_integers, nvfp4). Always value = (q - zero) scale, in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.region import DType
from flashrt.weights.formats.coded import (
    FETCH_AGAIN,
    FLOATS,
    OTHER_CHECKPOINT,
    CodedMatrix,
    Floats,
    Ints,
    Kept,
    Parts,
    Spread,
    need_shape,
    planes,
    read_floats,
    refused,
    scales_kind,
    spread_of,
)
from flashrt.weights.formats.quantisation import WHOLE, Scheme
from flashrt.weights.formats.stored import Reader, Tensor, read_array

CODE_DTYPES = {"F8_E4M3": DType.E4M3, "I8": DType.I8}
_NAMES = {"F8_E4M3": "FP8", "I8": "int8"}


def scaled_bytes(parts: Parts, scheme: Scheme) -> CodedMatrix:
    """The matrix of `weight` and its scales."""
    weight = parts.need("weight", tuple(CODE_DTYPES), 2)
    names = [n for n in ("weight_scale_inv", "weight_scale") if n in parts.tensors]
    if len(names) != 1:
        found = "both weight_scale and weight_scale_inv" if names else "no weight_scale"
        raise refused(weight, f"is {weight.dtype} and has {found} beside it", FETCH_AGAIN)
    scale = parts.need(names[0], tuple(FLOATS))
    zero = parts.tensors.get("weight_zero_point")
    has_min = zero is not None and weight.dtype == "I8" and scheme.is_symmetric is not True
    block_rows, block_columns, grid = _blocks(weight, scale, scheme)
    if zero is not None:
        parts.need("weight_zero_point", ("I8",) if has_min else (zero.dtype,))
        need_shape(zero, scale.shape, "as its scale")
    spread = spread_of(scale, block_columns, weight.shape[1])
    # float8 and a 16-bit scale would do, but kernels know float8 with float32 scales alone
    kind = scales_kind(scale, has_min=has_min) if weight.dtype == "I8" else Scales.F32
    groups = Groups(spread.size, kind)
    tensors = (weight, scale) if zero is None else (weight, scale, zero)
    rows = _Rows(weight, scale, zero, has_min, block_rows, grid, groups, spread)
    per = f"blocks of {block_rows} x {block_columns}" if scheme.block else _per(scale, scheme)
    return CodedMatrix(
        (weight.shape[0], weight.shape[1]),
        CODE_DTYPES[weight.dtype],
        groups,
        tensors,
        f"{_NAMES[weight.dtype]}, a scale per {per}",
        rows.__call__,
    )


def _per(scale: Tensor, scheme: Scheme) -> str:
    if scheme.size not in (None, WHOLE):
        return f"{scheme.size} columns"
    return "tensor" if math.prod(scale.shape) == 1 else "row"


def _blocks(weight: Tensor, scale: Tensor, scheme: Scheme) -> tuple[int, int, tuple[int, int]]:
    """Rows and columns that share a scale, and how many such blocks there are."""
    rows, columns = weight.shape
    if scheme.block is not None:
        high, wide = scheme.block
        grid = (math.ceil(rows / high), math.ceil(columns / wide))
        need_shape(scale, grid, f"a scale per {high} x {wide} of {rows} x {columns}")
        return high, wide, grid
    if scheme.size is not None and scheme.size != WHOLE:
        grid = (rows, math.ceil(columns / scheme.size))
        need_shape(scale, grid, f"a scale per row and {scheme.size} columns")
        return 1, scheme.size, grid
    if math.prod(scale.shape) == 1:
        return rows, columns, (1, 1)
    if scale.shape != (rows,):
        need_shape(scale, (rows, 1), "a scale per row, or one for all")
    return 1, columns, (rows, 1)


@dataclass(slots=True)
class _Rows:
    """Reads rows; the scales, few of them, are read with row 0."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    has_min: bool
    block_rows: int
    grid: tuple[int, int]
    groups: Groups
    spread: Spread
    kept: Kept[tuple[Floats, Ints | None]] | None = None

    def __call__(self, first_row: int, n_rows: int, reader: Reader) -> Planes:
        if self.kept is None:
            self.kept = Kept(self.weight.shape[0], self._scales)
        scales, zeros = self.kept.at(first_row, n_rows, reader)
        columns = self.weight.shape[1]
        dtype = np.int8 if self.weight.dtype == "I8" else np.uint8
        codes = read_array(reader, self.weight, first_row * columns, (n_rows, columns), dtype)
        at = np.arange(first_row, first_row + n_rows) // self.block_rows
        minima = None if zeros is None else zeros[at]
        return planes(codes, scales[at], minima, self.groups, self.spread, self.scale)

    def _scales(self, reader: Reader) -> tuple[Floats, Ints | None]:
        scales = read_floats(reader, self.scale).reshape(self.grid)
        if self.zero is None:
            return scales, None
        raw = read_array(reader, self.zero, 0, (self.zero.nbytes,), np.int8)
        if self.has_min:
            return scales, raw.astype(np.int64).reshape(self.grid)
        if raw.any():
            raise refused(self.zero, "is not zero, though weights are symmetric", OTHER_CHECKPOINT)
        return scales, None
