"""Lineage: segments of rows shared between capsules, and what of them a lane physically holds.

IS: the tree of segments, and the arithmetic that turns it into copies. IS NOT: allocation or
policy. It exists so that capsules of one history store their common rows once.

A segment holds rows [start, stop) that follow its parent's rows. The rows of a capsule are those of
its segment's chain, as commits are in git. A lane `holds` a segment up to `intact`: the bytes of
rows [0, intact) in the lane's rows band are those of that chain, whether or not the lane's position
is beyond them. Hence going back to an ancestor moves no rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashrt.capsule.extent import Extent
from flashrt.core.copylist import Copy
from flashrt.core.planner import ALIGN, Band, Slot


class Body(NamedTuple):
    """What a segment is at present: rows [start, stop) after `parent`, and their tokens."""

    parent: Segment | None
    start: int
    stop: int
    tokens: NDArray[np.int32]  # [stop - start]
    rows: Extent


class Segment:
    """Rows [start, stop) after `parent`; stored in some tier while anybody refers to it.

    An only child may take in its parent's rows: then its body is another, swapped as a whole, and
    whoever refers to the segment goes on doing so.
    """

    __slots__ = ("__weakref__", "body", "refs")

    def __init__(
        self, parent: Segment | None, start: int, stop: int, tokens: NDArray[np.int32],
        rows: Extent, refs: int = 0,
    ) -> None:  # fmt: skip
        """See Body; `refs`: capsules and living child segments."""
        self.body = Body(parent, start, stop, tokens, rows)
        self.refs = refs

    @property
    def parent(self) -> Segment | None:
        """The segment whose rows come before."""
        return self.body.parent

    @property
    def start(self) -> int:
        """The first row."""
        return self.body.start

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.body.stop

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Of these rows, int32 [stop - start]."""
        return self.body.tokens

    @property
    def rows(self) -> Extent:
        """The bytes."""
        return self.body.rows

    @property
    def is_stored(self) -> bool:
        """Whether some tier still has the rows; identity outlives storage."""
        return self.body.rows.place is not None

    def chain(self) -> Iterator[Segment]:
        """This segment, its parent, and so on to the first."""
        at: Segment | None = self
        while at is not None:
            yield at
            at = at.body.parent


def chain_of(segment: Segment | None) -> Iterator[Segment]:
    """`segment.chain()`, empty for the empty history."""
    return iter(()) if segment is None else segment.chain()


@dataclass(frozen=True, slots=True, eq=False)
class Waypoint:
    """A boundary of one lane whose rows need no storing: they are in the lane. `block` has the
    fixed band.
    """

    position: int
    block: int


class LaneRecord(NamedTuple):
    """What the host knows of a lane; swapped as a whole, so that no exception can fall between two
    words of it.

    Invariants: 0 <= position <= len(journal); waypoints ascend and lie at or below position; rows
    [0, intact) in the arena are those of `held`'s chain, and intact <= held.stop (0 without held).
    """

    position: int
    held: Segment | None
    intact: int
    waypoints: tuple[Waypoint, ...]
    journal: NDArray[np.int32]  # [max_positions]; [0, position) are history, [0, intact) held's
    moves: int = 0  # how often the lane was put elsewhere: what was known of it before is void
    is_moving: bool = False  # bytes are on their way: the device holds anything


# LaneRecord itself would call a function of Python: each restore makes two records.
_record = functools.partial(tuple.__new__, LaneRecord)


