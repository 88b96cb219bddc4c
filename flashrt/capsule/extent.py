"""Extents: the stored bytes of one fixed band or one segment's rows, wherever they are.

IS: the nouns of the tiers. On the device an extent is a block of the pool; elsewhere a source of
canonical bytes (image). IS NOT: moving (tiers) or policy (eviction). It exists so that lineage and
restores need not know where bytes are. The store implements sources on disk.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flashrt.base.errors import CapsuleError
from flashrt.capsule.pool import Pool
from flashrt.core.backend import Bytes


class Tier(enum.StrEnum):
    """Where bytes are; `speed` is higher where a restore is faster."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"

    @property
    def speed(self) -> int:
        """2, 1, 0."""
        return _SPEED[self]


_SPEED = {Tier.DEVICE: 2, Tier.HOST: 1, Tier.DISK: 0}


class StoredBytes(Protocol):
    """Canonical bytes outside the device. Immutable."""

    @property
    def tier(self) -> Tier: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> Bytes:
        """The bytes, checked; uint8 [nbytes], not to be written. Raises CapsuleError."""
        ...

    def prefetch(self) -> None:
        """Ask for the bytes to be brought near; returns at once where it can."""
        ...

    def release(self) -> None:
        """Nobody needs the bytes any more."""
        ...


class Shelf(Protocol):
    """A place of the disk tier."""

    def put(self, data: Bytes) -> StoredBytes:
        """Write bytes, whole or not at all. Raises CapsuleError when that cannot be done."""
        ...


@dataclass(slots=True, eq=False)
class HostBytes:
    """Bytes in host memory; the device may still be sending them."""

    nbytes: int
    arrive: Callable[[], Bytes]
    data: Bytes | None = None

    @classmethod
    def holding(cls, data: Bytes) -> HostBytes:
        """Bytes that are here already."""
        return cls(data.nbytes, lambda: data, data)

    @property
    def tier(self) -> Tier:
        """Host."""
        return Tier.HOST

    def read(self) -> Bytes:
        """The bytes themselves."""
        if self.data is None:
            self.data = self.arrive()
        return self.data

    def prefetch(self) -> None:
        """They are as near as host memory gets."""

    def release(self) -> None:
        """They go when nobody refers to them."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Extent:
    """`nbytes` at one place: the offset of a block of the pool, stored bytes elsewhere, or None
    once given back. One word says where, so that no exception can fall between two of them.
    """

    nbytes: int
    place: int | StoredBytes | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the bytes are anywhere; identity outlives storage."""
        return self.place is not None

    @property
    def is_on_device(self) -> bool:
        """Whether copies within the arena can address the bytes."""
        return isinstance(self.place, int)

    @property
    def block(self) -> int:
        """Offset of the block in the pool; -1 where there is none."""
        return self.place if isinstance(self.place, int) else -1

    @property
    def source(self) -> StoredBytes | None:
        """The bytes off the device, if they are there."""
        return None if isinstance(self.place, int) else self.place

    @property
    def tier(self) -> Tier:
        """Where the bytes are. Raises CapsuleError once they were given back."""
        return Tier.DEVICE if isinstance(self.place, int) else self.need_source().tier

    def need_source(self) -> StoredBytes:
        """The source of an extent that is not on the device."""
        if self.source is None:
            raise CapsuleError("these bytes were given back; the capsule was dropped")
        return self.source

    def move_to(self, place: int | StoredBytes | None, pool: Pool) -> None:
        """The bytes are at another place already, or are not needed; then the old one is freed."""
        old, self.place = self.place, place
        if isinstance(old, int):
            pool.give(old)
        elif old is not None:
            old.release()

    def give_back(self, pool: Pool) -> None:
        """Free the bytes, wherever they are."""
        self.move_to(None, pool)
