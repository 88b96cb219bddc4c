"""Capsules: snapshot, restore, fork and drop, as copy plans over regions that are derived from
roles.

IS: the mechanism, and its contract: validate, then move; an operation happens whole or not at all;
nothing allocates but blocks of the pool band. IS NOT: policy (when to snapshot, whom to evict) nor
files (blob). Called by: session.

A capsule holds the whole fixed band of a lane and, through its segment's chain, rows [0, position).
Nobody lists state by hand: a region is in a capsule because of its role.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError
from flashrt.base.tracing import COPIES, trace
from flashrt.core import digest as digests
from flashrt.core.arena import Arena
from flashrt.core.copyplan import Copy, CopyPlan
from flashrt.core.lineage import (
    Lane,
    Mark,
    Segment,
    chain_of,
    copies_across,
    copies_in,
    copies_out,
    path_to,
    segment_layout,
    shared_rows,
    tokens_of,
)
from flashrt.core.planner import Band, Slot
from flashrt.core.pool import Pool
from flashrt.core.region import resolve_dtype


@dataclass(slots=True, eq=False)
class Capsule:
    """An immutable state at a commit boundary; made by `CapsuleTable.snapshot`."""

    table: CapsuleTable
    segment: Segment | None  # None: no rows, position 0
    block: int  # fixed band in the pool, -1 once dropped
    nbytes: int  # its own: fixed band, and rows that no ancestor holds
    name: str | None
    parent: Capsule | None  # the capsule that its lane descends from

    @property
    def position(self) -> int:
        """Committed tokens below the boundary."""
        return 0 if self.segment is None else self.segment.stop

    @property
    def tokens(self) -> NDArray[np.int32]:
        """All tokens below the position."""
        return tokens_of(self.segment)

    @property
    def is_dropped(self) -> bool:
        """Whether its memory was given back."""
        return self.block < 0

    @property
    def tier(self) -> str:
        """Where its bytes are."""
        return "dropped" if self.is_dropped else "device"

    @property
    def digest(self) -> str:
        """32 hex digits, equal to the digest of a lane in the same state."""
        return self.table.digest_capsule(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, whole or not at all; see core.blob. Raises CapsuleError."""
        from flashrt.core import blob  # blob imports this module

        blob.save(self, path)

    def drop(self) -> None:
        """Give its memory back; rows that descendants need stay. A second drop does nothing."""
        self.table.drop(self)

    def __repr__(self) -> str:
        label = f" {self.name!r}" if self.name else ""
        return f"<Capsule{label} position={self.position} nbytes={self.nbytes} {self.tier}>"


