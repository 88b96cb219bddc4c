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
from dataclasses import dataclass, field

import xxhash

from flashrt.base.errors import StoreError
from flashrt.capsule.extent import Tier
from flashrt.core.backend import Bytes
from flashrt.store.folder import Directory, Folder, Remote

OBJECTS = "objects"
_ID = re.compile(r"[0-9a-f]{32}")


def object_id(data: Bytes) -> str:
    """32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data.data)


def object_name(digest: str) -> str:
    """The file of an object. Raises StoreError unless `digest` is 32 hex digits."""
    if not _ID.fullmatch(digest):
        raise StoreError(f"{digest!r} is not an object id (32 hex digits)")
    return f"{OBJECTS}/{digest[:2]}/{digest[2:]}"


@dataclass(frozen=True, slots=True, eq=False)
class StoredObject:
    """A source on the disk tier: in a store, or in a spill folder."""

    folder: Folder
    digest: str
    nbytes: int
    released: Callable[[str], None] | None = None  # None: others may need it; the sweeper decides
    near: list[Bytes] = field(default_factory=list)  # mapped by `look`, for the next read

    @property
    def tier(self) -> Tier:
        """Disk."""
        return Tier.DISK

    @property
    def is_there(self) -> bool:
        """Whether there is a file of the right size."""
        return self.folder.size(object_name(self.digest)) == self.nbytes

    def look(self) -> Bytes:
        """`read`, when another is to follow: it checks again, but need not map again."""
        data = self.read()
        if isinstance(self.folder, Directory):
            self.near[:] = [data]
        return data

    def read(self) -> Bytes:
        """The bytes, mapped and checked. Raises StoreError when gone or damaged."""
        name = object_name(self.digest)
        data = self.near.pop() if self.near else None
        if data is None or self.folder.size(name) != self.nbytes:  # else it was cut meanwhile
            data = self.folder.read(name, self.nbytes)
        if object_id(data) != self.digest:
            if isinstance(self.folder, Remote):
                self.folder.forget(name)
            raise StoreError(
                f"{self.folder.url}/{name} is damaged: its bytes do not match its name; run "
                "`flashrt store verify`"
            )
        return data

    def prefetch(self) -> None:
        """Into the page cache, or the local cache of a remote store."""
        self.folder.prefetch(object_name(self.digest))

    def release(self) -> None:
        """Tell the owner, if there is one."""
        if self.released is not None:
            self.released(self.digest)


def put(folder: Folder, data: Bytes) -> tuple[StoredObject, bool]:
    """An object, written unless it is there; and whether it was written."""
    digest = object_id(data)
    name = object_name(digest)
    is_new = folder.size(name) != data.nbytes
    if is_new:
        folder.write(name, data)
    return StoredObject(folder, digest, data.nbytes), is_new
