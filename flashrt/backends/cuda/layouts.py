"""How the CUDA backend stores each layout: weights as tensor-core operands, all else in C order.

IS: sizes, packing and unpacking with numpy. IS NOT: the index functions of the kernels; a matrix
lies as cuda_src/weights.cuh says, and tests compare the two.

Matrix [N, K]: row tiles of 16, each a run of chunks of 32 k, then the planes of scales; zeros fill
N to 16 and K to 32. A float32 matrix is not for tensor cores alone (`dense`): C order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import BackendError
from flashrt.core.backend import Bytes, Storage
from flashrt.core.digest import LAYOUT_CODE
from flashrt.core.groups import Groups, Plane, Planes, Scales
from flashrt.core.region import CODE_DTYPES, ActDTypes, DType, Layout, Region, Role, resolve_dtype

ROW_TILE, K_CHUNK = 16, 32
_CACHED_ELEMENTS: Final = 1 << 20  # packed at a time
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_NUMPY: dict[DType, type[np.generic]] = {
    DType.F32: np.float32, DType.BF16: np.uint16, DType.BF16X2: np.uint32,
    DType.I32: np.int32, DType.U32: np.uint32, DType.U8: np.uint8, DType.F16: np.float16,
    DType.I8: np.int8, DType.E4M3: np.uint8,
}  # fmt: skip
_E4M3_NAN: Final = 0x7F  # without the sign


def _padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _is_tiled(region: Region) -> bool:
    return region.layout is Layout.MATRIX and region.dtype is not DType.F32


def _is_coded_matrix(region: Region) -> bool:
    """Codes of keys and values lie like other rows, their scales in a region beside them."""
    return region.layout is Layout.MATRIX and region.dtype in CODE_DTYPES


def _code_bytes(region: Region) -> int:
    """Of a row tile."""
    return _padded(region.shape[1], K_CHUNK) * ROW_TILE * region.dtype.bits // 8


def _plane_groups(plane: Plane, k: int) -> int:
    """Groups of a row, those that pad K to whole chunks included."""
    return -(-_padded(k, K_CHUNK) // plane.size) if plane.size else 1


def _tile_bytes(region: Region) -> int:
    planes = region.groups.planes if region.groups is not None else ()
    groups = (_plane_groups(p, region.shape[1]) * p.dtype.itemsize for p in planes)
    return _code_bytes(region) + ROW_TILE * sum(groups)


def storage(region: Region, acts: ActDTypes) -> Storage:
    """Bytes of a region, per leading entry, and per row for rows."""
    if _is_tiled(region):
        tile_bytes = _tile_bytes(region)
        n_tiles = -(-region.shape[0] // ROW_TILE)
        return Storage(n_tiles * tile_bytes, tile_bytes // ROW_TILE)
    item = resolve_dtype(region.dtype, acts).nbytes
    if region.role is Role.ROWS:
        planes, positions, cols = region.shape
        return Storage(
            planes * positions * cols * item, positions * cols * item, cols * item, granule=1
        )
    return Storage(region.size * item, region.size * item // region.shape[0])


def digest_layout(region: Region) -> int:
    """Rows are in C order, whatever they are for."""
    del region
    return LAYOUT_CODE["plain"]


def pack(region: Region, array: NDArray[np.generic] | Planes, out: Bytes, acts: ActDTypes) -> None:
    """Logical array -> storage bytes. float32 for an activation region is rounded, or split.

    A NaN among float8 codes becomes a NaN scale of its group, or of its row where scales of groups
    are float8 too: a sum over the row is NaN either way. Raises BackendError for planes where the
    region wants an array, or an array where it wants planes.
    """
    if isinstance(array, Planes):
        _pack_planes(region, array, out)
        return
    if _is_coded_matrix(region):
        raise BackendError(
            f"region {region.name!r} is a matrix of codes: it is packed from Planes, in groups"
        )
    dtype = resolve_dtype(region.dtype, acts)
    a = _to_dtype(array, dtype) if region.dtype in (DType.ACT, DType.ACT_WIDE) else array
    bits = np.ascontiguousarray(a).view(_BITS[dtype.nbytes])
    if not _is_tiled(region):
        out.view(_BITS[dtype.nbytes])[:] = bits.reshape(-1)
        return
    _each_tile(region, bits.reshape(region.shape), out, lambda tiles: [_halves(tiles)])


def _pack_planes(region: Region, rows: Planes, out: Bytes) -> None:
    groups = region.groups
    if groups is None or rows.shape != region.shape or len(rows.scales) != len(groups.planes):
        raise BackendError(
            f"region {region.name!r}: {region.shape} in groups {groups} does not take "
            f"{len(rows.scales)} planes of {rows.shape}"
        )
    n, k = region.shape
    dtype = region.dtype
    scales = _scales_with_nans(dtype, groups, rows)
    codes = rows.codes.view(np.uint8)
    _each_tile(region, codes, out, _PACKERS[dtype])
    tiles = out.reshape(-1, _tile_bytes(region))
    at = _code_bytes(region)
    for plane, values in zip(groups.planes, scales, strict=True):
        n_groups = _plane_groups(plane, k)
        nbytes = n_groups * ROW_TILE * plane.dtype.itemsize
        bits = _BITS[plane.dtype.itemsize]
        padded = np.zeros((len(tiles) * ROW_TILE, n_groups), bits)
        padded[:n, : values.shape[1]] = np.ascontiguousarray(values, plane.dtype).view(bits)
        # [tile][row of two][g][group] -> [tile][group][g][row of two]
        stored = padded.reshape(-1, 2, 8, n_groups).transpose(0, 3, 2, 1)
        tiles[:, at : at + nbytes] = (
            np.ascontiguousarray(stored).reshape(len(tiles), -1).view(np.uint8)
        )
        at += nbytes


def _scales_with_nans(
    dtype: DType, groups: Groups, rows: Planes
) -> tuple[NDArray[np.generic], ...]:
    """The planes, with the NaNs of codes: kernels take a code for a number without looking."""
    scales = list(rows.scales)
    is_float8 = groups.scales in (Scales.E4M3_TIMES, Scales.E4M3_OVER)
    spoilt = np.zeros(scales[0].shape, bool)  # groups of the first plane
    if dtype is DType.E4M3:
        wrong = (rows.codes.view(np.uint8) & 0x7F) == _E4M3_NAN
        if wrong.any():
            starts = np.arange(0, rows.shape[1], groups.planes[0].size)
            spoilt |= np.logical_or.reduceat(wrong, starts, axis=1)
    if is_float8:
        spoilt |= (scales[0].view(np.uint8) & 0x7F) == _E4M3_NAN
        if spoilt.any():
            scales[1] = np.where(spoilt.any(axis=1, keepdims=True), np.float32(np.nan), scales[1])
    elif spoilt.any():
        scales[0] = np.where(spoilt, scales[0].dtype.type(np.nan), scales[0])
    return tuple(scales)


_Tiles = NDArray[np.generic]  # [tile][half][g][chunk][t][step][pair][k of two]
_Packer = Callable[[_Tiles], list[NDArray[np.generic]]]


def _each_tile(region: Region, rows: NDArray[np.generic], out: Bytes, packer: _Packer) -> None:
    """Codes of all row tiles, some tiles at a time; `packer` gives the runs of a chunk."""
    k = region.shape[1]
    chunks = _padded(k, K_CHUNK) // K_CHUNK
    tile_bytes, code_bytes = _tile_bytes(region), _code_bytes(region)
    target = out.reshape(-1, tile_bytes)[:, :code_bytes].reshape(-1, chunks, code_bytes // chunks)
    step = max(1, _CACHED_ELEMENTS // (ROW_TILE * chunks * K_CHUNK))
    for first in range(0, len(target), step):
        last = min(len(target), first + step)
        part = rows[first * ROW_TILE : last * ROW_TILE]
        short = ((0, (last - first) * ROW_TILE - len(part)), (0, chunks * K_CHUNK - k))
        padded = np.pad(part, short) if any(map(any, short)) else part
        at = 0
        for run in packer(_by_lane(padded, region.groups)):
            raw = np.ascontiguousarray(run).view(np.uint8).reshape(last - first, chunks, -1)
            target[first:last, :, at : at + raw.shape[2]] = raw
            at += raw.shape[2]


def _by_lane(rows: NDArray[np.generic], groups: Groups | None) -> _Tiles:
    """Rows of whole tiles and chunks: which k a lane takes in a step depends on the groups."""
    chunks = rows.shape[1] // K_CHUNK
    if groups is not None and groups.size == 16:  # [..][step][t]: a step is a group
        return rows.reshape(-1, 2, 8, chunks, 2, 4, 2, 2).swapaxes(4, 5)
    return rows.reshape(-1, 2, 8, chunks, 4, 2, 2, 2)


def _halves(tiles: _Tiles) -> NDArray[np.generic]:
    """16 bits: [tile][chunk][step][g][t][pair][half][k]."""
    return tiles.transpose(0, 3, 5, 2, 4, 6, 1, 7)


def _bytes(tiles: _Tiles) -> list[NDArray[np.generic]]:
    """8 bits: [tile][chunk][g][t][step][pair][k][half]."""
    return [tiles.transpose(0, 3, 2, 4, 5, 6, 7, 1)]


def _codes(tiles: _Tiles) -> NDArray[np.uint8]:
    """[tile][chunk][g][t][step][k][pair][half]."""
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 4, 5, 7, 6, 1)).view(np.uint8)


def _nibbles(tiles: _Tiles) -> list[NDArray[np.generic]]:
    """Low four bits: a word per step, register 2 pair + half in bits 4 (2 pair + half) of both."""
    codes = _codes(tiles)
    return [codes[..., 0] & 15 | codes[..., 1] << 4]


def _five_bits(tiles: _Tiles) -> list[NDArray[np.generic]]:
    high = np.ascontiguousarray(np.moveaxis(_codes(tiles) >> 4, 5, 4))  # ..[k][step][pair][half]
    packed = np.packbits(high.reshape(*high.shape[:5], 8) & 1, axis=-1, bitorder="little")
    return [*_nibbles(tiles), packed]


def _six_bits(tiles: _Tiles) -> list[NDArray[np.generic]]:
    high = np.moveaxis(_codes(tiles) >> 4 & 3, 5, 4)  # ..[k][step][pair][half]
    packed = high[..., 0, 0] | high[..., 0, 1] << 2 | high[..., 1, 0] << 4 | high[..., 1, 1] << 6
    return [*_nibbles(tiles), packed]


_PACKERS: Final[dict[DType, _Packer]] = {
    DType.I8: _bytes, DType.E4M3: _bytes, DType.U4: _nibbles, DType.E2M1: _nibbles,
    DType.U5: _five_bits, DType.U6: _six_bits,
}  # fmt: skip


def unpack(region: Region, raw: Bytes, acts: ActDTypes) -> NDArray[np.generic]:
    """Storage bytes -> logical array; bfloat16 as uint16 bits, pairs hi + lo as their sum.

    Raises BackendError for a matrix of codes.
    """
    if _is_coded_matrix(region):
        raise BackendError(f"region {region.name!r} is a matrix of codes: it has no way back")
    dtype = resolve_dtype(region.dtype, acts)
    stored: NDArray[np.generic] = raw.view(_BITS[dtype.nbytes])
    if _is_tiled(region):
        n, k = region.shape
        tiles, chunks = _padded(n, ROW_TILE) // ROW_TILE, _padded(k, K_CHUNK) // K_CHUNK
        # [tile][chunk][step][g][t][pair][half][k of two]
        blocks = stored.reshape(tiles, chunks, 2, 8, 4, 2, 2, 2).transpose(0, 6, 3, 1, 4, 2, 5, 7)
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
