"""How the CUDA backend stores each layout: weights as tensor-core operands, all else in C order.

IS: sizes, packing and unpacking with numpy. IS NOT: the index functions of the kernels; a matrix
lies as cuda_src/linear.cuh says, and a test compares the two.

Matrix [N, K], bfloat16: row tiles of 16, each a run of chunks of 32 k; zeros fill N to 16 and K to
32. A chunk is [2 steps][8 g][4 t][2 rows: g, g + 8][4 k], where k = 8 t + 4 step + 0..3. A float32
matrix is not for tensor cores: C order.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.core.backend import Bytes, Storage
from flashrt.core.digest import LAYOUT_CODE
from flashrt.core.region import DType, Layout, Region, Role, resolve_dtype

ROW_TILE, K_CHUNK = 16, 32
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_NUMPY: dict[DType, type[np.generic]] = {
    DType.F32: np.float32, DType.BF16: np.uint16, DType.BF16X2: np.uint32,
    DType.I32: np.int32, DType.U32: np.uint32, DType.U8: np.uint8,
}  # fmt: skip


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _is_tiled(region: Region) -> bool:
    return region.layout is Layout.MATRIX and region.dtype is not DType.F32


def storage(region: Region, act: DType) -> Storage:
    """Bytes of a region, per leading entry, and per row for rows."""
    item = resolve_dtype(region.dtype, act).nbytes
    if region.role is Role.ROWS:
        planes, positions, cols = region.shape
        return Storage(
            planes * positions * cols * item, positions * cols * item, cols * item, granule=1
        )
    if _is_tiled(region):
        n, k = region.shape
        row_bytes = _padded(k, K_CHUNK) * item
        return Storage(_padded(n, ROW_TILE) * row_bytes, row_bytes)
    return Storage(region.size * item, region.size * item // region.shape[0])


def digest_layout(region: Region) -> int:
    """Rows are in C order, whatever they are for."""
    del region
    return LAYOUT_CODE["plain"]


def pack(region: Region, array: NDArray[np.generic], out: Bytes, act: DType) -> None:
    """Logical array -> storage bytes. float32 for an activation region is rounded, or split."""
    dtype = resolve_dtype(region.dtype, act)
    a = _to_dtype(array, dtype) if region.dtype in (DType.ACT, DType.ACT_WIDE) else array
    bits = np.ascontiguousarray(a).view(_BITS[dtype.nbytes])
    stored = out.view(_BITS[dtype.nbytes])
    if not _is_tiled(region):
        stored[:] = bits.reshape(-1)
        return
    n, k = region.shape
    tiles, chunks = _padded(n, ROW_TILE) // ROW_TILE, _padded(k, K_CHUNK) // K_CHUNK
    target = stored.reshape(tiles, chunks, 2, 8, 4, 2, 4)  # [tile][chunk][step][g][t][half][k]
    step = max(1, (1 << 22) // (ROW_TILE * chunks * K_CHUNK))  # row tiles at a time, in cache
    for first in range(0, tiles, step):
        last = min(tiles, first + step)
        rows = bits.reshape(n, k)[first * ROW_TILE : last * ROW_TILE]
        short = ((0, (last - first) * ROW_TILE - len(rows)), (0, chunks * K_CHUNK - k))
        padded = np.pad(rows, short) if any(map(any, short)) else rows
        source = padded.reshape(-1, 2, 8, chunks, 4, 2, 4)  # [tile][half][g][chunk][t][step][k]
        target[first:last] = source.transpose(0, 3, 5, 2, 4, 1, 6)


def unpack(region: Region, raw: Bytes, act: DType) -> NDArray[np.generic]:
    """Storage bytes -> logical array; bfloat16 as uint16 bits, pairs hi + lo as their sum."""
    dtype = resolve_dtype(region.dtype, act)
    stored: NDArray[np.generic] = raw.view(_BITS[dtype.nbytes])
    if _is_tiled(region):
        n, k = region.shape
        tiles, chunks = _padded(n, ROW_TILE) // ROW_TILE, _padded(k, K_CHUNK) // K_CHUNK
        blocks = stored.reshape(tiles, chunks, 2, 8, 4, 2, 4).transpose(0, 5, 3, 1, 4, 2, 6)
        stored = blocks.reshape(tiles * ROW_TILE, chunks * K_CHUNK)[:n, :k]
    array = np.ascontiguousarray(stored).reshape(region.shape).view(_NUMPY[dtype])
    if dtype is DType.BF16X2:
        bits = array.astype(np.uint32)
        return (bits << 16).view(np.float32) + (bits & 0xFFFF0000).view(np.float32)
    return array


def _to_dtype(array: NDArray[np.generic], dtype: DType) -> NDArray[np.generic]:
    if array.dtype != np.float32:
        return array
    if dtype is DType.F32:
        return array
    hi = array.astype(ml_dtypes.bfloat16)
    if dtype is DType.BF16:
        return hi.view(np.uint16)
    lo = (array - hi.astype(np.float32)).astype(ml_dtypes.bfloat16)
    halves = np.stack([hi.view(np.uint16), lo.view(np.uint16)], axis=-1)
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]
