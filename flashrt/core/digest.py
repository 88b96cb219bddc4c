"""The digest: a 128-bit value of live state, position-mixed and independent of the order in which
words are visited.

IS: its one definition (numpy), and the terms a backend's kernel is given; kernels get the constants
from the generated header. IS NOT: the fast path; every backend computes it by a kernel.

Sums do not depend on the order, so kernels are free to visit elements as they are stored; appended
rows add terms.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# For each logical element (plane p, row r, column c) with bits v (zero-extended to 64), arithmetic
# modulo 2^64:
#     key = seed + p * A + r * B + c * C
#     lo += fmix(key ^ (v + 1) * D)          hi += fmix((key + E) * D ^ (v + 1) * F)
#     fmix(z): z ^= z >> 32; z *= G; z ^= z >> 29; z *= H; z ^= z >> 32
A, B, C = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
D, E, F = 0xFF51AFD7ED558CCD, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB
G, H = 0xD6E8FEB86659FD93, 0xC4CEB9FE1A85EC53
CONSTANTS: Mapping[str, int] = {"A": A, "B": B, "C": C, "D": D, "E": E, "F": F, "G": G, "H": H}
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class DigestTerm:
    """Rows [start, stop) of `planes` planes of a region at an arena offset.

    `offset` points at plane 0, row `origin` (a segment starts at the granule that holds its
    parent's position; a lane at row 0); one plane is `pitch` bytes. `layout` is the code in
    LAYOUT_CODE; `elem_nbytes` is 1, 2 or 4. A region that is not rows is one plane of one row, its
    stored elements (padding included) the columns.
    """

    offset: int
    seed: int
    planes: int
    start: int
    stop: int
    origin: int
    cols: int
    pitch: int
    elem_nbytes: int
    layout: int

    FORMAT = "@QQ8q"  # as kernels read it, `offset` made an address

    def pack(self, base: int) -> bytes:
        """The term as kernels read it."""
        rest = (self.planes, self.start, self.stop, self.origin, self.cols, self.pitch)
        tail = (self.elem_nbytes, self.layout)
        return struct.pack(self.FORMAT, base + self.offset, self.seed, *rest, *tail)


LAYOUT_CODE = {"plain": 0, "matrix": 0, "column_blocks": 0, "rows_in_lanes": 1, "cols_in_lanes": 2}


def region_seed(name: str) -> int:
    """Seed of a region's terms: equal names, equal seeds, on every machine."""
    return (zlib.crc32(name.encode()) * A + 1) & _MASK


def _fmix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(32))) * np.uint64(G)
    z = (z ^ (z >> np.uint64(29))) * np.uint64(H)
    return z ^ (z >> np.uint64(32))


def digest_reference(
    bits: NDArray[np.unsignedinteger], seed: int, first_row: int = 0
) -> tuple[int, int]:
    """Sums (lo, hi) over bits [planes, rows, cols]; row 0 of the array is absolute row
    `first_row`.
    """
    planes, rows, cols = bits.shape
    with np.errstate(over="ignore"):
        p = np.arange(planes, dtype=np.uint64)[:, None, None] * np.uint64(A)
        r = (np.arange(rows, dtype=np.uint64) + np.uint64(first_row))[None, :, None] * np.uint64(B)
        c = np.arange(cols, dtype=np.uint64)[None, None, :] * np.uint64(C)
        key = np.uint64(seed) + p + r + c
        v = bits.astype(np.uint64) + np.uint64(1)
        lo = _fmix(key ^ (v * np.uint64(D))).sum(dtype=np.uint64)
        hi = _fmix(((key + np.uint64(E)) * np.uint64(D)) ^ (v * np.uint64(F))).sum(dtype=np.uint64)
    return int(lo), int(hi)


def finish(sums: Sequence[tuple[int, int]], position: int) -> str:
    """Fold per-region sums and the position into 32 hexadecimal digits."""
    lo = (sum(s[0] for s in sums) + (position + 1) * F) & _MASK
    hi = (sum(s[1] for s in sums) + (position + 1) * G) & _MASK
    return f"{lo:016x}{hi:016x}"
