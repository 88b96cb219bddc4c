"""Digests of lanes and of capsules on the device: which bytes make up the state.

IS: terms from roles and the arena's plan, summed by a kernel of the backend. IS NOT: the definition
of the digest (core.digest). It exists so that equal states are recognised without reading them out.
"""

from __future__ import annotations

from collections.abc import Callable

from flashrt.capsule.extent import Extent
from flashrt.capsule.lineage import Lane, Segment, chain_of, segment_layout
from flashrt.core import digest as digests
from flashrt.core.arena import Arena
from flashrt.core.planner import Slot
from flashrt.core.region import resolve_dtype


def lane_digest(arena: Arena, lane: Lane) -> str:
    """Digest of a lane's live state."""
    return begin_lane_digest(arena, lane)()


def begin_lane_digest(arena: Arena, lane: Lane) -> Callable[[], str]:
    """The same, of the state as it is now; what is returned waits for it."""
    plan = arena.lane(lane.index)
    terms = [_fixed(arena, s, s.offset) for s in plan.fixed.slots if s.region.is_digested]
    for slot in plan.rows.slots:
        if slot.region.is_digested and lane.position:
            pitch = slot.storage.lead_nbytes
            terms.append(_rows(arena, slot, slot.offset, 0, lane.position, 0, pitch))
    return _begin(arena, terms, lane.position)


def device_digest(arena: Arena, fixed: Extent, segment: Segment | None) -> str:
    """Digest of a stored state, all of whose extents are on the device."""
    return begin_device_digest(arena, fixed, segment)()


def begin_device_digest(arena: Arena, fixed: Extent, segment: Segment | None) -> Callable[[], str]:
    """The same; what is returned waits for it, and its blocks may be given back meanwhile."""
    plan = arena.lane(0)
    shift = fixed.block - plan.fixed.offset
    digested = [s for s in plan.fixed.slots if s.region.is_digested]
    terms = [_fixed(arena, s, s.offset + shift) for s in digested]
    for at in chain_of(segment):
        for b in segment_layout(plan.rows, at.start, at.stop)[0]:
            if b.slot.region.is_digested:
                span = (at.start, at.stop, b.start, b.width)
                terms.append(_rows(arena, b.slot, at.rows.block + b.offset, *span))
    return _begin(arena, terms, 0 if segment is None else segment.stop)


def _fixed(arena: Arena, slot: Slot, offset: int) -> digests.DigestTerm:
    item = resolve_dtype(slot.region.dtype, arena.backend.acts).nbytes
    cols = slot.storage.nbytes // item
    seed = digests.region_seed(slot.region.name)
    return digests.DigestTerm(offset, seed, 1, 0, 1, 0, cols, slot.storage.nbytes, item, 0)


def _rows(
    arena: Arena, slot: Slot, offset: int, start: int, stop: int, origin: int, pitch: int
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
        elem_nbytes=resolve_dtype(region.dtype, arena.backend.acts).nbytes,
        layout=arena.backend.digest_layout(region),
    )


def _begin(arena: Arena, terms: list[digests.DigestTerm], position: int) -> Callable[[], str]:
    sums = arena.backend.begin_digest(terms, arena.memory.address)
    return lambda: digests.finish(sums(), position)
