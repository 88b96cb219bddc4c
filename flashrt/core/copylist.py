"""Copy lists: descriptors of 2-D byte copies, computed and checked before anything moves.

IS: pure data; a list can be checked, counted and compared without touching memory. IS NOT: the
copying: a backend runs a whole list at once, in any order. It exists so that a snapshot, restore or
fork is refused before its first byte moves, and so that tests can assert which bytes move.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PlanError

COPY_FORMAT = "@6Q"  # a descriptor as kernels read it: the fields of Copy, addresses absolute
_Side = tuple[int, int, int, int]  # offset, width, height, pitch: what a copy reads, or writes


class Copy(NamedTuple):
    """`height` rows of `width` bytes, from offset `src` to offset `dst`, each side with its own
    pitch. A plain tuple, checked as part of a list, because every restore makes some.
    """

    src: int
    dst: int
    width: int
    height: int = 1
    src_pitch: int = 0
    dst_pitch: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes moved."""
        return self.width * self.height


class CopyList(tuple[Copy, ...]):
    """Copies whose destinations overlap neither each other nor any source: they may run in any
    order, or at once. A list that runs again remembers its table.
    """

    nbytes: int  # moved by the whole list
    _bases: tuple[int, int] | None = None
    _table = b""

    def __new__(cls, copies: Iterable[Copy] = ()) -> CopyList:
        """Of these copies, in this order."""
        self = super().__new__(cls, copies)
        self.nbytes = sum([width * height for _, _, width, height, _, _ in self])
        return self

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Itself."""
        return self

    def pack(self, src_base: int, dst_base: int) -> bytes:
        """The descriptor table with absolute addresses."""
        if self._bases != (src_base, dst_base):
            words: list[int] = []
            for src, dst, width, height, src_pitch, dst_pitch in self:
                words += (src_base + src, dst_base + dst, width, height, src_pitch, dst_pitch)
            self._table = struct.pack(f"@{len(words)}Q", *words)
            self._bases = src_base, dst_base
        return self._table

    def check(self, dst_nbytes: int, src_nbytes: int | None = None) -> CopyList:
        """The list itself, if every byte lies in its memory and no two copies collide.

        `src_nbytes`: the size of a source that is other memory; None: both sides are offsets in the
        same `dst_nbytes`. Raises PlanError naming the copies.
        """
        is_same_memory = src_nbytes is None
        limit = dst_nbytes if src_nbytes is None else src_nbytes
        first_read = first_written = limit if limit > dst_nbytes else dst_nbytes
        last_read = last_written = 0
        is_ascending = True  # each copy writes behind all before it: the usual list, and disjoint
        for copy in self:
            src, dst, width, height, src_pitch, dst_pitch = copy
            if width < 1 or height < 1 or src < 0 or dst < 0:
                raise PlanError(f"{copy} is no copy")
            src_stop, dst_stop = src + width, dst + width
            if height > 1:
                if src_pitch < width or dst_pitch < width:
                    raise PlanError(f"{copy}: a pitch is under the width")
                src_stop += (height - 1) * src_pitch
                dst_stop += (height - 1) * dst_pitch
            if src_stop > limit or dst_stop > dst_nbytes:
                raise PlanError(f"{copy} leaves {limit} bytes of source or {dst_nbytes}")
            if dst < last_written:
                is_ascending = False
            # Calls of min and max would take as long as all the rest.
            if src < first_read:  # noqa: PLR1730
                first_read = src
            if src_stop > last_read:  # noqa: PLR1730
                last_read = src_stop
            if dst < first_written:  # noqa: PLR1730
                first_written = dst
            if dst_stop > last_written:  # noqa: PLR1730
                last_written = dst_stop
        if not is_ascending:
            require_disjoint(self)
        if is_same_memory and first_read < last_written and first_written < last_read:
            _require_unread(self)
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """Copies from bytes of the host, uint8; `src` is an offset among them."""

    source: NDArray[np.uint8]
    moves: CopyList


def require_disjoint(copies: Sequence[Copy]) -> None:
    """No byte is written by two copies. Raises PlanError naming the two.

    By ascending offset. A copy that begins behind all before it begins a comb: copies of the same
    pitch that follow it within its first pitch interleave with it, and are disjoint in every row if
    they are in the first. The segments of a region are such a comb, so a restore is checked in n
    log n. Whatever overlaps otherwise is compared exactly, with each copy before it.
    """
    sides = sorted([(c[1], c[2], c[3], c[5], i) for i, c in enumerate(copies)])
    reach = comb_stop = comb_free = comb_pitch = 0
    for n, (at, width, height, pitch, i) in enumerate(sides):
        if at >= reach:
            comb_stop, comb_free, comb_pitch = at + pitch, at + width, pitch
        elif pitch == comb_pitch and at >= comb_free and at + width <= comb_stop:
            comb_free = at + width
        else:
            comb_pitch = -1  # no comb any more
            for other in sides[:n]:
                if _overlap((at, width, height, pitch), other[:4]):
                    raise PlanError(f"{copies[other[4]]} and {copies[i]} write the same bytes")
        reach = max(reach, at + (height - 1) * pitch + width)


def _require_unread(copies: Sequence[Copy]) -> None:
    """No byte that is written is read by the list, not even by the same copy. Raises PlanError."""
    spans = [(c[0], c[0] + (c[3] - 1) * c[4] + c[2], i, False) for i, c in enumerate(copies)]
    spans += [(c[1], c[1] + (c[3] - 1) * c[5] + c[2], i, True) for i, c in enumerate(copies)]
    live: dict[bool, list[tuple[int, int]]] = {False: [], True: []}  # (stop, copy) of each kind
    for at, stop, i, is_write in sorted(spans):
        live[not is_write] = [span for span in live[not is_write] if span[0] > at]
        for _, j in live[not is_write]:
            reader, writer = copies[j if is_write else i], copies[i if is_write else j]
            read = (reader.src, reader.width, reader.height, reader.src_pitch)
            if _overlap(read, (writer.dst, writer.width, writer.height, writer.dst_pitch)):
                raise PlanError(f"{writer} writes what {reader} reads")
        live[is_write].append((stop, i))


def _overlap(one: _Side, other: _Side) -> bool:
    """Whether two pitched ranges share a byte; exact for all pitches and heights."""
    (at, width, height, pitch), (first, wide, rows, step) = sorted((one, other), key=lambda s: s[2])
    for begin in range(at, at + height * pitch, pitch) if height > 1 else (at,):
        # the first row of the other that ends beyond `begin`
        row = max(0, (begin - wide - first) // step + 1) if rows > 1 else 0
        if row < rows and first + row * step < begin + width and begin < first + row * step + wide:
            return True
    return False
