"""The table of an engine's capsules: snapshot, restore, fork, drop, save, load, move.

IS: the mechanism, as copies between regions that are derived from roles, and its contract:
validate, then move; an operation happens whole or not at all; nothing allocates but blocks of the
pool band. IS NOT: policy (when to snapshot, whom to evict), files (file) or other tiers (tiers).

A capsule holds the whole fixed band of a lane and, through its segment's chain, rows [0, position).
Nobody lists state by hand: a region is in a capsule because of its role.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError, PoolFull
from flashrt.base.flags import flags
from flashrt.base.tracing import COPIES, trace
from flashrt.capsule import file, tiers
from flashrt.capsule.capsule import Capsule, extents_of, is_on_device
from flashrt.capsule.compact import compact
from flashrt.capsule.digest import (
    begin_device_digest,
    begin_lane_digest,
    device_digest,
    lane_digest,
)
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
from flashrt.capsule.turn import Turn, in_turn
from flashrt.core.arena import Arena
from flashrt.core.copylist import Copy, CopyList
from flashrt.core.planner import Band, Slot, align

_R = TypeVar("_R")


class _Piece(NamedTuple):
    """Rows [start, stop) of a lane that a snapshot stores, and how they lie."""

    start: int
    stop: int
    blocks: list[RowBlock]
    nbytes: int


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
        self.turn = Turn(self._repair)
        self.is_closed = False
        self._n_compacted = 0  # times that the pool was compacted

    # -- lane -> capsule ------------------------------------------------------------------------

    @in_turn
    def snapshot(self, lane: Lane, name: str | None, parent: Capsule | None) -> Capsule:
        """Freeze a lane at its boundary. Raises PoolFull and changes nothing when there is no
        room.
        """
        return self.snapshot_within(lane, name, parent)

    def snapshot_within(self, lane: Lane, name: str | None, parent: Capsule | None) -> Capsule:
        """`snapshot`, by whoever has the turn."""
        segment, pieces, (fixed, *taken) = self._room_for(lane)
        copies = [self._fixed_out(lane, fixed)]
        for piece, block in zip(pieces, taken, strict=True):
            copies += copies_out(piece.blocks, block)
        self._run(self._checked(copies))
        position, nbytes = lane.record.position, self.fixed_nbytes
        for piece, block in zip(pieces, taken, strict=True):
            tokens = lane.record.journal[piece.start : piece.stop].copy()
            rows = Extent(piece.nbytes, block)
            segment = Segment(segment, piece.start, piece.stop, tokens, rows)
            nbytes += piece.nbytes
        capsule = Capsule(self, segment, Extent(self.fixed_nbytes, fixed), nbytes, name)
        if not is_on_device(capsule):
            capsule.late_digest = begin_lane_digest(self.arena, lane)
        self._add(capsule, parent)
        if pieces:
            lane.hold(segment, position)
        return capsule

    @in_turn
    def keep_waypoint(self, lane: Lane) -> Waypoint:
        """Keep the fixed band of a lane's boundary; its rows are in the lane. Raises PoolFull."""
        (block,) = self.pool.take(self.fixed_nbytes)
        self._run(self._checked([self._fixed_out(lane, block)]))
        waypoint = Waypoint(lane.position, block)
        lane.keep((*lane.waypoints, waypoint))
        return waypoint

    @in_turn
    def copy_waypoint(self, waypoint: Waypoint, target: Lane) -> None:
        """Another lane's waypoint for `target`, which was forked from that lane and holds its rows
        up to there. Raises PoolFull.
        """
        (block,) = self.pool.take(self.fixed_nbytes)
        self._run(self._checked([Copy(waypoint.block, block, self.fixed_nbytes)]))
        made = (*target.waypoints, Waypoint(waypoint.position, block))
        target.keep(tuple(sorted(made, key=lambda w: w.position)))

    # -- capsule -> lane ------------------------------------------------------------------------

    @in_turn
    def moves_to_restore(self, lane: Lane, capsule: Capsule) -> RestoreMoves:
        """What a restore would move: the fixed band, and rows that the lane does not hold already.

        Raises CapsuleError for a dropped or foreign capsule, or bytes that cannot be read.
        """
        return self._moves_to_restore(lane, capsule)

    def _moves_to_restore(self, lane: Lane, capsule: Capsule) -> RestoreMoves:
        if capsule.owner is not self or self.is_closed or capsule not in self.capsules:
            self.check(capsule)  # says why not
        shared = shared_rows(lane, capsule.segment)
        known = capsule.known_moves.get(lane.index)
        if known is not None and known.shared == shared and known.is_reusable:
            return known
        fixed = self.arena.lane(lane.index).fixed
        moves = self._read_moves(lane, capsule, shared, Copy(0, fixed.offset, fixed.nbytes))
        if not moves.uploads:
            capsule.known_moves[lane.index] = moves
        return moves

    @in_turn
    def moves_to_restore_rows(self, lane: Lane, capsule: Capsule, cursor: Slot) -> RestoreMoves:
        """Rows and the cursor only: an incomplete restore, for the ablation."""
        self.check(capsule)
        fixed = self.arena.lane(lane.index).fixed
        there = cursor.offset - self.arena.lane(0).fixed.offset
        here = fixed.slot(cursor.region.name).offset
        copy = Copy(there, here, cursor.storage.nbytes)
        return self._read_moves(lane, capsule, shared_rows(lane, capsule.segment), copy)

    @in_turn
    def restore(
        self, lane: Lane, capsule: Capsule, moves: RestoreMoves | None = None
    ) -> RestoreMoves:
        """Put a lane into a capsule's state, whatever was in it; returns what was moved."""
        return self.restore_within(lane, capsule, moves)

    def restore_within(
        self, lane: Lane, capsule: Capsule, moves: RestoreMoves | None = None
    ) -> RestoreMoves:
        """`restore`, by whoever has the turn."""
        moves = moves or self._moves_to_restore(lane, capsule)
        shared, segment = moves.shared, capsule.segment
        position = 0 if segment is None else segment.body.stop
        lane.begin_move()
        self._run(moves.device)
        if moves.uploads:
            self.arena.backend.upload(moves.uploads, self.arena.memory.address)
        record = lane.record
        if shared >= position:
            held, intact, journal = record.held, record.intact, record.journal
        else:
            held, intact, journal = segment, position, lane.journal_with(shared)
            at = segment
            while at is not None and at.body.stop > shared:  # the journal has the tokens below
                _, start, stop, tokens, _ = at.body
                journal[start:stop] = tokens
                at = at.body.parent
        kept, above = record.waypoints, min(shared, record.position)
        if kept and kept[-1].position > above:
            self._moved(lane, position, held, intact, above, journal)
        else:
            lane.moved(position, held, intact, kept, journal)
        return moves

    @in_turn
    def return_to(self, lane: Lane, waypoint: Waypoint) -> CopyList:
        """Put a lane back to one of its waypoints: the fixed band only."""
        if waypoint not in lane.waypoints:
            raise CapsuleError(f"waypoint at {waypoint.position} is not one of lane {lane.index}")
        fixed = self.arena.lane(lane.index).fixed
        moves = self._checked([Copy(waypoint.block, fixed.offset, fixed.nbytes)])
        lane.begin_move()
        self._run(moves)
        self._moved(lane, waypoint.position, lane.held, lane.intact, waypoint.position)
        return moves

    @in_turn
    def reset(self, lane: Lane) -> None:
        """The empty state: position 0. Rows stay where they are, dead."""
        lane.begin_move()
        for slot in self.arena.lane(lane.index).fixed.slots:
            address = self.arena.memory.address + slot.offset
            self.arena.backend.fill(address, slot.storage.nbytes, 0)
        self._moved(lane, 0, lane.held, lane.intact, -1)

    @in_turn
    def fork(self, source: Lane, target: Lane) -> CopyList:
        """Put `target`, whatever was in it, into the present state of `source`, without a capsule
        between.
        """
        ours, theirs = self.arena.lane(source.index), self.arena.lane(target.index)
        shared = min(shared_rows(target, source.held), source.intact, source.position)
        copies = [Copy(ours.fixed.offset, theirs.fixed.offset, ours.fixed.nbytes)]
        if shared < source.position:
            copies += copies_across(ours.rows, theirs.rows, shared, source.position)
        moves = self._checked(copies)
        target.begin_move()
        self._run(moves)
        journal = target.journal_with(0)
        journal[: source.position] = source.journal[: source.position]
        intact = min(source.intact, source.position)
        self._moved(target, source.position, source.held, intact, -1, journal)
        return moves

    # -- giving back ----------------------------------------------------------------------------

    @in_turn
    def drop(self, capsule: Capsule) -> None:
        """See Capsule.drop."""
        if capsule.owner is not self:
            raise CapsuleError(f"{capsule} belongs to another engine")
        if capsule not in self.capsules:
            return
        self.capsules.discard(capsule)  # first: what nobody lists is given back at a repair
        _unlink(capsule)
        capsule.fixed.give_back(self.pool)
        release(capsule.segment, self.pool)

    @in_turn
    def drop_waypoint(self, lane: Lane, waypoint: Waypoint) -> None:
        """Give a waypoint's memory back."""
        lane.keep(tuple(w for w in lane.waypoints if w is not waypoint))
        self.pool.give(waypoint.block)

    # -- files and tiers ------------------------------------------------------------------------

    @in_turn
    def save(self, capsule: Capsule, path: str | os.PathLike[str]) -> None:
        """See Capsule.save."""
        self.check(capsule)
        file.save(self.arena, self.fingerprint, capsule, path)

    @in_turn
    def load(self, path: str | os.PathLike[str], admit: file.Admission | None = None) -> Capsule:
        """A capsule from a file, into the pool; `admit` looks at what was read and may refuse it.

        Raises CapsuleError (foreign, truncated, damaged, too long) or PoolFull; nothing is changed
        then.
        """
        max_positions = len(self.lanes[0].journal)
        header, tensors = file.read(self.arena, self.fingerprint, max_positions, path)
        if admit is not None:
            admit(header, tensors, file.journal(tensors, header.position))
        made = file.place(self.arena, self._take, header, tensors)
        capsule = Capsule(self, made.segment, made.fixed, made.nbytes, header.name, header.digest)
        self._add(capsule, None)
        return capsule

    @in_turn
    def adopt(self, capsule: Capsule) -> None:
        """A capsule whose bytes are stored elsewhere joins; its segments are linked already."""
        self._add(capsule, None)

    @in_turn
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
            if capsule.known_digest is None and capsule.late_digest is None:  # it is on the device
                capsule.late_digest = begin_device_digest(
                    self.arena, capsule.fixed, capsule.segment
                )
            tiers.move(self.arena, self._take, self.pool, items, target, self.shelf)

    @in_turn
    def offload(self, capsule: Capsule, sources: Mapping[Extent, StoredBytes]) -> None:
        """To the disk tier, without writing: `sources` has a copy of each extent there."""
        self.check(capsule)
        capsule.known_digest = capsule.digest
        items = tiers.to_move(self.capsules, capsule, Tier.DISK)
        tiers.replace(self.pool, items, [sources[item.extent] for item in items])

    @in_turn
    def change(self, work: Callable[[], _R]) -> _R:
        """`work()` as one change to the books; see turn."""
        return work()

    def close(self) -> None:
        """All capsules are dropped, those in host memory and on disk too."""
        self.is_closed = True
        gone, self.capsules = self.capsules, set()
        for capsule in gone:
            for extent in extents_of(capsule):
                if extent.source is not None:
                    extent.source.release()
                extent.place = None
            capsule.known_moves.clear()

    # -- questions ------------------------------------------------------------------------------

    def check(self, capsule: Capsule) -> None:
        """Raises CapsuleError unless the capsule can be restored here."""
        if capsule.owner is not self:
            raise CapsuleError(f"{capsule} belongs to another engine; save and load it instead")
        if self.is_closed:
            raise CapsuleError(f"{capsule}: its engine is closed; load it from a file or a store")
        if capsule not in self.capsules:
            raise CapsuleError(f"{capsule} was dropped")

    @in_turn
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

    @in_turn
    def digest_lane(self, lane: Lane) -> str:
        """Digest of a lane's live state."""
        return lane_digest(self.arena, lane)

    @in_turn
    def digest_capsule(self, capsule: Capsule) -> str:
        """Digest of a capsule's state: from its bytes on the device, else as known from before."""
        self.check(capsule)
        if is_on_device(capsule):
            return device_digest(self.arena, capsule.fixed, capsule.segment)
        if capsule.known_digest is None:
            assert capsule.late_digest is not None, "kept by whoever moved bytes off the device"
            capsule.known_digest, capsule.late_digest = capsule.late_digest(), None
        return capsule.known_digest

    def used_nbytes(self, tier: Tier) -> int:
        """Bytes of capsules in a tier, shared rows counted once; waypoints not counted."""
        extents = {e for c in self.capsules for e in extents_of(c)}
        return sum(e.nbytes for e in extents if e.tier is tier)

    @in_turn
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
        return self.arena.plan.lanes[lane.index].rows

    def _fixed_out(self, lane: Lane, block: int) -> Copy:
        fixed = self.arena.plan.lanes[lane.index].fixed
        return Copy(fixed.offset, block, fixed.nbytes)

    def _read_moves(self, lane: Lane, capsule: Capsule, shared: int, fixed: Copy) -> RestoreMoves:
        rows = copies_in(self._rows(lane), path_to(capsule.segment, shared), shared)
        return read_moves(self.arena, [(capsule.fixed, [fixed]), *rows], shared)

    def _checked(self, copies: Iterable[Copy]) -> CopyList:
        return CopyList(copies).check(self.arena.plan.nbytes)

    def _run(self, moves: CopyList) -> None:
        """Moves that were checked when they were made."""
        if flags().debug >= COPIES:
            trace(COPIES, f"{len(moves)} copies, {moves.nbytes} bytes")
        base = self.arena.memory.address
        self.arena.backend.copy(moves, base, base)

    def _room_for(self, lane: Lane) -> tuple[Segment | None, list[_Piece], tuple[int, ...]]:
        """The segment that a snapshot of a lane stands on, how its own rows lie, and blocks for the
        fixed band and for each piece of them. Raises PoolFull.

        Making room may merge the very segment that was to be stood on: then once more.
        """
        position = lane.record.position
        while True:
            base = lane.base(position)
            start = 0 if base is None else base.body.stop
            cuts = [start, *((lane.joint,) if start < lane.joint < position else ()), position]
            pieces = [
                _Piece(first, stop, *segment_layout(self._rows(lane), first, stop))
                for first, stop in itertools.pairwise(cuts)
                if stop > first
            ]
            before = self._n_compacted
            taken = self._take(self.fixed_nbytes, *(piece.nbytes for piece in pieces))
            if self._n_compacted == before or lane.base(position) is base:
                return base, pieces, taken
            for offset in taken:
                self.pool.give(offset)

    def _add(self, capsule: Capsule, parent: Capsule | None) -> None:
        """A new capsule: counted, linked, and last of all listed."""
        at = capsule.segment
        while at is not None:
            at.refs += 1
            at = at.body.parent if at.refs == 1 else None  # one that lives refers to its parent
        self.turn.created.append(capsule)
        link(capsule, living(parent))
        self.capsules.add(capsule)

    def _moved(
        self,
        lane: Lane,
        position: int,
        held: Segment | None,
        intact: int,
        above: int,
        journal: NDArray[np.int32] | None = None,
    ) -> None:
        """A lane is elsewhere; waypoints above a position are not of its history any more."""
        kept = lane.record.waypoints
        if not kept or kept[-1].position <= above:  # they ascend
            lane.moved(position, held, intact, kept, journal)
            return
        n = sum(w.position <= above for w in kept)
        lane.moved(position, held, intact, kept[:n], journal)
        for waypoint in kept[n:]:
            self.pool.give(waypoint.block)

    def _take(self, *sizes: int) -> tuple[int, ...]:
        """Blocks of the pool; free bytes in pieces are brought together first where that helps.
        Raises PoolFull.
        """
        try:
            return self.pool.take(*sizes)
        except PoolFull:
            self._n_compacted += 1
            compact(self, sum(align(size) for size in sizes))
            return self.pool.take(*sizes)

    def _repair(self, created: list[Capsule]) -> None:
        """After a change that did not end: what nobody was given goes, and blocks, references and
        parents are those that the capsules and lanes at hand say.
        """
        for capsule in created:
            self.capsules.discard(capsule)
        counts: dict[Segment, int] = {}
        used: dict[int, int] = {}
        for capsule in self.capsules:
            capsule.children.clear()
        for capsule in self.capsules:
            link(capsule, living(capsule.parent))
            if capsule.fixed.is_on_device:
                used[capsule.fixed.block] = capsule.fixed.nbytes
            at, is_new = capsule.segment, True
            while at is not None and is_new:
                is_new = at not in counts
                counts[at] = counts.get(at, 0) + 1
                if is_new and at.rows.is_on_device:
                    used[at.rows.block] = at.rows.nbytes
                at = at.parent
        for segment, count in counts.items():
            segment.refs = count
        for lane in self.lanes:
            used |= {w.block: self.fixed_nbytes for w in lane.waypoints}
            for segment in chain_of(lane.held):
                if segment not in counts:  # nobody's any more: its block is free
                    segment.rows.place = None
        self.pool.rebuild(used)


def link(capsule: Capsule, parent: Capsule | None) -> None:
    """`parent` is the capsule that it descends from."""
    capsule.parent = parent
    if parent is not None:
        parent.children.add(capsule)


def living(capsule: Capsule | None) -> Capsule | None:
    """The capsule, or its nearest ancestor that was not dropped."""
    while capsule is not None and capsule.is_dropped:
        capsule = capsule.parent
    return capsule


def _unlink(capsule: Capsule) -> None:
    """The children of a dropped capsule descend from its parent: none keeps it alive."""
    parent = living(capsule.parent)
    for child in tuple(capsule.children):
        link(child, parent)
    capsule.children.clear()
    capsule.parent = parent
    if parent is not None:
        parent.children.discard(capsule)


def release(segment: Segment | None, pool: Pool) -> None:
    """One reference less; a segment without any gives its block back, and so on up the chain."""
    while segment is not None:
        segment.refs -= 1
        if segment.refs > 0:
            return
        segment.rows.give_back(pool)
        segment = segment.parent
