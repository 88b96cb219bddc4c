"""The pool band: blocks for capsules, taken and given back; it never grows.

IS: a first-fit allocator with coalescing over one range. IS NOT: memory, or policy (eviction). It
exists because a sealed engine may not allocate: capsules live in room that was planned for them.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping

from flashrt.base.errors import PlanError, PoolFull
from flashrt.core.planner import align


class Pool:
    """Blocks in [offset, offset + nbytes), each a multiple of 256 bytes."""

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self._free: list[tuple[int, int]] = [(offset, nbytes)] if nbytes else []  # (offset, nbytes)
        self._used: dict[int, int] = {}

    @property
    def free_nbytes(self) -> int:
        """Bytes free, possibly in several pieces."""
        return sum(n for _, n in self._free)

    @property
    def used_nbytes(self) -> int:
        """Bytes in blocks."""
        return sum(self._used.values())

    def take(self, *sizes: int) -> tuple[int, ...]:
        """Offsets of blocks of the given sizes (0 gives offset -1): all of them, or PoolFull and
        nothing.
        """
        taken: list[int] = []
        free = self._free
        for size in sizes:
            if not size:
                taken.append(-1)
                continue
            nbytes = align(size)
            for i, (offset, room) in enumerate(free):
                if room >= nbytes:
                    if room == nbytes:
                        del free[i]
                    else:
                        free[i] = (offset + nbytes, room - nbytes)
                    self._used[offset] = nbytes
                    taken.append(offset)
                    break
            else:
                for done in taken:
                    self.give(done)
                raise self._full(size)
        return tuple(taken)

    def give(self, offset: int) -> None:
        """Give a block back; -1 is no block."""
        if offset == -1:
            return
        try:
            nbytes = self._used.pop(offset)
        except KeyError:
            raise PlanError(f"pool: {offset} is not a block in use") from None
        at = bisect.bisect_left(self._free, (offset, 0))
        if at < len(self._free) and offset + nbytes == self._free[at][0]:
            nbytes += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == offset:
            offset, before = self._free.pop(at - 1)
            nbytes += before
            at -= 1
        self._free.insert(at, (offset, nbytes))

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(offset, nbytes) of all blocks, ascending."""
        return sorted(self._used.items())

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """(offset, nbytes) of all free pieces, ascending."""
        return list(self._free)

    def rebuild(self, used: Mapping[int, int]) -> None:
        """Blocks in use are these, of so many bytes, and no others."""
        blocks = {offset: align(nbytes) for offset, nbytes in used.items()}
        free, at = list[tuple[int, int]](), self.offset
        for offset, nbytes in sorted(blocks.items()):
            if offset > at:
                free.append((at, offset - at))
            at = offset + nbytes
        if at < self.offset + self.nbytes:
            free.append((at, self.offset + self.nbytes - at))
        self._free, self._used = free, blocks

    def check_integrity(self) -> None:
        """Free and used pieces tile the pool. Raises PlanError."""
        pieces = sorted([*self._free, *self._used.items()])
        gaps = [a for a, b in itertools.pairwise(pieces) if sum(a) != b[0]]
        if gaps or sum(n for _, n in pieces) != self.nbytes:
            raise PlanError(f"pool pieces do not tile it: {gaps}")

    def _full(self, size: int) -> PoolFull:
        largest = max((n for _, n in self._free), default=0)
        return PoolFull(
            f"the capsule pool has no room for {size} bytes (free {self.free_nbytes} of "
            f"{self.nbytes}, largest piece {largest}); drop capsules or load with a larger "
            "pool_bytes"
        )
