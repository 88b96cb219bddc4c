"""How the CPU stores each layout: panels of 32 rows, so that output rows (or keys, or columns) sit
in vector lanes.

IS: sizes, and numpy statements of the index functions in kernels/common.h and kernels/stored.h. IS
NOT: the fast packing of weights, which is C (kernels/pack.c). Sources: the order is the one
measured in docs/exactness.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PlanError
from flashrt.core.backend import Bytes, Storage
from flashrt.core.groups import Groups, Plane, Planes
from flashrt.core.region import CODE_DTYPES, ActDTypes, DType, Layout, Region, Role, resolve_dtype

LANES = 32  # rows of a panel, positions of a granule, columns of a state block
SLICE = 256  # columns of codes that lie together with their scales
UNIT = 32  # columns that codes are filled up to
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _ceil(n: int) -> int:
    return -(-n // LANES) * LANES


def storage(region: Region, acts: ActDTypes) -> Storage:
    """Bytes of a region, per leading entry, and per row for rows."""
    if region.dtype in CODE_DTYPES and region.layout is Layout.MATRIX:
        n, k = region.shape
        panel = sum(_slice_nbytes(region, columns) for columns in _slices(k))
        return Storage(_ceil(n) // LANES * panel, panel // LANES)
    item = resolve_dtype(region.dtype, acts).nbytes
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


def groups_of(region: Region) -> Groups:
    """Of a matrix of codes. Raises PlanError where there are none: codes alone are no values."""
    if region.groups is None:
        raise PlanError(f"region {region.name!r}: a matrix of {region.dtype} needs groups")
    return region.groups


def _slices(k: int) -> list[range]:
    """Columns of each slice, filled up."""
    filled = -(-k // UNIT) * UNIT
    return [range(k0, min(k0 + SLICE, filled)) for k0 in range(0, k, SLICE)]


def _plane_columns(plane: Plane, columns: range) -> range:
    """Elements of a plane's row that belong to a slice."""
    if not plane.size:
        return range(1)
    first = columns.start // plane.size
    return range(first, first + -(-len(columns) // plane.size))


def _slice_nbytes(region: Region, columns: range) -> int:
    """Of a panel."""
    planes = groups_of(region).planes
    scales = sum(len(_plane_columns(p, columns)) * p.dtype.itemsize for p in planes)
    return (scales + len(columns) * region.dtype.bits // 8) * LANES


def _to_lanes(rows: NDArray[np.generic], dtype: DType) -> NDArray[np.generic]:
    """Last axis of 32 to stored order: bfloat16 pairs (j, j + 16) share a word; others stay."""
    if dtype is not DType.BF16:
        return rows
    return np.stack([rows[..., :16], rows[..., 16:]], axis=-1).reshape(rows.shape)


def _from_lanes(rows: NDArray[np.generic], dtype: DType) -> NDArray[np.generic]:
    if dtype is not DType.BF16:
        return rows
    pairs = rows.reshape(*rows.shape[:-1], 16, 2)
    return np.concatenate([pairs[..., 0], pairs[..., 1]], axis=-1)


def _pad(array: NDArray[np.generic], axis: int) -> NDArray[np.generic]:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, _ceil(array.shape[axis]) - array.shape[axis])
    return np.pad(array, widths)


def pack(region: Region, array: NDArray[np.generic]) -> Bytes:
    """Logical array -> storage bytes."""
    a, dtype = _bits(array), region.dtype
    if region.layout is Layout.MATRIX:  # [N, K] -> [panel][k][lane]
        p = _pad(a, 0)
        a = _to_lanes(p.reshape(-1, LANES, p.shape[1]).transpose(0, 2, 1), dtype)
    elif region.layout is Layout.COLUMN_BLOCKS:  # [..., rows, cols] -> [..., block][row][lane]
        p = _pad(a, a.ndim - 1)
        a = p.reshape(*p.shape[:-1], -1, LANES).swapaxes(-2, -3)
    elif region.layout is Layout.ROWS_IN_LANES:  # [planes, S, cols] -> [planes][granule][col][lane]
        p = _pad(a, 1)
        a = _to_lanes(p.reshape(p.shape[0], -1, LANES, p.shape[2]).swapaxes(2, 3), dtype)
    elif region.layout is Layout.COLS_IN_LANES:  # -> [planes][granule][col block][position][lane]
        p = _pad(_pad(a, 1), 2)
        p = p.reshape(p.shape[0], -1, LANES, p.shape[2] // LANES, LANES)
        a = _to_lanes(p.swapaxes(2, 3), dtype)
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def check_planes(region: Region, planes: Planes) -> None:
    """Raises PlanError unless the arrays are those of the region, in shape and dtype."""
    n, k = region.shape
    code: np.dtype[np.generic] = np.dtype(np.int8 if region.dtype is DType.I8 else np.uint8)
    wanted = [((n, k), code)]
    wanted += [((n, -(-k // p.size) if p.size else 1), p.dtype) for p in groups_of(region).planes]
    given = [(a.shape, a.dtype) for a in (planes.codes, *planes.scales)]
    if given != wanted:
        raise PlanError(f"region {region.name!r}: planes are {wanted}, got {given}")


def pack_planes(region: Region, planes: Planes) -> Bytes:
    """Codes and scales -> storage bytes."""
    check_planes(region, planes)
    n, k = region.shape
    filled = np.zeros((_ceil(n), -(-k // UNIT) * UNIT), np.uint8)
    filled[:n, :k] = planes.codes.view(np.uint8)
    parts = []  # of all slices, [panel][bytes]
    for columns in _slices(k):
        for plane, array in zip(groups_of(region).planes, planes.scales, strict=True):
            of_slice = _plane_columns(plane, columns)
            there = array[:, of_slice.start : of_slice.stop]
            scales = np.zeros((_ceil(n), len(of_slice)), plane.dtype)
            scales[:n, : there.shape[1]] = there
            parts.append(_panels(scales))
        codes = filled[:, columns.start : columns.stop]
        parts.append(_panels(codes if region.dtype is DType.E4M3 else _words(codes, region.dtype)))
    return np.concatenate(parts, axis=1).reshape(-1)


def _panels(rows: NDArray[np.generic]) -> Bytes:
    """[N, items] -> [panel][item][32 rows], as bytes of each panel."""
    lanes = np.ascontiguousarray(rows.reshape(-1, LANES, rows.shape[1]).swapaxes(1, 2))
    return lanes.reshape(len(lanes), -1).view(np.uint8)


def _words(codes: Bytes, dtype: DType) -> NDArray[np.uint32]:
    """Codes [N, columns], whole units -> words [N, ...], see kernels/stored.h."""
    four = np.ascontiguousarray(codes).view("<u4").reshape(len(codes), -1, UNIT // 8, 2)
    if dtype is DType.I8:
        return (four ^ np.uint32(0x80808080)).reshape(len(codes), -1)
    low = four & np.uint32(0x0F0F0F0F)
    words = [low[..., 0] | low[..., 1] << np.uint32(4)]
    turns = four.reshape(*four.shape[:2], UNIT // 4) >> np.uint32(4)  # low, high nibbles in turn
    if dtype is DType.U5:
        bits = (turns & np.uint32(0x01010101)) << np.arange(8, dtype=np.uint32)
        words.append(np.bitwise_or.reduce(bits, axis=-1, keepdims=True))
    elif dtype is DType.U6:
        pairs = (turns & np.uint32(0x03030303)).reshape(*turns.shape[:2], 2, 4)
        pairs = pairs << np.arange(0, 8, 2, dtype=np.uint32)
        words.append(np.bitwise_or.reduce(pairs, axis=-1))
    return np.concatenate(words, axis=-1).reshape(len(codes), -1)


def unpack(region: Region, raw: Bytes, acts: ActDTypes) -> NDArray[np.generic]:
    """Storage bytes -> logical array, bfloat16 as uint16 bits. Raises PlanError for a matrix in
    groups, which nobody reads back.
    """
    if region.groups is not None:
        raise PlanError(f"region {region.name!r}: a quantised matrix is not unpacked")
    dtype = resolve_dtype(region.dtype, acts)
    a: NDArray[np.generic] = raw.view(_BITS[dtype.nbytes])
    shape = region.shape
    if region.layout is Layout.MATRIX:
        n, k = shape
        a = _from_lanes(a.reshape(-1, k, LANES), dtype).transpose(0, 2, 1).reshape(-1, k)[:n]
    elif region.layout is Layout.COLUMN_BLOCKS:
        *lead, rows, cols = shape
        a = a.reshape(*lead, -1, rows, LANES).swapaxes(-2, -3).reshape(*lead, rows, -1)[..., :cols]
    elif region.layout is Layout.ROWS_IN_LANES:
        planes, s, cols = shape
        a = _from_lanes(a.reshape(planes, -1, cols, LANES), dtype).swapaxes(2, 3)
        a = a.reshape(planes, -1, cols)[:, :s]
    elif region.layout is Layout.COLS_IN_LANES:
        planes, s, cols = shape
        blocks = _ceil(cols) // LANES
        a = _from_lanes(a.reshape(planes, -1, blocks, LANES, LANES), dtype).swapaxes(2, 3)
        a = a.reshape(planes, -1, blocks * LANES)[:, :s, :cols]
    array = np.ascontiguousarray(a).reshape(shape)
    return array if dtype is DType.BF16 else array.view(_NUMPY[dtype])


def _bits(array: NDArray[np.generic]) -> NDArray[np.generic]:
    contiguous = np.ascontiguousarray(array)
    return contiguous.view(_BITS[contiguous.dtype.itemsize])


_NUMPY: dict[DType, type[np.generic]] = {
    DType.F32: np.float32, DType.I32: np.int32, DType.U32: np.uint32, DType.U8: np.uint8,
    DType.F16: np.float16, DType.I8: np.int8, DType.E4M3: np.uint8,
}  # fmt: skip
