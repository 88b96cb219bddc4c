"""How the CPU stores each layout: panels of 32 rows, so that output rows (or keys, or columns) sit
in vector lanes.

IS: sizes, and numpy statements of the index functions in kernels/common.h. IS NOT: the fast packing
of weights, which is C (kernels/pack.c). Sources: the order is the one measured in
docs/exactness.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashrt.core.backend import Bytes, Storage
from flashrt.core.region import DType, Layout, Region, Role, resolve_dtype

LANES = 32  # rows of a panel, positions of a granule, columns of a state block
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _ceil(n: int) -> int:
    return -(-n // LANES) * LANES


def storage(region: Region, act: DType) -> Storage:
    """Bytes of a region, per leading entry, and per row for rows."""
    item = resolve_dtype(region.dtype, act).nbytes
    if region.role is Role.ROWS:
        cols = region.shape[2]
        width = _ceil(cols) if region.layout is Layout.COLS_IN_LANES else cols
        granule = 1 if region.layout is Layout.PLAIN else LANES
        positions = _ceil(region.shape[1]) if granule > 1 else region.shape[1]
        plane = positions * width * item
        return Storage(region.shape[0] * plane, plane, width * item, granule)
    if region.layout is Layout.MATRIX:
        n, k = region.shape
        return Storage(_ceil(n) * k * item, k * item)
    if region.layout is Layout.COLUMN_BLOCKS:
        *lead, rows, cols = region.shape
        entry = rows * _ceil(cols) * item
        total = int(np.prod(lead, dtype=np.int64)) * entry
        return Storage(total, total // region.shape[0])
    total = region.size * item
    return Storage(total, total // region.shape[0])


def _to_lanes(rows: NDArray[np.generic]) -> NDArray[np.generic]:
    """Last axis of 32 to stored order: bfloat16 pairs (j, j + 16) share a word; float32 stays."""
    if rows.dtype.itemsize != 2:
        return rows
    return np.stack([rows[..., :16], rows[..., 16:]], axis=-1).reshape(rows.shape)


def _from_lanes(rows: NDArray[np.generic]) -> NDArray[np.generic]:
    if rows.dtype.itemsize != 2:
        return rows
    pairs = rows.reshape(*rows.shape[:-1], 16, 2)
    return np.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1)


def _pad(array: NDArray[np.generic], axis: int) -> NDArray[np.generic]:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, _ceil(array.shape[axis]) - array.shape[axis])
    return np.pad(array, widths)


def pack(region: Region, array: NDArray[np.generic]) -> Bytes:
    """Logical array -> storage bytes."""
    a = _bits(array)
    if region.layout is Layout.MATRIX:  # [N, K] -> [panel][k][lane]
        p = _pad(a, 0)
        a = _to_lanes(p.reshape(-1, LANES, p.shape[1]).transpose(0, 2, 1))
    elif region.layout is Layout.COLUMN_BLOCKS:  # [..., rows, cols] -> [..., block][row][lane]
        p = _pad(a, a.ndim - 1)
        a = p.reshape(*p.shape[:-1], -1, LANES).swapaxes(-2, -3)
    elif region.layout is Layout.ROWS_IN_LANES:  # [planes, S, cols] -> [planes][granule][col][lane]
        p = _pad(a, 1)
        a = _to_lanes(p.reshape(p.shape[0], -1, LANES, p.shape[2]).swapaxes(2, 3))
    elif region.layout is Layout.COLS_IN_LANES:  # -> [planes][granule][col block][position][lane]
        p = _pad(_pad(a, 1), 2)
        a = _to_lanes(p.reshape(p.shape[0], -1, LANES, p.shape[2] // LANES, LANES).swapaxes(2, 3))
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def unpack(region: Region, raw: Bytes, act: DType) -> NDArray[np.generic]:
    """Storage bytes -> logical array: float32, int32, uint32, or bfloat16 as uint16 bits."""
    dtype = resolve_dtype(region.dtype, act)
    a: NDArray[np.generic] = raw.view(_BITS[dtype.nbytes])
    shape = region.shape
    if region.layout is Layout.MATRIX:
        n, k = shape
        a = _from_lanes(a.reshape(-1, k, LANES)).transpose(0, 2, 1).reshape(-1, k)[:n]
    elif region.layout is Layout.COLUMN_BLOCKS:
        *lead, rows, cols = shape
        a = a.reshape(*lead, -1, rows, LANES).swapaxes(-2, -3).reshape(*lead, rows, -1)[..., :cols]
    elif region.layout is Layout.ROWS_IN_LANES:
        planes, s, cols = shape
        a = _from_lanes(a.reshape(planes, -1, cols, LANES)).swapaxes(2, 3)
        a = a.reshape(planes, -1, cols)[:, :s]
    elif region.layout is Layout.COLS_IN_LANES:
        planes, s, cols = shape
        blocks = _ceil(cols) // LANES
        a = _from_lanes(a.reshape(planes, -1, blocks, LANES, LANES)).swapaxes(2, 3)
        a = a.reshape(planes, -1, blocks * LANES)[:, :s, :cols]
    array = np.ascontiguousarray(a).reshape(shape)
    return array if dtype is DType.BF16 else array.view(_NUMPY[dtype])


def _bits(array: NDArray[np.generic]) -> NDArray[np.generic]:
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(_BITS[contiguous.dtype.itemsize])


_NUMPY: dict[DType, type[np.generic]] = {
    DType.F32: np.float32, DType.I32: np.int32, DType.U32: np.uint32, DType.U8: np.uint8,
}  # fmt: skip
