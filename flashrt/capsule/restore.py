"""Restore moves: what a restore copies, computed and read before anything moves.

IS: copies from the pool, and uploads of bytes that were read and checked on the way here. IS NOT:
the restore itself (table), or the arithmetic of rows (lineage). It exists so that damaged bytes are
found while the lane is still as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashrt.capsule.extent import Extent
from flashrt.core.arena import Arena
from flashrt.core.copylist import Copy, CopyList, Upload, require_disjoint


@dataclass(frozen=True, slots=True, eq=False)
class RestoreMoves:
    """Copies within the device, and from the host: destinations do not overlap."""

    device: CopyList
    uploads: tuple[Upload, ...]
    shared: int  # rows of the capsule that the lane holds already
    places: tuple[tuple[Extent, int], ...]  # what is read, with its block at that time

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Those within the device."""
        return self.device.copies

    @property
    def nbytes(self) -> int:
        """Bytes moved in all."""
        return self.device.nbytes + sum(u.moves.nbytes for u in self.uploads)

    @property
    def is_reusable(self) -> bool:
        """Whether all that is read lies in the pool still, where it lay when this was made."""
        for extent, block in self.places:  # noqa: SIM110 - a generator costs more than the rest
            if extent.place != block:  # -1, of what was elsewhere, is no place
                return False
        return True

    def __iter__(self) -> Iterator[Copy]:
        return iter(self.device)


def read_moves(
    arena: Arena, parts: Sequence[tuple[Extent, Sequence[Copy]]], shared: int
) -> RestoreMoves:
    """`parts`: extents, each with its copies to the arena; a source is an offset in the extent.

    Raises CapsuleError for bytes that cannot be read or are damaged, PlanError for copies that
    leave an extent or the arena, or collide.
    """
    device: list[Copy] = []
    uploads: list[Upload] = []
    for extent, copies in parts:
        if extent.is_on_device:
            block = extent.block
            device += [c._replace(src=c.src + block) for c in copies]
        else:
            source = extent.need_source().read()
            moves = CopyList(copies).check(arena.plan.nbytes, source.nbytes)
            uploads.append(Upload(source, moves))
    places = tuple([(extent, extent.block) for extent, _ in parts])
    made = RestoreMoves(CopyList(device).check(arena.plan.nbytes), tuple(uploads), shared, places)
    if uploads:
        require_disjoint([*device, *(c for u in uploads for c in u.moves)])
    return made