class Lane:
    """The host's record of one live sequence, and whether it can be believed.

    A lane is in doubt from before the first byte of a move until after the last: if an exception
    falls in between, the record says what history is to be made again.
    """

    __slots__ = ("__weakref__", "_spare", "index", "joint", "owed", "record")

    def __init__(self, index: int, journal: NDArray[np.int32]) -> None:
        """An empty lane; `journal`: int32 [max_positions]."""
        self.index = index
        self.record = LaneRecord(0, None, 0, (), journal)
        self.owed: NDArray[np.int32] | None = None  # history that is being made again
        # Rows below are stored apart from those that follow, so that histories share them which
        # agree up to there; 0: nothing is known of such a place.
        self.joint = 0
        self._spare = np.zeros_like(journal)

    @property
    def is_trusted(self) -> bool:
        """Whether the record is what the device holds."""
        return self.owed is None and not self.record.is_moving

    @property
    def position(self) -> int:
        """Committed tokens."""
        return self.record.position

    @property
    def held(self) -> Segment | None:
        """The segment whose chain the rows in the arena are of, up to `intact`."""
        return self.record.held

    @property
    def intact(self) -> int:
        """Rows of `held`'s chain that are in the arena."""
        return self.record.intact

    @property
    def waypoints(self) -> tuple[Waypoint, ...]:
        """Boundaries to go back to, ascending."""
        return self.record.waypoints

    @property
    def journal(self) -> NDArray[np.int32]:
        """int32 [max_positions]; [0, position) are the committed tokens."""
        return self.record.journal

    @property
    def moves(self) -> int:
        """Another number whenever the lane was put elsewhere than by committing tokens."""
        return self.record.moves

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The committed tokens, a copy; while in doubt, those that are to be made again."""
        if self.owed is not None:
            return self.owed.copy()
        record = self.record
        return record.journal[: record.position].copy()

    def commit(self, tokens: NDArray[np.int32]) -> None:
        """Tokens whose rows were just written become history."""
        position, held, intact, waypoints, journal, moves, _ = self.record
        stop = position + len(tokens)
        if stop == position + 1:
            journal[position] = tokens[0]  # beyond the position nobody reads it
        else:
            journal[position:stop] = tokens
        intact = intact if intact < position else position
        self.record = _record((stop, held, intact, waypoints, journal, moves, False))

    def forget_ahead(self) -> None:
        """What anybody knew of the lane beyond its position is void from here on: others are about
        to commit tokens.
        """
        record = self.record
        self.record = record._replace(moves=record.moves + 1)

    def stand(self, position: int) -> None:
        """History is rows [0, position) of those that are here, what lies beyond is not: for lanes
        whose fixed band knows of no position. Raises ValueError for rows that are not here.
        """
        record = self.record
        if not 0 <= position <= max(record.position, record.intact) or record.waypoints:
            raise ValueError(f"lane {self.index}: has no rows up to {position}")
        self.record = record._replace(position=position)

    def overwrite(self) -> None:
        """Rows at and beyond the position are about to be written: they are nobody's from here on.

        To be said before the first byte: commits, and guesses that may never be committed.
        """
        position, held, intact, waypoints, journal, moves, is_moving = self.record
        if intact > position:
            self.record = LaneRecord(position, held, position, waypoints, journal, moves, is_moving)

    def hold(self, segment: Segment | None, intact: int) -> None:
        """From now on rows [0, intact) are those of `segment`'s chain."""
        position, _, _, waypoints, journal, moves, is_moving = self.record
        self.record = LaneRecord(position, segment, intact, waypoints, journal, moves, is_moving)

    def keep(self, waypoints: tuple[Waypoint, ...]) -> None:
        """These are the boundaries to go back to."""
        self.record = self.record._replace(waypoints=waypoints)

    def begin_move(self) -> None:
        """Bytes are about to move: until `moved`, nobody knows what the device holds."""
        position, held, intact, waypoints, journal, moves, is_moving = self.record
        if is_moving:  # an earlier move did not end: what rows are there is not known either
            held, intact = None, 0
        self.record = _record((position, held, intact, waypoints, journal, moves, True))

    def moved(
        self,
        position: int,
        held: Segment | None,
        intact: int,
        waypoints: tuple[Waypoint, ...],
        journal: NDArray[np.int32] | None = None,
    ) -> None:
        """The lane is elsewhere, and can be believed again."""
        record = self.record
        if journal is None:
            journal = record.journal
        elif journal is self._spare:
            self._spare = record.journal
        self.record = _record((position, held, intact, waypoints, journal, record.moves + 1, False))

    def journal_with(self, shared: int) -> NDArray[np.int32]:
        """A journal to write tokens [shared, ...) into: the present one where nothing of the
        history would be overwritten, else another that has [0, shared) already.
        """
        record = self.record
        if shared >= record.position:
            return record.journal
        spare = self._spare
        if spare is record.journal:  # an exception fell between two swaps
            spare = self._spare = np.zeros_like(spare)
        if shared:
            spare[:shared] = record.journal[:shared]
        return spare

    def base(self, position: int) -> Segment | None:
        """The deepest stored segment of the held chain that ends at or below `position` and is
        intact.
        """
        record = self.record
        at, limit = record.held, min(record.intact, position)
        while at is not None:
            body = at.body
            if body.stop <= limit and body.rows.place is not None:
                break
            at = body.parent
        return at


