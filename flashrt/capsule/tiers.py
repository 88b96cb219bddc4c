"""Moving capsules between tiers: device, host, disk.

IS: the mechanism, validate then move: sources are read and checked, room is taken and files are
written before the first extent changes hands; a failure changes nothing. IS NOT: policy (whom to
move when). Called by: capsule.

A capsule takes along its fixed band, and those segments of its chain that no capsule on a faster
tier needs: a demoted ancestor leaves its rows where its descendants read them. Rows on a slower
tier are brought along, so that afterwards `capsule.tier` is the tier asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flashrt.base.errors import CapsuleError
from flashrt.capsule.capsule import Capsule, CapsuleOwner
from flashrt.capsule.extent import Extent, HostBytes, Shelf, Source, Tier
from flashrt.capsule.image import begin_fixed_image, begin_rows_image
from flashrt.capsule.lineage import Segment, chain_of
from flashrt.core.backend import Bytes


@dataclass(frozen=True, slots=True)
class _Item:
    extent: Extent
    segment: Segment | None  # whose rows; None: a fixed band


def move(capsule: Capsule, tier: str, shelf: Shelf | None) -> None:
    """See Capsule.to; `shelf` is the disk tier, if there is one."""
    table = capsule.owner
    table.check(capsule)
    try:
        target = Tier(tier)
    except ValueError:
        raise CapsuleError(f"tier {tier!r} is unknown; choose one of {', '.join(Tier)}") from None
    items = to_move(capsule, target)
    if not items:
        return
    if capsule.known_digest is None:
        capsule.known_digest = table.digest_capsule(capsule)
    images = [_begin(table, item) for item in items]
    if target is Tier.DEVICE:
        _to_device(table, items, [image() for image in images])
    else:
        if target is Tier.DISK:
            sources = _shelve(shelf, [image() for image in images])
        else:
            sources = [_keep(i, image) for i, image in zip(items, images, strict=True)]
        for item, source in zip(items, sources, strict=True):
            item.extent.give_back(table.pool)
            item.extent.source = source


def settle(capsule: Capsule, sources: Mapping[Extent, Source]) -> None:
    """Move to the disk tier what is there already: `sources` has a copy of each extent."""
    capsule.known_digest = capsule.digest
    for item in to_move(capsule, Tier.DISK):
        item.extent.give_back(capsule.owner.pool)
        item.extent.source = sources[item.extent]


def to_move(capsule: Capsule, target: Tier) -> list[_Item]:
    """The extents that `capsule.to(target)` moves."""
    items = [_Item(capsule.fixed, None)] if capsule.fixed.tier is not target else []
    needed = {
        segment
        for other in capsule.owner.capsules
        if other is not capsule and other.fixed.tier.speed > target.speed
        for segment in chain_of(other.segment)
    }
    for segment in chain_of(capsule.segment):
        speed = segment.rows.tier.speed
        if speed < target.speed or (speed > target.speed and segment not in needed):
            items.append(_Item(segment.rows, segment))
    return items


def _begin(table: CapsuleOwner, item: _Item) -> Callable[[], Bytes]:
    if item.segment is None:
        return begin_fixed_image(table.arena, item.extent)
    return begin_rows_image(table.arena, item.segment)


def _to_device(table: CapsuleOwner, items: list[_Item], images: list[Bytes]) -> None:
    backend, base = table.arena.backend, table.arena.memory.address
    blocks = table.pool.take(*(item.extent.nbytes for item in items))
    for block, image in zip(blocks, images, strict=True):
        backend.write(base + block, image)
    for item, block in zip(items, blocks, strict=True):
        item.extent.give_back(table.pool)
        item.extent.block = block


def _keep(item: _Item, image: Callable[[], Bytes]) -> Source:
    """An image of its own in host memory, whatever the mapping behind it; nobody waits for what
    the device sends.
    """
    if item.extent.is_on_device:
        return HostBytes(item.extent.nbytes, image)
    return HostBytes(item.extent.nbytes, image, image().copy())


def _shelve(shelf: Shelf | None, images: list[Bytes]) -> list[Source]:
    if shelf is None:
        raise CapsuleError("there is no disk tier; open the engine with flashrt.load")
    sources: list[Source] = []
    try:
        for image in images:
            sources.append(shelf.put(image))
    except BaseException:
        for source in sources:
            source.release()
        raise
    return sources
