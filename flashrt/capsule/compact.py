"""Making room in a pool without dropping a capsule: rows stored twice are merged, pieces joined.

IS: what happens before PoolFull is raised. IS NOT: eviction, which sends capsules to other tiers.
It exists because dropped capsules leave their rows to their descendants, in segments that are
widened to granules: an agent that keeps its newest capsule would hold seventeen times what it
needs; and because the first fit leaves holes.

Every step leaves each capsule whole: bytes are at their new place before anything says so, and
where the old place would be overwritten on the way, they wait in host memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np

from flashrt.capsule.capsule import Capsule
from flashrt.capsule.extent import Extent, HostBytes
from flashrt.capsule.image import row_parts, rows_image
from flashrt.capsule.lineage import (
    Body,
    Lane,
    Segment,
    Waypoint,
    chain_of,
    segment_layout,
)
from flashrt.capsule.pool import Pool
from flashrt.core.arena import Arena
from flashrt.core.backend import Bytes
from flashrt.core.copylist import Copy, CopyList
from flashrt.core.planner import Band, align


class Books(Protocol):
    """What is compacted: an engine's table of capsules."""

    arena: Arena
    pool: Pool
    capsules: set[Capsule]
    lanes: list[Lane]


def compact(books: Books, needed_nbytes: int) -> None:
    """Merge, then join free pieces, as far as that can make a piece of `needed_nbytes`."""
    merge(books)
    if books.pool.free_nbytes >= needed_nbytes:
        join(books)


def merge(books: Books) -> None:
    """Segments that no capsule ends at, and that have one child only, become part of the child."""
    rows = books.arena.lane(0).rows
    for run in list(_runs(books.capsules)):
        youngest, start, stop = run[-1], run[0].start, run[-1].stop
        _, nbytes = segment_layout(rows, start, stop)
        if nbytes >= sum(s.rows.nbytes for s in run):
            continue
        image = _merged_image(books.arena, run)
        merged = Extent(nbytes, HostBytes.holding(image))
        tokens = np.concatenate([s.tokens for s in run])
        old = [s.rows for s in run]
        youngest.body = Body(run[0].parent, start, stop, tokens, merged)
        for extent in old:
            extent.give_back(books.pool)
        if books.pool.free_nbytes >= align(nbytes):
            _to_device(books, merged)


def join(books: Books) -> None:
    """Blocks move down, lowest first, until all that is free is one piece at the end."""
    holders = _holders(books)
    pool, at = books.pool, books.pool.offset
    base, backend = books.arena.memory.address, books.arena.backend
    for offset, nbytes in pool.blocks:
        holder = holders.get(offset)
        if holder is None:
            continue  # not a block of a capsule or a waypoint: the repair frees it
        if offset > at:
            is_apart = offset - at >= nbytes
            if isinstance(holder, Extent):
                if not is_apart:
                    data: Bytes = np.empty(holder.nbytes, np.uint8)
                    backend.read(base + offset, data)
                    holder.place = HostBytes.holding(data)
                    backend.write(base + at, data)
                else:
                    backend.copy(CopyList([Copy(offset, at, nbytes)]), base, base)
                holder.place = at
            else:
                lane, waypoint = holder
                kept = [w for w in lane.waypoints if w is not waypoint]
                if not is_apart:  # only speed is lost
                    lane.keep(tuple(kept))
                    continue
                backend.copy(CopyList([Copy(offset, at, nbytes)]), base, base)
                moved = [*kept, Waypoint(waypoint.position, at)]
                lane.keep(tuple(sorted(moved, key=lambda w: w.position)))
        at += nbytes
    pool.rebuild({offset: _nbytes(books, holder) for offset, holder in _holders(books).items()})


def _runs(capsules: Collection[Capsule]) -> Iterator[list[Segment]]:
    """Runs of segments on the device, oldest first, that could be one."""
    ends = {c.segment for c in capsules}
    seen: set[Segment] = set()
    for capsule in sorted(capsules, key=lambda c: -c.position):
        run: list[Segment] = []
        for segment in chain_of(capsule.segment):
            is_inner = segment not in ends and segment.refs == 1
            if segment in seen or not segment.rows.is_on_device:
                break
            if run and not is_inner:
                if len(run) > 1:
                    yield run[::-1]
                run = []
            seen.add(segment)
            run.append(segment)
        if len(run) > 1:
            yield run[::-1]


def _merged_image(arena: Arena, run: Sequence[Segment]) -> Bytes:
    """The image of all rows of a run. The younger one is right about a shared granule."""
    rows: Band = arena.lane(0).rows
    blocks, nbytes = segment_layout(rows, run[0].start, run[-1].stop)
    image: Bytes = np.zeros(nbytes, np.uint8)
    parts = row_parts(blocks, image)
    first = {b.slot.region.name: b.start for b in blocks}
    for segment in run:
        own, _ = segment_layout(rows, segment.start, segment.stop)
        found = row_parts(own, rows_image(arena, segment))
        for b in own:
            name = b.slot.region.name
            at = (b.start - first[name]) * b.slot.storage.row_nbytes
            parts[name][:, at : at + b.width] = found[name]
    return image


def _to_device(books: Books, extent: Extent) -> None:
    if max((n for _, n in books.pool.gaps), default=0) < align(extent.nbytes):
        join(books)
    (block,) = books.pool.take(extent.nbytes)
    books.arena.backend.write(books.arena.memory.address + block, extent.need_source().read())
    extent.move_to(block, books.pool)


def _holders(books: Books) -> dict[int, Extent | tuple[Lane, Waypoint]]:
    """Whose each block is, by offset."""
    found: dict[int, Extent | tuple[Lane, Waypoint]] = {}
    for capsule in books.capsules:
        for extent in (capsule.fixed, *(s.rows for s in chain_of(capsule.segment))):
            if extent.is_on_device:
                found[extent.block] = extent
    for lane in books.lanes:
        for waypoint in lane.waypoints:
            found[waypoint.block] = (lane, waypoint)
    return found


def _nbytes(books: Books, holder: Extent | tuple[Lane, Waypoint]) -> int:
    if isinstance(holder, Extent):
        return holder.nbytes
    return books.arena.lane(0).fixed.nbytes