class CapsuleTable:
    """All capsules and marks of an engine, and the lanes that they come from."""

    def __init__(self, arena: Arena, lanes: Iterable[Lane], fingerprint: str) -> None:
        self.arena = arena
        self.fingerprint = fingerprint
        self.lanes = list(lanes)
        self.pool = Pool(arena.plan.pool.offset, arena.plan.pool.nbytes)
        self.capsules: set[Capsule] = set()
        self.fixed_nbytes = arena.lane(0).fixed.nbytes

    # -- lane -> capsule ------------------------------------------------------------------------

    def snapshot(self, lane: Lane, name: str | None, parent: Capsule | None) -> Capsule:
        """Freeze a lane at its boundary. Raises PoolFull and changes nothing when there is no
        room.
        """
        base = lane.base(lane.position)
        start = 0 if base is None else base.stop
        rows_nbytes = 0
        if lane.position > start:
            rows_nbytes = segment_layout(self._rows(lane), start, lane.position)[1]
        fixed, block = self.pool.take(self.fixed_nbytes, rows_nbytes)
        segment = base
        copies = [self._fixed_out(lane, fixed)]
        if rows_nbytes:
            tokens = lane.journal[start : lane.position].copy()
            segment = Segment(base, start, lane.position, tokens, block, rows_nbytes)
            copies += copies_out(self._rows(lane), start, lane.position, block)
        self._run(CopyPlan(tuple(copies)))
        if rows_nbytes:
            lane.hold(segment, lane.position)
            if base is not None:
                base.refs += 1
        if segment is not None:
            segment.refs += 1
        capsule = Capsule(self, segment, fixed, self.fixed_nbytes + rows_nbytes, name, parent)
        self.capsules.add(capsule)
        return capsule

    def mark(self, lane: Lane) -> Mark:
        """Keep the fixed band of a lane's boundary; its rows are in the lane. Raises PoolFull."""
        (block,) = self.pool.take(self.fixed_nbytes)
        self._run(CopyPlan((self._fixed_out(lane, block),)))
        mark = Mark(lane.position, block)
        lane.marks.append(mark)
        return mark

    # -- capsule -> lane ------------------------------------------------------------------------

    def plan_restore(self, lane: Lane, capsule: Capsule) -> CopyPlan:
        """What a restore would move: the fixed band, and rows that the lane does not hold already.

        Raises CapsuleError for a dropped or foreign capsule.
        """
        self.check(capsule)
        fixed = self.arena.lane(lane.index).fixed
        return CopyPlan((Copy(capsule.block, fixed.offset, fixed.nbytes),)) + self._rows_in(
            lane, capsule
        )

    def plan_restore_rows(self, lane: Lane, capsule: Capsule, cursor: Slot) -> CopyPlan:
        """Rows and the cursor only: an incomplete restore, for the ablation."""
        self.check(capsule)
        fixed = self.arena.lane(lane.index).fixed
        there = capsule.block + cursor.offset - self.arena.lane(0).fixed.offset
        here = fixed.slot(cursor.region.name).offset
        copies = (Copy(there, here, cursor.storage.nbytes),)
        return CopyPlan(copies) + self._rows_in(lane, capsule)

    def restore(self, lane: Lane, capsule: Capsule, plan: CopyPlan | None = None) -> CopyPlan:
        """Put a lane into a capsule's state; returns what was moved."""
        plan = plan or self.plan_restore(lane, capsule)
        shared = shared_rows(lane, capsule.segment)
        self._run(plan)
        self._forget_marks(lane, min(shared, lane.position))
        if shared < capsule.position:
            lane.hold(capsule.segment, capsule.position)
        lane.position = capsule.position
        lane.journal[: lane.position] = capsule.tokens
        return plan

    def return_to(self, lane: Lane, mark: Mark) -> CopyPlan:
        """Put a lane back to one of its marks: the fixed band only."""
        if mark not in lane.marks:
            raise CapsuleError(f"mark at {mark.position} is not one of lane {lane.index}")
        fixed = self.arena.lane(lane.index).fixed
        plan = CopyPlan((Copy(mark.block, fixed.offset, fixed.nbytes),))
        self._run(plan)
        self._forget_marks(lane, mark.position)
        lane.position = mark.position
        return plan

    def reset(self, lane: Lane) -> None:
        """The empty state: position 0. Rows stay where they are, dead."""
        fixed = self.arena.lane(lane.index).fixed
        for slot in fixed.slots:
            address = self.arena.memory.address + slot.offset
            self.arena.backend.fill(address, slot.storage.nbytes, 0)
        self._forget_marks(lane, -1)
        lane.position = 0

    def fork(self, source: Lane, target: Lane) -> CopyPlan:
        """Put `target` into the present state of `source`, without a capsule between."""
        ours, theirs = self.arena.lane(source.index), self.arena.lane(target.index)
        shared = min(shared_rows(target, source.held), source.intact, source.position)
        copies = [Copy(ours.fixed.offset, theirs.fixed.offset, ours.fixed.nbytes)]
        if shared < source.position:
            copies += copies_across(ours.rows, theirs.rows, shared, source.position)
        plan = CopyPlan(tuple(copies))
        self._run(plan)
        self._forget_marks(target, -1)
        target.hold(source.held, min(source.intact, source.position))
        target.position = source.position
        target.journal[: target.position] = source.journal[: source.position]
        return plan

    # -- giving back ----------------------------------------------------------------------------

    def drop(self, capsule: Capsule) -> None:
        """See Capsule.drop."""
        if capsule.is_dropped:
            return
        if capsule.table is not self:
            raise CapsuleError(f"{capsule} belongs to another engine")
        self.pool.give(capsule.block)
        capsule.block = -1
        self.capsules.discard(capsule)
        release(capsule.segment, self.pool)

    def drop_mark(self, lane: Lane, mark: Mark) -> None:
        """Give a mark's memory back."""
        lane.marks.remove(mark)
        self.pool.give(mark.block)

    # -- questions ------------------------------------------------------------------------------

    def check(self, capsule: Capsule) -> None:
        """Raises CapsuleError unless the capsule can be restored here."""
        if capsule.table is not self:
            raise CapsuleError(f"{capsule} belongs to another engine; save and load it instead")
        if capsule.is_dropped:
            raise CapsuleError(f"{capsule} was dropped")

    def boundaries(self, lane: Lane, position: int) -> Capsule | Mark | None:
        """The deepest boundary of the lane's history at or below `position`; None is the empty
        one.
        """
        marks = [m for m in lane.marks if m.position <= position]
        best: Capsule | Mark | None = marks[-1] if marks else None
        chain = set(chain_of(lane.held))
        limit = min(position, lane.intact, lane.position)
        for capsule in self.capsules:
            ours = capsule.segment in chain and 0 < capsule.position <= limit
            if ours and (best is None or capsule.position > best.position):
                best = capsule
        return best

    def digest_lane(self, lane: Lane) -> str:
        """Digest of a lane's live state."""
        plan = self.arena.lane(lane.index)
        terms = [self._fixed_term(s, s.offset) for s in plan.fixed.slots if s.region.is_digested]
        for slot in plan.rows.slots:
            if slot.region.is_digested and lane.position:
                pitch = slot.storage.lead_nbytes
                terms.append(self._rows_term(slot, slot.offset, 0, lane.position, 0, pitch))
        return self._digest(terms, lane.position)

    def digest_capsule(self, capsule: Capsule) -> str:
        """Digest of a capsule's state, from its stored bytes."""
        self.check(capsule)
        plan = self.arena.lane(0)
        shift = capsule.block - plan.fixed.offset
        digested = [s for s in plan.fixed.slots if s.region.is_digested]
        terms = [self._fixed_term(s, s.offset + shift) for s in digested]
        for segment in chain_of(capsule.segment):
            for b in segment_layout(plan.rows, segment.start, segment.stop)[0]:
                if b.slot.region.is_digested:
                    at = segment.block + b.offset
                    span = (segment.start, segment.stop, b.start, b.width)
                    terms.append(self._rows_term(b.slot, at, *span))
        return self._digest(terms, capsule.position)

    def check_integrity(self) -> None:
        """Reference counts and pool blocks add up. Raises PlanError or CapsuleError."""
        self.pool.check_integrity()
        segments = {s for c in self.capsules for s in chain_of(c.segment)}
        marks = sum(len(lane.marks) for lane in self.lanes)
        used = sum(s.nbytes for s in segments) + (len(self.capsules) + marks) * self.fixed_nbytes
        for segment in segments:
            capsules = sum(c.segment is segment for c in self.capsules)
            children = sum(s.parent is segment for s in segments)
            if segment.refs != capsules + children or not segment.is_stored:
                raise CapsuleError(
                    f"segment [{segment.start}, {segment.stop}): refs {segment.refs}"
                )
        if used != self.pool.used_nbytes:
            raise CapsuleError(f"pool holds {self.pool.used_nbytes} bytes, capsules {used}")

    # -- inside ---------------------------------------------------------------------------------

    def _rows(self, lane: Lane) -> Band:
        return self.arena.lane(lane.index).rows

    def _fixed_out(self, lane: Lane, block: int) -> Copy:
        fixed = self.arena.lane(lane.index).fixed
        return Copy(fixed.offset, block, fixed.nbytes)

    def _rows_in(self, lane: Lane, capsule: Capsule) -> CopyPlan:
        shared = shared_rows(lane, capsule.segment)
        path = path_to(capsule.segment, shared)
        return CopyPlan(tuple(copies_in(self._rows(lane), path, shared)))

    def _run(self, plan: CopyPlan) -> None:
        plan.check(self.arena.plan.nbytes)
        trace(COPIES, f"{len(plan.copies)} copies, {plan.nbytes} bytes")
        base = self.arena.memory.address
        self.arena.backend.copy(plan, base, base)

    def _forget_marks(self, lane: Lane, above: int) -> None:
        for mark in [m for m in lane.marks if m.position > above]:
            self.drop_mark(lane, mark)

    def _fixed_term(self, slot: Slot, offset: int) -> digests.DigestTerm:
        item = resolve_dtype(slot.region.dtype, self.arena.backend.act).nbytes
        cols = slot.storage.nbytes // item
        seed = digests.region_seed(slot.region.name)
        return digests.DigestTerm(offset, seed, 1, 0, 1, 0, cols, slot.storage.nbytes, item, 0)

    def _rows_term(
        self, slot: Slot, offset: int, start: int, stop: int, origin: int, pitch: int
    ) -> digests.DigestTerm:
        region = slot.region
        return digests.DigestTerm(
            offset=offset,
            seed=digests.region_seed(region.name),
            planes=region.shape[0],
            start=start,
            stop=stop,
            origin=origin,
            cols=region.shape[2],
            pitch=pitch,
            elem_nbytes=resolve_dtype(region.dtype, self.arena.backend.act).nbytes,
            layout=self.arena.backend.digest_layout(region),
        )

    def _digest(self, terms: list[digests.DigestTerm], position: int) -> str:
        sums = self.arena.backend.digest(terms, self.arena.memory.address)
        return digests.finish(sums, position)


def release(segment: Segment | None, pool: Pool) -> None:
    """One reference less; a segment without any gives its block back, and so on up the chain."""
    while segment is not None:
        segment.refs -= 1
        if segment.refs:
            return
        pool.give(segment.block)
        segment.block = -1
        segment = segment.parent
