"""Moving the bytes of capsules between tiers: device, host, disk.

IS: the mechanism, validate then move: sources are read and checked, room is taken and files are
written before the first extent changes hands; a failure changes nothing. IS NOT: policy (whom to
move when: eviction), or capsules' verbs (table).

A capsule takes along its fixed band, and those segments of its chain that no capsule on a faster
tier needs: a demoted ancestor leaves its rows where its descendants read them. Rows on a slower
tier are brought along, so that afterwards `capsule.tier` is the tier asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from flashrt.base.errors import CapsuleError
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.extent import Extent, HostBytes, Shelf, StoredBytes, Tier
from flashrt.capsule.image import begin_fixed_image, begin_rows_image
from flashrt.capsule.lineage import Segment, chain_of
from flashrt.capsule.pool import Pool
from flashrt.core.arena import Arena
from flashrt.core.backend import Bytes

Take = Callable[..., tuple[int, ...]]  # sizes in bytes -> offsets of blocks


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes that change their tier."""

    extent: Extent
    segment: Segment | None  # whose rows; None: a fixed band


def to_move(capsules: Collection[Capsule], capsule: Capsule, target: Tier) -> list[Item]:
    """What has to move so that one of `capsules` is on the target tier."""
    items = [Item(capsule.fixed, None)] if capsule.fixed.tier is not target else []
    needed = {
        segment
        for other in capsules
        if other is not capsule and other.fixed.tier.speed > target.speed
        for segment in chain_of(other.segment)
    }
    for segment in chain_of(capsule.segment):
        speed = segment.rows.tier.speed
        if speed < target.speed or (speed > target.speed and segment not in needed):
            items.append(Item(segment.rows, segment))
    return items


def move(
    arena: Arena,
    take: Take,
    pool: Pool,
    items: Sequence[Item],
    target: Tier,
    shelf: Shelf | None,
) -> None:
    """Move them, whole or not at all; `take` gives blocks of the pool, `shelf` is the disk tier, if
    there is one.

    Raises PoolFull, or CapsuleError for bytes that cannot be read or written.
    """
    images = [_begin(arena, item) for item in items]
    if target is Tier.DEVICE:
        _to_device(arena, take, pool, items, [image() for image in images])
    elif target is Tier.DISK:
        replace(pool, items, _shelve(shelf, [image() for image in images]))
    else:
        kept = [_keep(item, image) for item, image in zip(items, images, strict=True)]
        replace(pool, items, kept)


def replace(pool: Pool, items: Sequence[Item], sources: Sequence[StoredBytes]) -> None:
    """Off the device, or from one tier to another: each item's bytes are in its source already."""
    for item, source in zip(items, sources, strict=True):
        item.extent.move_to(source, pool)


def _begin(arena: Arena, item: Item) -> Callable[[], Bytes]:
    if item.segment is None:
        return begin_fixed_image(arena, item.extent)
    return begin_rows_image(arena, item.segment)


def _to_device(
    arena: Arena, take: Take, pool: Pool, items: Sequence[Item], images: Sequence[Bytes]
) -> None:
    blocks = take(*(item.extent.nbytes for item in items))
    for block, image in zip(blocks, images, strict=True):
        arena.backend.write(arena.memory.address + block, image)
    for item, block in zip(items, blocks, strict=True):
        item.extent.move_to(block, pool)


def _keep(item: Item, image: Callable[[], Bytes]) -> StoredBytes:
    """An image in host memory. Bytes that the device is still sending are not waited for."""
    if item.extent.is_on_device:
        return HostBytes(item.extent.nbytes, image)
    return HostBytes.holding(image())


def _shelve(shelf: Shelf | None, images: Sequence[Bytes]) -> list[StoredBytes]:
    if shelf is None:
        raise CapsuleError("there is no disk tier; open the engine with flashrt.load")
    sources: list[StoredBytes] = []
    try:
        for image in images:
            sources.append(shelf.put(image))
    except BaseException:
        for source in sources:
            source.release()
        raise
    return sources
