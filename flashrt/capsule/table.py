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
from collections.abc import Collection, Iterable

from flashrt.base.errors import CapsuleError
from flashrt.base.tracing import COPIES, is_on, trace
from flashrt.capsule import file, tiers
from flashrt.capsule.capsule import Capsule, extents_of
from flashrt.capsule.digest import device_digest, lane_digest
from flashrt.capsule.extent import Extent, Shelf, Tier
from flashrt.capsule.lineage import (
    Lane,
    Waypoint,
    RowBlock,
    Segment,
    chain_of,
    copies_across,
    copies_in,
    copies_out,
    path_to,
    segment_layout,
    shared_rows,
)
from flashrt.capsule.pool import Pool
from flashrt.capsule.restore import RestorePlan, plan_restore
from flashrt.core.arena import Arena
from flashrt.core.copyplan import Copy, CopyPlan
from flashrt.core.planner import Band, Slot


class CapsuleTable:
    """All capsules and waypoints of an engine, and the lanes that they come from."""

    def __init__(self, arena: Arena, lanes: Iterable[Lane], fingerprint: str) -> None:
        self.arena = arena
        self.fingerprint = fingerprint
        self.lanes = list(lanes)
        self.pool = Pool(arena.plan.pool.offset, arena.plan.pool.nbytes)
        self.capsules: set[Capsule] = set()
        self.fixed_nbytes = arena.lane(0).fixed.nbytes
        self.shelf: Shelf | None = None  # the disk tier, if there is one

    # -- lane -> capsule ------------------------------------------------------------------------

    def snapshot(self, lane: Lane, name: str | None, parent: Capsule | None) -> Capsule:
        """Freeze a lane at its boundary. Raises PoolFull and changes nothing when there is no
        room.
        """
        base = lane.base(lane.position)
        start = 0 if base is None else base.stop
        blocks: list[RowBlock] = []
        rows_nbytes = 0
        if lane.position > start:
            blocks, rows_nbytes = segment_layout(self._rows(lane), start, lane.position)
        fixed, block = self.pool.take(self.fixed_nbytes, rows_nbytes)
        self._run(self._plan(self._fixed_out(lane, fixed), *copies_out(blocks, block)))
        segment = base
        if rows_nbytes:
            tokens = lane.journal[start : lane.position].copy()
            rows = Extent(rows_nbytes, block)
            segment = Segment(base, start, lane.position, tokens, rows)
        if rows_nbytes:
            lane.hold(segment, lane.position)
            if base is not None:
                base.refs += 1
        if segment is not None:
            segment.refs += 1
        nbytes = self.fixed_nbytes + rows_nbytes
        capsule = Capsule(self, segment, Extent(self.fixed_nbytes, fixed), nbytes, name, parent)
        if not all(e.is_on_device for e in extents_of(capsule)):
            capsule.known_digest = lane_digest(self.arena, lane)
        self.capsules.add(capsule)
        return capsule

    def keep_waypoint(self, lane: Lane) -> Waypoint:
        """Keep the fixed band of a lane's boundary; its rows are in the lane. Raises PoolFull."""
        (block,) = self.pool.take(self.fixed_nbytes)
        self._run(self._plan(self._fixed_out(lane, block)))
        waypoint = Waypoint(lane.position, block)
        lane.waypoints.append(waypoint)
        return waypoint

    # -- capsule -> lane ------------------------------------------------------------------------

    def plan_restore(self, lane: Lane, capsule: Capsule) -> RestorePlan:
        """What a restore would move: the fixed band, and rows that the lane does not hold already.

        Raises CapsuleError for a dropped or foreign capsule, or bytes that cannot be read.
        """
        self.check(capsule)
        shared = shared_rows(lane, capsule.segment)
        known = capsule.plans.get(lane.index)
        if known is not None and known.shared == shared and known.is_reusable:
            return known
        fixed = self.arena.lane(lane.index).fixed
        plan = self._plan_restore(lane, capsule, shared, Copy(0, fixed.offset, fixed.nbytes))
        if not plan.uploads:
            capsule.plans[lane.index] = plan
        return plan

    def plan_restore_rows(self, lane: Lane, capsule: Capsule, cursor: Slot) -> RestorePlan:
        """Rows and the cursor only: an incomplete restore, for the ablation."""
        self.check(capsule)
        fixed = self.arena.lane(lane.index).fixed
        there = cursor.offset - self.arena.lane(0).fixed.offset
        here = fixed.slot(cursor.region.name).offset
        copy = Copy(there, here, cursor.storage.nbytes)
        return self._plan_restore(lane, capsule, shared_rows(lane, capsule.segment), copy)

    def restore(self, lane: Lane, capsule: Capsule, plan: RestorePlan | None = None) -> RestorePlan:
        """Put a lane into a capsule's state; returns what was moved."""
        plan = plan or self.plan_restore(lane, capsule)
        self._run(plan.device)
        if plan.uploads:
            self.arena.backend.upload(plan.uploads, self.arena.memory.address)
        shared, segment = plan.shared, capsule.segment
        self._forget_waypoints(lane, min(shared, lane.position))
        lane.position = 0 if segment is None else segment.stop
        if shared < lane.position:
            lane.hold(segment, lane.position)
        while segment is not None and segment.stop > shared:  # the journal has the tokens below
            lane.journal[segment.start : segment.stop] = segment.tokens
            segment = segment.parent
        return plan

    def return_to(self, lane: Lane, waypoint: Waypoint) -> CopyPlan:
        """Put a lane back to one of its waypoints: the fixed band only."""
        if waypoint not in lane.waypoints:
            raise CapsuleError(f"waypoint at {waypoint.position} is not one of lane {lane.index}")
        fixed = self.arena.lane(lane.index).fixed
        plan = self._plan(Copy(waypoint.block, fixed.offset, fixed.nbytes))
        self._run(plan)
        self._forget_waypoints(lane, waypoint.position)
        lane.position = waypoint.position
        return plan

    def reset(self, lane: Lane) -> None:
        """The empty state: position 0. Rows stay where they are, dead."""
        fixed = self.arena.lane(lane.index).fixed
        for slot in fixed.slots:
            address = self.arena.memory.address + slot.offset
            self.arena.backend.fill(address, slot.storage.nbytes, 0)
        self._forget_waypoints(lane, -1)
        lane.position = 0

    def fork(self, source: Lane, target: Lane) -> CopyPlan:
        """Put `target` into the present state of `source`, without a capsule between."""
        ours, theirs = self.arena.lane(source.index), self.arena.lane(target.index)
        shared = min(shared_rows(target, source.held), source.intact, source.position)
        copies = [Copy(ours.fixed.offset, theirs.fixed.offset, ours.fixed.nbytes)]
        if shared < source.position:
            copies += copies_across(ours.rows, theirs.rows, shared, source.position)
        plan = self._plan(*copies)
        self._run(plan)
        self._forget_waypoints(target, -1)
        target.hold(source.held, min(source.intact, source.position))
        target.position = source.position
        target.journal[: target.position] = source.journal[: source.position]
        return plan

    # -- giving back ----------------------------------------------------------------------------

    def drop(self, capsule: Capsule) -> None:
        """See Capsule.drop."""
        if capsule.is_dropped:
            return
        if capsule.owner is not self:
            raise CapsuleError(f"{capsule} belongs to another engine")
        capsule.fixed.give_back(self.pool)
        self.capsules.discard(capsule)
        release(capsule.segment, self.pool)

    def drop_waypoint(self, lane: Lane, waypoint: Waypoint) -> None:
        """Give a waypoint's memory back."""
        lane.waypoints.remove(waypoint)
        self.pool.give(waypoint.block)

    # -- files and tiers ------------------------------------------------------------------------

    def save(self, capsule: Capsule, path: str | os.PathLike[str]) -> None:
        """See Capsule.save."""
        file.save(capsule, path)

    def load(self, path: str | os.PathLike[str], admit: file.Admission | None = None) -> Capsule:
        """A capsule from a file, into the pool; see file.load."""
        return file.load(self, path, admit)

    def move(self, capsule: Capsule, tier: str) -> None:
        """See Capsule.to."""
        tiers.move(capsule, tier, self.shelf)

    # -- questions ------------------------------------------------------------------------------

    def check(self, capsule: Capsule) -> None:
        """Raises CapsuleError unless the capsule can be restored here."""
        if capsule.owner is not self:
            raise CapsuleError(f"{capsule} belongs to another engine; save and load it instead")
        if capsule.is_dropped:
            raise CapsuleError(f"{capsule} was dropped")

    def boundaries(
        self, lane: Lane, position: int, without: Collection[Capsule] = ()
    ) -> Capsule | Waypoint | None:
        """The deepest boundary of the lane's history at or below `position`, `without` some
        capsules; None is the empty one.
        """
        waypoints = [m for m in lane.waypoints if m.position <= position]
        best: Capsule | Waypoint | None = waypoints[-1] if waypoints else None
        chain = set(chain_of(lane.held))
        limit = min(position, lane.intact, lane.position)
        for capsule in self.capsules:
            ours = capsule.segment in chain and 0 < capsule.position <= limit
            if ours and (best is None or capsule.position > best.position):
                best = best if capsule in without else capsule
        return best

    def digest_lane(self, lane: Lane) -> str:
        """Digest of a lane's live state."""
        return lane_digest(self.arena, lane)

    def digest_capsule(self, capsule: Capsule) -> str:
        """Digest of a capsule's state: from its bytes on the device, else as known from before."""
        self.check(capsule)
        if all(e.is_on_device for e in extents_of(capsule)):
            return device_digest(self.arena, capsule.fixed, capsule.segment)
        assert capsule.known_digest is not None, "kept by whoever moved bytes off the device"
        return capsule.known_digest

    def used_nbytes(self, tier: Tier) -> int:
        """Bytes of capsules in a tier, shared rows counted once; waypoints not counted."""
        extents = {e for c in self.capsules for e in extents_of(c)}
        return sum(e.nbytes for e in extents if e.tier is tier)

    def check_integrity(self) -> None:
        """Reference counts and pool blocks add up. Raises PlanError or CapsuleError."""
        self.pool.check_integrity()
        segments = {s for c in self.capsules for s in chain_of(c.segment)}
        waypoints = sum(len(lane.waypoints) for lane in self.lanes)
        for segment in segments:
            capsules = sum(c.segment is segment for c in self.capsules)
            children = sum(s.parent is segment for s in segments)
            if segment.refs != capsules + children or not segment.is_stored:
                raise CapsuleError(
                    f"segment [{segment.start}, {segment.stop}): refs {segment.refs}"
                )
        used = self.used_nbytes(Tier.DEVICE) + waypoints * self.fixed_nbytes
        if used != self.pool.used_nbytes:
            raise CapsuleError(f"pool holds {self.pool.used_nbytes} bytes, capsules {used}")

    # -- inside ---------------------------------------------------------------------------------

    def _rows(self, lane: Lane) -> Band:
        return self.arena.lane(lane.index).rows

    def _fixed_out(self, lane: Lane, block: int) -> Copy:
        fixed = self.arena.lane(lane.index).fixed
        return Copy(fixed.offset, block, fixed.nbytes)

    def _plan_restore(self, lane: Lane, capsule: Capsule, shared: int, fixed: Copy) -> RestorePlan:
        rows = copies_in(self._rows(lane), path_to(capsule.segment, shared), shared)
        return plan_restore(self.arena, [(capsule.fixed, [fixed]), *rows], shared)

    def _plan(self, *copies: Copy) -> CopyPlan:
        return CopyPlan(copies).check(self.arena.plan.nbytes)

    def _run(self, plan: CopyPlan) -> None:
        """A plan that was checked when it was made."""
        if is_on(COPIES):
            trace(COPIES, f"{len(plan.copies)} copies, {plan.nbytes} bytes")
        base = self.arena.memory.address
        self.arena.backend.copy(plan, base, base)

    def _forget_waypoints(self, lane: Lane, above: int) -> None:
        while lane.waypoints and lane.waypoints[-1].position > above:  # they ascend
            self.drop_waypoint(lane, lane.waypoints[-1])


def release(segment: Segment | None, pool: Pool) -> None:
    """One reference less; a segment without any gives its block back, and so on up the chain."""
    while segment is not None:
        segment.refs -= 1
        if segment.refs:
            return
        segment.rows.give_back(pool)
        segment = segment.parent
