"""Copy plans: descriptors of 2-D byte copies, computed before anything moves.

IS: pure data; a plan can be checked, counted and compared without touching memory. IS NOT: the
copy; a backend runs a plan as one batch. Called by: capsule (snapshot, restore, fork), backends
(execute), tests (assert bytes).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import PlanError


@dataclass(frozen=True, slots=True)
class Copy:
    """`height` rows of `width` bytes, from arena offset `src` to arena offset `dst`, each side with
    its own pitch.
    """

    src: int
    dst: int
    width: int
    height: int = 1
    src_pitch: int = 0
    dst_pitch: int = 0

    FORMAT = (
        "@6Q"  # the descriptor as kernels read it: src, dst, width, height, src_pitch, dst_pitch
    )

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1 or self.src < 0 or self.dst < 0:
            raise PlanError(
                f"copy of {self.height} x {self.width} bytes from {self.src} to {self.dst}"
            )
        if self.height > 1 and min(self.src_pitch, self.dst_pitch) < self.width:
            raise PlanError(
                f"copy pitch {self.src_pitch} -> {self.dst_pitch} is under the width {self.width}"
            )

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


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Copies whose destinations do not overlap any other copy's source or destination: they may run
    in any order.
    """

    copies: tuple[Copy, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes moved by the whole plan."""
        return sum(c.nbytes for c in self.copies)

    def __iter__(self) -> Iterator[Copy]:
        return iter(self.copies)

    def __add__(self, other: CopyPlan) -> CopyPlan:
        return CopyPlan(self.copies + other.copies)

    def pack(self, src_base: int, dst_base: int) -> bytes:
        """The descriptor table with absolute addresses."""
        return b"".join(
            struct.pack(
                Copy.FORMAT,
                src_base + c.src,
                dst_base + c.dst,
                c.width,
                c.height,
                c.src_pitch,
                c.dst_pitch,
            )
            for c in self.copies
        )

    def check(self, arena_nbytes: int) -> None:
        """Every byte lies in the arena. Raises PlanError."""
        for c in self.copies:
            if c.src_span[1] > arena_nbytes or c.dst_span[1] > arena_nbytes:
                raise PlanError(f"{c} leaves the arena of {arena_nbytes} bytes")


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """Bytes from the host to an arena offset."""

    dst: int
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """Copies within the device, and writes from the host: destinations do not overlap."""

    device: CopyPlan
    writes: tuple[Write, ...] = ()

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Those within the device."""
        return self.device.copies

    @property
    def nbytes(self) -> int:
        """Bytes moved by the whole plan."""
        return self.device.nbytes + sum(w.data.nbytes for w in self.writes)

    def __iter__(self) -> Iterator[Copy]:
        return iter(self.device)


def plan_of(copies: Iterable[Copy]) -> CopyPlan:
    """A plan of the copies given."""
    return CopyPlan(tuple(copies))
