"""The table of an engine's capsules: snapshot, restore, fork, drop, save, load, move.

IS: the mechanism, as copies between regions that are derived from roles, and its contract:
validate, then move; an operation happens whole or not at all; nothing allocates but blocks of the
pool band. IS NOT: policy (when to snapshot, whom to evict), files (file) or other tiers (tiers).

A capsule holds the whole fixed band of a lane and, through its segment's chain, rows [0, position).
Nobody lists state by hand: a region is in a capsule because of its role.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping

from flashrt.base.errors import CapsuleError
from flashrt.base.tracing import COPIES, is_on, trace
from flashrt.capsule import file, tiers
from flashrt.capsule.capsule import Capsule, extents_of
from flashrt.capsule.digest import device_digest, lane_digest
from flashrt.capsule.extent import Extent, Shelf, StoredBytes, Tier
from flashrt.capsule.lineage import (
    Lane,
    RowBlock,
    Segment,
    Waypoint,
    chain_of,
    copies_across,
    copies_in,
    copies_out,
    path_to,
    segment_layout,
    shared_rows,
)
from flashrt.capsule.pool import Pool
from flashrt.capsule.restore import RestoreMoves, read_moves
from flashrt.core.arena import Arena
from flashrt.core.copylist import Copy, CopyList
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
        self._run(self._checked(self._fixed_out(lane, fixed), *copies_out(blocks, block)))
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
        self._run(self._checked(self._fixed_out(lane, block)))
        waypoint = Waypoint(lane.position, block)
        lane.waypoints.append(waypoint)
        return waypoint

    # -- capsule -> lane ------------------------------------------------------------------------

    def moves_to_restore(self, lane: Lane, capsule: Capsule) -> RestoreMoves:
        """What a restore would move: the fixed band, and rows that the lane does not hold already.

        Raises CapsuleError for a dropped or foreign capsule, or bytes that cannot be read.
        """
        self.check(capsule)
        shared = shared_rows(lane, capsule.segment)
        known = capsule.known_moves.get(lane.index)
        if known is not None and known.shared == shared and known.is_reusable:
            return known
        fixed = self.arena.lane(lane.index).fixed
        moves = self._read_moves(lane, capsule, shared, Copy(0, fixed.offset, fixed.nbytes))
        if not moves.uploads:
            capsule.known_moves[lane.index] = moves
        return moves

    def moves_to_restore_rows(self, lane: Lane, capsule: Capsule, cursor: Slot) -> RestoreMoves:
        """Rows and the cursor only: an incomplete restore, for the ablation."""
        self.check(capsule)
        fixed = self.arena.lane(lane.index).fixed
        there = cursor.offset - self.arena.lane(0).fixed.offset
        here = fixed.slot(cursor.region.name).offset
        copy = Copy(there, here, cursor.storage.nbytes)
        return self._read_moves(lane, capsule, shared_rows(lane, capsule.segment), copy)

    def restore(
        self, lane: Lane, capsule: Capsule, moves: RestoreMoves | None = None
    ) -> RestoreMoves:
        """Put a lane into a capsule's state, whatever was in it; returns what was moved."""
        moves = moves or self.moves_to_restore(lane, capsule)
        self._run(moves.device)
        if moves.uploads:
            self.arena.backend.upload(moves.uploads, self.arena.memory.address)
        shared, segment = moves.shared, capsule.segment
        self._forget_waypoints(lane, min(shared, lane.position))
        lane.position = 0 if segment is None else segment.stop
        if shared < lane.position:
            lane.hold(segment, lane.position)
        while segment is not None and segment.stop > shared:  # the journal has the tokens below
            lane.journal[segment.start : segment.stop] = segment.tokens
            segment = segment.parent
        return moves

    def return_to(self, lane: Lane, waypoint: Waypoint) -> CopyList:
        """Put a lane back to one of its waypoints: the fixed band only."""
        if waypoint not in lane.waypoints:
            raise CapsuleError(f"waypoint at {waypoint.position} is not one of lane {lane.index}")
        fixed = self.arena.lane(lane.index).fixed
        moves = self._checked(Copy(waypoint.block, fixed.offset, fixed.nbytes))
        self._run(moves)
        self._forget_waypoints(lane, waypoint.position)
        lane.position = waypoint.position
        return moves

    def reset(self, lane: Lane) -> None:
        """The empty state: position 0. Rows stay where they are, dead."""
        fixed = self.arena.lane(lane.index).fixed
        for slot in fixed.slots:
            address = self.arena.memory.address + slot.offset
            self.arena.backend.fill(address, slot.storage.nbytes, 0)
        self._forget_waypoints(lane, -1)
        lane.position = 0

    def fork(self, source: Lane, target: Lane) -> CopyList:
        """Put `target`, whatever was in it, into the present state of `source`, without a capsule
        between.
        """
        ours, theirs = self.arena.lane(source.index), self.arena.lane(target.index)
        shared = min(shared_rows(target, source.held), source.intact, source.position)
        copies = [Copy(ours.fixed.offset, theirs.fixed.offset, ours.fixed.nbytes)]
        if shared < source.position:
            copies += copies_across(ours.rows, theirs.rows, shared, source.position)
        moves = self._checked(*copies)
        self._run(moves)
        self._forget_waypoints(target, -1)
        target.hold(source.held, min(source.intact, source.position))
        target.position = source.position
        target.journal[: target.position] = source.journal[: source.position]
        return moves

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
        self.check(capsule)
        file.save(self.arena, self.fingerprint, capsule, path)

    def load(self, path: str | os.PathLike[str], admit: file.Admission | None = None) -> Capsule:
        """A capsule from a file, into the pool; `admit` looks at what was read and may refuse it.

        Raises CapsuleError (foreign, truncated, damaged, too long) or PoolFull; nothing is changed
        then.
        """
        max_positions = len(self.lanes[0].journal)
        header, tensors = file.read(self.arena, self.fingerprint, max_positions, path)
        if admit is not None:
            admit(header, tensors, file.journal(tensors, header.position))
        made = file.place(self.arena, self.pool, header, tensors)
        capsule = Capsule(
            self, made.segment, made.fixed, made.nbytes, header.name, None, header.digest
        )
        self.capsules.add(capsule)
        return capsule

    def move(self, capsule: Capsule, tier: str) -> None:
        """See Capsule.to."""
        self.check(capsule)
        try:
            target = Tier(tier)
        except ValueError:
            raise CapsuleError(
                f"tier {tier!r} is unknown; choose one of {', '.join(Tier)}"
            ) from None
        items = tiers.to_move(self.capsules, capsule, target)
        if items:
            capsule.known_digest = capsule.known_digest or self.digest_capsule(capsule)
            tiers.move(self.arena, self.pool, items, target, self.shelf)

    def offload(self, capsule: Capsule, sources: Mapping[Extent, StoredBytes]) -> None:
        """To the disk tier, without writing: `sources` has a copy of each extent there."""
        self.check(capsule)
        capsule.known_digest = capsule.digest
        items = tiers.to_move(self.capsules, capsule, Tier.DISK)
        tiers.replace(self.pool, items, [sources[item.extent] for item in items])

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

    def _read_moves(self, lane: Lane, capsule: Capsule, shared: int, fixed: Copy) -> RestoreMoves:
        rows = copies_in(self._rows(lane), path_to(capsule.segment, shared), shared)
        return read_moves(self.arena, [(capsule.fixed, [fixed]), *rows], shared)

    def _checked(self, *copies: Copy) -> CopyList:
        return CopyList(copies).check(self.arena.plan.nbytes)

    def _run(self, moves: CopyList) -> None:
        """Moves that were checked when they were made."""
        if is_on(COPIES):
            trace(COPIES, f"{len(moves)} copies, {moves.nbytes} bytes")
        base = self.arena.memory.address
        self.arena.backend.copy(moves, base, base)

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
