"""The capsule: an immutable state at a commit boundary.

IS: the noun: what it holds, where that lies, and the protocol of its owner. IS NOT: its verbs: they
go to the owner, an engine's table of capsules. So this module imports no module that moves bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.capsule.extent import Extent, StoredBytes
from flashrt.capsule.lineage import Segment, chain_of, tokens_of
from flashrt.capsule.restore import RestoreMoves
from flashrt.capsule.turn import Turn
from flashrt.core.arena import Arena

_R = TypeVar("_R")


class CapsuleOwner(Protocol):
    """Whoever made a capsule carries out its verbs: a `table.CapsuleTable`."""

    arena: Arena
    fingerprint: str
    capsules: set[Capsule]

    @property
    def turn(self) -> Turn: ...

    def save(self, capsule: Capsule, path: str | os.PathLike[str]) -> None: ...
    def move(self, capsule: Capsule, tier: str) -> None: ...
    def offload(self, capsule: Capsule, sources: Mapping[Extent, StoredBytes]) -> None: ...
    def drop(self, capsule: Capsule) -> None: ...
    def check(self, capsule: Capsule) -> None: ...
    def digest_capsule(self, capsule: Capsule) -> str: ...
    def change(self, work: Callable[[], _R]) -> _R: ...


@dataclass(slots=True, eq=False, weakref_slot=True)
class Capsule:
    """An immutable state at a commit boundary; made by a snapshot, or loaded from a file."""

    owner: CapsuleOwner
    segment: Segment | None  # None: no rows, position 0
    fixed: Extent  # the fixed band
    nbytes: int  # its own: fixed band, and rows that no ancestor holds
    name: str | None
    known_digest: str | None = None  # kept when the bytes leave the device
    late_digest: Callable[[], str] | None = None  # the same, while the device works on it
    is_pinned: bool = False  # eviction leaves it where it is
    parent: Capsule | None = None  # the nearest living one that its lane descended from
    children: set[Capsule] = field(default_factory=set)  # the living ones whose parent this is
    known_moves: dict[int, RestoreMoves] = field(default_factory=dict)  # by lane: the last ones

    @property
    def position(self) -> int:
        """Committed tokens below the boundary."""
        return 0 if self.segment is None else self.segment.stop

    @property
    def tokens(self) -> NDArray[np.int32]:
        """All tokens below the position."""
        return tokens_of(self.segment)

    @property
    def is_dropped(self) -> bool:
        """Whether its memory was given back."""
        return self not in self.owner.capsules

    @property
    def tier(self) -> str:
        """Where its bytes are: device, host or disk, the slowest that a restore reads from."""
        if self.is_dropped:
            return "dropped"
        return min((e.tier for e in extents_of(self)), key=lambda tier: tier.speed).value

    @property
    def digest(self) -> str:
        """32 hex digits, equal to the digest of a lane in the same state."""
        return self.owner.digest_capsule(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, whole or not at all; see capsule.file. Raises CapsuleError."""
        self.owner.save(self, path)

    def to(self, tier: str) -> None:
        """Move it to "device", "host" or "disk"; see capsule.tiers. Whole or not at all.

        Rows that a capsule on a faster tier needs stay there. Raises PoolFull, or CapsuleError for
        an unknown tier, a dropped capsule, or a disk that cannot be written or read.
        """
        self.owner.move(self, tier)

    def prefetch(self) -> None:
        """Ask for bytes on slow tiers to be brought near, without moving them."""
        self.owner.check(self)
        for extent in extents_of(self):
            if extent.source is not None:
                extent.source.prefetch()

    def drop(self) -> None:
        """Give its memory back; rows that descendants need stay. A second drop does nothing."""
        self.owner.drop(self)

    def __repr__(self) -> str:
        label = f" {self.name!r}" if self.name else ""
        return f"<Capsule{label} position={self.position} nbytes={self.nbytes} {self.tier}>"


def is_on_device(capsule: Capsule) -> bool:
    """Whether copies within the arena can address all of its bytes."""
    place, at = capsule.fixed.place, capsule.segment
    while isinstance(place, int):
        if at is None:
            return True
        place, at = at.body.rows.place, at.body.parent
    return False


def extents_of(capsule: Capsule) -> list[Extent]:
    """The fixed band, then the rows of the chain, youngest first."""
    return [capsule.fixed, *(s.rows for s in chain_of(capsule.segment))]
