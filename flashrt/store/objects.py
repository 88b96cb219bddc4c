"""Objects: immutable byte strings named by their content.

IS: put (a content that is there already is not written again), and read (checked each time). IS
NOT: which objects make a capsule (manifest). It exists so that capsules which share rows, in a
store or on the disk tier, share their bytes on disk.

The name is the xxh3-128 of the bytes: it finds damage, not malice; who can write to a store is
trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from flashrt.base.errors import StoreError
from flashrt.capsule.extent import Tier
from flashrt.core.backend import Bytes
from flashrt.store.folder import Folder

OBJECTS = "objects"
_ID = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(rf"{OBJECTS}/[0-9a-f]{{2}}/[0-9a-f]{{30}}")


def object_id(data: Bytes) -> str:
    """32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data.data)


def object_name(digest: str) -> str:
    """The file of an object. Raises StoreError unless `digest` is 32 hex digits."""
    if not _ID.fullmatch(digest):
        raise StoreError(f"{digest!r} is not an object id (32 hex digits)")
    return f"{OBJECTS}/{digest[:2]}/{digest[2:]}"


def is_object(name: str) -> bool:
    """Whether a file of this name is an object."""
    return _FILE.fullmatch(name) is not None


@dataclass(slots=True)
class Near:
    """The object that was looked at last, in memory: a restore reads what a load looked at."""

    held: tuple[str, Bytes] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StoredObject:
    """A source on the disk tier: in a store, or in a spill folder."""

    folder: Folder
    digest: str
    nbytes: int
    released: Callable[[str], None] | None = None  # None: others may need it; the sweeper decides
    near: Near | None = None

    @property
    def tier(self) -> Tier:
        """Disk."""
        return Tier.DISK

    @property
    def is_there(self) -> bool:
        """Whether there is a file of the right size."""
        return self.folder.size(object_name(self.digest)) == self.nbytes

    def look(self) -> Bytes:
        """`read`, when another is to follow soon."""
        data = self.read()
        if self.near is not None:
            self.near.held = self.digest, data
        return data

    def read(self) -> Bytes:
        """The bytes, in memory, checked. Raises StoreError when gone or damaged."""
        if self.near is not None and (held := self.near.held) and held[0] == self.digest:
            self.near.held = None
            return held[1]
        return self.folder.read(object_name(self.digest), self.digest, self.nbytes)

    def check(self) -> None:
        """Raises StoreError when gone or damaged; nothing is kept in memory."""
        self.folder.check(object_name(self.digest), self.digest, self.nbytes)

    def prefetch(self) -> None:
        """Into the page cache, or the local cache of a remote store."""
        self.folder.prefetch(object_name(self.digest), self.digest, self.nbytes)

    def release(self) -> None:
        """Tell the owner, if there is one."""
        if self.released is not None:
            self.released(self.digest)


def put(folder: Folder, data: Bytes) -> tuple[StoredObject, bool]:
    """An object, written unless its bytes are there; and whether it was written."""
    digest = object_id(data)
    name = object_name(digest)
    is_new = not folder.has(name, digest, data.nbytes)
    if is_new:
        folder.write(name, data)
    return StoredObject(folder, digest, data.nbytes), is_new
