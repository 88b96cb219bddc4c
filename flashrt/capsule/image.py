"""Images: the bytes of an extent as they are kept outside the device, canonical to the last byte.

IS: a block as the pool has it, with everything that means nothing set to a constant: rows beyond
the segment's stop, padding of rows, gaps between regions. So equal states have equal bytes, and an
address made of the content is the same in every process. IS NOT: files (file, the store).

Nothing here knows how a backend lays rows out: dead rows are found with its own unpack and pack. A
restore may write an image as it is: rows beyond the position are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from flashrt.capsule.extent import Extent
from flashrt.capsule.lineage import RowBlock, Segment, segment_layout
from flashrt.core.arena import GUARD_BYTE, Arena
from flashrt.core.backend import Backend, Bytes
from flashrt.core.planner import GUARD_NBYTES, align
from flashrt.core.region import resolve_dtype


def rows_image(arena: Arena, segment: Segment) -> Bytes:
    """A segment's rows, uint8 [segment.rows.nbytes]. Raises CapsuleError for damaged sources."""
    return begin_rows_image(arena, segment)()


def begin_rows_image(arena: Arena, segment: Segment) -> Callable[[], Bytes]:
    """The same, when the device has sent it; its block may be given back meanwhile."""
    raw = _begin(arena, segment.rows)
    if not segment.rows.is_on_device:
        return raw

    def image() -> Bytes:
        rows, end = raw(), 0
        for b in segment_layout(arena.lane(0).rows, segment.start, segment.stop)[0]:
            rows[end : b.offset] = 0
            end = b.offset + b.planes * b.width
            _clear_dead_rows(arena.backend, b, segment.stop, rows[b.offset : end])
        rows[end:] = 0
        return rows

    return image


def fixed_image(arena: Arena, extent: Extent) -> Bytes:
    """A fixed band, uint8 [extent.nbytes], guards included."""
    return begin_fixed_image(arena, extent)()


def begin_fixed_image(arena: Arena, extent: Extent) -> Callable[[], Bytes]:
    """The same, when the device has sent it; its block may be given back meanwhile."""
    raw = _begin(arena, extent)
    if not extent.is_on_device:
        return raw

    def image() -> Bytes:
        fixed = raw()
        stamp_gaps(arena, fixed)
        return fixed

    return image


def stamp_gaps(arena: Arena, fixed: Bytes) -> None:
    """What lies between the regions of a fixed band: zeros, then a guard, as in the arena."""
    band, end = arena.lane(0).fixed, 0
    for slot in band.slots:
        stop = slot.offset - band.offset
        fixed[end:stop] = 0
        if end:
            fixed[stop - GUARD_NBYTES : stop] = GUARD_BYTE
        end = stop + slot.storage.nbytes
    fixed[end:] = 0
    if end:
        guard = align(end)
        fixed[guard : guard + GUARD_NBYTES] = GUARD_BYTE


def row_parts(blocks: Sequence[RowBlock], image: Bytes) -> dict[str, Bytes]:
    """The regions of a rows image by name, uint8 [planes, width]: views."""
    return {
        b.slot.region.name: image[b.offset : b.offset + b.planes * b.width].reshape(b.planes, -1)
        for b in blocks
    }


def _begin(arena: Arena, extent: Extent) -> Callable[[], Bytes]:
    if extent.is_on_device:
        return arena.backend.begin_read(arena.memory.address + extent.block, extent.nbytes)
    source = extent.need_source().read()
    return lambda: source


def _clear_dead_rows(backend: Backend, block: RowBlock, stop: int, raw: Bytes) -> None:
    """Zero rows at or beyond `stop`; and padding, which only whole rows through unpack can find."""
    region, storage = block.slot.region, block.slot.storage
    item = resolve_dtype(region.dtype, backend.acts).nbytes
    is_padded = storage.row_nbytes != region.shape[2] * item
    first = block.start if is_padded else stop // storage.granule * storage.granule
    n_rows = block.stop - first
    if n_rows <= 0 or (not is_padded and block.stop == stop):
        return
    at = (first - block.start) * storage.row_nbytes
    part = raw.reshape(block.planes, -1)[:, at:]
    window = replace(region, shape=(block.planes, n_rows, region.shape[2]))
    rows = backend.unpack(window, np.ascontiguousarray(part).reshape(-1)).copy()
    rows[:, stop - first :] = 0
    packed: Bytes = np.empty(part.size, np.uint8)
    backend.pack(window, rows, packed)
    part[:] = packed.reshape(part.shape)