def shared_rows(lane: Lane, segment: Segment | None) -> int:
    """How many rows of `segment`'s chain are in the lane already."""
    record = lane.record
    if record.is_moving:
        return 0
    ours, theirs = record.held, segment
    while ours is not theirs:  # up to where the two chains meet: the deeper one steps
        if ours is None or theirs is None:
            return 0
        depth = ours.body.stop - theirs.body.stop
        if depth >= 0:
            ours = ours.body.parent
        if depth <= 0:
            theirs = theirs.body.parent
    return 0 if ours is None else min(ours.body.stop, record.intact)


def path_to(segment: Segment | None, above: int) -> list[Segment]:
    """The stored segments with rows at or beyond `above`, oldest first."""
    return [s for s in chain_of(segment) if s.stop > above][::-1]


def tokens_of(segment: Segment | None) -> NDArray[np.int32]:
    """All tokens of the chain."""
    parts = [s.tokens for s in chain_of(segment)][::-1]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


class RowBlock(NamedTuple):
    """Rows [start, stop) of one region, widened to granules, as stored in a segment's block."""

    slot: Slot
    start: int  # widened
    stop: int
    offset: int  # within the block
    width: int  # bytes of one plane
    planes: int


def segment_layout(rows: Band, start: int, stop: int) -> tuple[list[RowBlock], int]:
    """How rows [start, stop) of all regions lie in a block, and its size in bytes."""
    blocks: list[RowBlock] = []
    offset = 0
    for slot in rows.slots:
        storage = slot.storage
        g, row_nbytes = storage.granule, storage.row_nbytes
        first, last = start // g * g, min(-(-stop // g) * g, storage.lead_nbytes // row_nbytes)
        width, planes = (last - first) * row_nbytes, slot.region.shape[0]
        blocks.append(RowBlock(slot, first, last, offset, width, planes))
        offset += width * planes
        offset += -offset % ALIGN
    return blocks, offset


def copies_out(blocks: Sequence[RowBlock], block: int) -> list[Copy]:
    """Rows of a lane -> a block; `blocks` are laid out for that lane's band."""
    copies: list[Copy] = []
    for slot, start, _, offset, width, planes in blocks:
        storage = slot.storage
        at = slot.offset + start * storage.row_nbytes
        copies.append(Copy(at, block + offset, width, planes, storage.lead_nbytes, width))
    return copies


def copies_in(rows: Band, path: Sequence[Segment], above: int) -> list[tuple[Extent, list[Copy]]]:
    """Rows at or beyond `above` of the path's segments -> lane rows, each granule from exactly one
    segment. A copy's source is an offset within its segment's bytes.

    A granule that two segments share is taken from the younger one: it was stored when both had
    their rows in it.
    """
    moves: list[tuple[Extent, list[Copy]]] = []
    for i, segment in enumerate(path):
        copies: list[Copy] = []
        blocks, _ = segment_layout(rows, segment.start, segment.stop)
        for slot, first, last, offset, width, planes in blocks:
            g, row_nbytes = slot.storage.granule, slot.storage.row_nbytes
            start = max(first, above // g * g)
            stop = last if i + 1 == len(path) else segment.stop // g * g
            if start < stop:
                src = offset + (start - first) * row_nbytes
                dst = slot.offset + start * row_nbytes
                nbytes = (stop - start) * row_nbytes
                copies.append(Copy(src, dst, nbytes, planes, width, slot.storage.lead_nbytes))
        if copies:
            moves.append((segment.rows, copies))
    return moves


def copies_across(source: Band, target: Band, above: int, stop: int) -> list[Copy]:
    """Rows [above, stop) of one lane -> the same rows of another."""
    copies: list[Copy] = []
    blocks, _ = segment_layout(source, above, stop)
    for b, other in zip(blocks, target.slots, strict=True):
        pitch, at = b.slot.storage.lead_nbytes, b.start * b.slot.storage.row_nbytes
        copies.append(Copy(b.slot.offset + at, other.offset + at, b.width, b.planes, pitch, pitch))
    return copies
