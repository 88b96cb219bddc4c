"""Restore plans: what a restore moves, computed and read before anything moves.

IS: copies from the pool, and uploads of bytes that were read and checked on the way here. IS NOT:
the restore (capsule), or the arithmetic of rows (lineage). Called by: capsule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashrt.capsule.extent import Extent
from flashrt.core.arena import Arena
from flashrt.core.copyplan import Copy, CopyPlan, Upload


@dataclass(frozen=True, slots=True, eq=False)
class RestorePlan:
    """Copies within the device, and from the host: destinations do not overlap."""

    device: CopyPlan
    uploads: tuple[Upload, ...]
    shared: int  # rows of the capsule that the lane holds already
    places: tuple[tuple[Extent, int], ...]  # what is read, with its block at that time

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Those within the device."""
        return self.device.copies

    @property
    def nbytes(self) -> int:
        """Bytes moved by the whole plan."""
        return self.device.nbytes + sum(u.plan.nbytes for u in self.uploads)

    @property
    def is_reusable(self) -> bool:
        """Whether all that is read lies in the pool still, where it lay when the plan was made."""
        return all(extent.block == block >= 0 for extent, block in self.places)

    def __iter__(self) -> Iterator[Copy]:
        return iter(self.device)


def plan_restore(
    arena: Arena, moves: Sequence[tuple[Extent, Sequence[Copy]]], shared: int
) -> RestorePlan:
    """`moves`: extents, each with its copies to the arena; a source is an offset in the extent.

    Raises CapsuleError for bytes that cannot be read or are damaged, PlanError for copies that
    leave an extent or the arena.
    """
    device: list[Copy] = []
    uploads: list[Upload] = []
    for extent, copies in moves:
        if extent.is_on_device:
            block = extent.block
            device += [c._replace(src=c.src + block) for c in copies]
        else:
            source = extent.need_source().read()
            plan = CopyPlan(copies).check(arena.plan.nbytes, source.nbytes)
            uploads.append(Upload(source, plan))
    places = tuple([(extent, extent.block) for extent, _ in moves])
    return RestorePlan(CopyPlan(device).check(arena.plan.nbytes), tuple(uploads), shared, places)
