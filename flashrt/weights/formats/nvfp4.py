"""NVFP4: values of four bits (E2M1), a float8 scale for 16 columns, a float32 scale for the matrix.

IS: both spellings. compressed-tensors: `weight_packed` U8, `weight_scale`, `weight_global_scale`,
by which the scales are divided. ModelOpt: `weight` U8, `weight_scale`, `weight_scale_2`, by which
they are multiplied. IS NOT: MXFP4, whose scales are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.region import DType
from flashrt.weights.formats.coded import (
    FLOATS,
    OTHER_CHECKPOINT,
    CodedMatrix,
    Kept,
    Parts,
    need_shape,
    nibbles,
    read_floats,
    refused,
)
from flashrt.weights.formats.quantisation import Scheme
from flashrt.weights.formats.stored import Reader, Tensor, read_array

_SIZE = 16


def nvfp4(parts: Parts, scheme: Scheme) -> CodedMatrix:
    """The matrix of packed codes and its two levels of scales."""
    is_divided = "weight_packed" in parts.tensors
    packed = parts.need("weight_packed" if is_divided else "weight", ("U8",), 2)
    scale = parts.need("weight_scale", ("F8_E4M3",), 2)
    whole = parts.need("weight_global_scale" if is_divided else "weight_scale_2", tuple(FLOATS))
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    if scheme.size not in (None, _SIZE):
        raise refused(
            scale, f"is for groups of {scheme.size} columns; NVFP4 has 16", OTHER_CHECKPOINT
        )
    if columns % _SIZE:
        raise refused(
            packed, f"has rows of {columns} values; NVFP4 has multiples of 16", OTHER_CHECKPOINT
        )
    need_shape(scale, (rows, columns // _SIZE), "a scale per row and 16 columns")
    if whole.shape not in ((), (1,)):
        need_shape(whole, (1,), "one for the matrix")
    return CodedMatrix(
        (rows, columns),
        DType.E2M1,
        Groups(_SIZE, Scales.E4M3_OVER if is_divided else Scales.E4M3_TIMES),
        (packed, scale, whole),
        f"NVFP4, {'compressed-tensors' if is_divided else 'ModelOpt'}",
        _Rows(packed, Kept(rows, lambda reader: _scales(reader, scale, whole))).__call__,
    )


def _scales(reader: Reader, scale: Tensor, whole: Tensor) -> tuple[NDArray[np.generic], np.float32]:
    """All scales: read apart from the codes, so that chunks do not change the order of reads."""
    scales = read_array(reader, scale, 0, scale.shape, np.uint8)
    return scales, np.float32(read_floats(reader, whole).reshape(-1)[0])


@dataclass(frozen=True, slots=True)
class _Rows:
    packed: Tensor
    kept: Kept[tuple[NDArray[np.generic], np.float32]]

    def __call__(self, first_row: int, n_rows: int, reader: Reader) -> Planes:
        scales, whole = self.kept.at(first_row, n_rows, reader)
        width = self.packed.shape[1]
        packed = read_array(reader, self.packed, first_row * width, (n_rows, width), np.uint8)
        part = scales[first_row : first_row + n_rows].copy()
        return Planes(nibbles(packed), (part, np.full((n_rows, 1), whole, np.float32)))
