"""Copy plans: descriptors of 2-D byte copies, computed before anything moves.

IS: pure data; a plan can be checked, counted and compared without touching memory. IS NOT: the
copy; a backend runs a plan as one batch. Called by: capsule (snapshot, restore, fork), backends
(execute), tests (assert bytes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PlanError

COPY_FORMAT = "@6Q"  # a descriptor as kernels read it: the fields of Copy, addresses absolute


class Copy(NamedTuple):
    """`height` rows of `width` bytes, from offset `src` to offset `dst`, each side with its own
    pitch. A tuple, and checked as part of a plan: a restore makes them on its way.
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

    @property
    def src_span(self) -> tuple[int, int]:
        """[first, last + 1) byte read."""
        return self.src, self.src + (self.height - 1) * self.src_pitch + self.width

    @property
    def dst_span(self) -> tuple[int, int]:
        """[first, last + 1) byte written."""
        return self.dst, self.dst + (self.height - 1) * self.dst_pitch + self.width


class CopyPlan:
    """Copies whose destinations do not overlap any other copy's source or destination: they may run
    in any order. Immutable; a plan that runs again remembers its table.
    """

    __slots__ = ("_bases", "_table", "copies", "nbytes")

    def __init__(self, copies: Iterable[Copy] = ()) -> None:
        self.copies = tuple(copies)
        self.nbytes = sum([c.width * c.height for c in self.copies])  # moved by the whole plan
        self._bases: tuple[int, int] | None = None
        self._table = b""

    def __iter__(self) -> Iterator[Copy]:
        return iter(self.copies)

    def pack(self, src_base: int, dst_base: int) -> bytes:
        """The descriptor table with absolute addresses."""
        if self._bases != (src_base, dst_base):
            words: list[int] = []
            for src, dst, *shape in self.copies:
                words += (src_base + src, dst_base + dst, *shape)
            self._table = struct.pack(f"@{len(words)}Q", *words)
            self._bases = src_base, dst_base
        return self._table

    def check(self, dst_nbytes: int, src_nbytes: int | None = None) -> CopyPlan:
        """The plan itself; every byte lies in the arena, or in a source and the arena. Raises
        PlanError.
        """
        if src_nbytes is None:
            src_nbytes = dst_nbytes
        for copy in self.copies:
            src, dst, width, height, src_pitch, dst_pitch = copy
            if width < 1 or height < 1 or src < 0 or dst < 0:
                raise PlanError(f"{copy} is no copy")
            if height > 1 and min(src_pitch, dst_pitch) < width:
                raise PlanError(f"{copy}: a pitch is under the width")
            if (
                src + (height - 1) * src_pitch + width > src_nbytes
                or dst + (height - 1) * dst_pitch + width > dst_nbytes
            ):
                raise PlanError(f"{copy} leaves {src_nbytes} bytes of source or {dst_nbytes}")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """Copies from bytes of the host, uint8; `src` is an offset among them."""

    source: NDArray[np.uint8]
    plan: CopyPlan
