"""The protocol of a folder where a store's files lie: whole files by name.

IS: what a store asks of a folder, checked names, and the two turns that keep writers and sweepers
apart. IS NOT: a folder (directory, remote), or what the files mean (store). It exists so that the
store is the same on a disk and on a service that has neither locks nor clocks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from flashrt.base.errors import StoreError
from flashrt.core.backend import Bytes

TMP, LOCK, FORMAT_FILE, REFS = "tmp", "lock", "format", "refs"
MOST_TEXT_NBYTES = 4096  # of the format file and of a ref
MOST_MANIFEST_NBYTES = 64 << 20  # some 400,000 segments
_NAME = re.compile(r"[A-Za-z0-9%_~-][A-Za-z0-9%._~-]*(/[A-Za-z0-9%_~-][A-Za-z0-9%._~-]*)*")


@dataclass(frozen=True, slots=True)
class Entry:
    """Something in a folder that is no folder. A name that is not plain may be anything."""

    name: str
    is_plain: bool  # a file, not a link or a pipe, whose name a store could have given
    nbytes: int
    age_s: float | None  # None: the filesystem does not tell


class Publishing(Protocol):
    """The turn of a writer: no sweep begins meanwhile."""

    def spare(self, name: str) -> None:
        """Called before a file is relied on or written: waits while a sweep is about to delete one
        of this name. Raises StoreError when that sweep seems dead.
        """
        ...

    def still_counts(self) -> bool:
        """Asked when all is written: False when a sweep took this writer for dead meanwhile; then
        everything has to be looked at again, in a turn that has begun anew.
        """
        ...


class Sweeping(Protocol):
    """The turn of a sweeper: nobody publishes until `condemn`."""

    @property
    def grace_s(self) -> float:
        """Younger files are left alone."""
        ...

    def condemn(self, names: Collection[str]) -> None:
        """These will be deleted, and nothing else; whoever publishes from here on knows."""
        ...

    def go_on(self) -> None:
        """Called between steps. Raises StoreError when another took this sweeper's turn."""
        ...


class Folder(Protocol):
    """Whole files by name; names are relative, with "/". All raise StoreError."""

    @property
    def url(self) -> str: ...
    def read(self, name: str, digest: str, nbytes: int | None = None) -> Bytes:
        """All bytes of an immutable file, checked: their xxh3-128 is `digest`, and there are
        `nbytes` of them, or no more than a manifest has.
        """
        ...

    def read_text(self, name: str, most_nbytes: int = MOST_TEXT_NBYTES) -> bytes:
        """All bytes of a small file, as they are now."""
        ...

    def check(self, name: str, digest: str, nbytes: int) -> None:
        """Raises StoreError unless the file has these bytes. All are read, none is kept."""
        ...

    def has(self, name: str, digest: str, nbytes: int) -> bool:
        """Whether the file has these bytes. Not read again while it looks as when it was read."""
        ...

    def write(self, name: str, data: Bytes) -> None:
        """Create or replace a file, whole or not at all."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        ...

    def names(self, below: str) -> list[str]:
        """Names below a folder name that a store can have given, sorted; what has one need not be a
        plain file. None when the folder is not there.
        """
        ...

    def list(self, below: str) -> list[Entry]:
        """The same with sizes and ages, and with strays. Links are not followed."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def prefetch(self, name: str, digest: str, nbytes: int) -> None:
        """Bring an immutable file near."""
        ...

    def publishing(self) -> AbstractContextManager[Publishing]:
        """A writer's turn; many may have it at once."""
        ...

    def removing(self) -> AbstractContextManager[Publishing | None]:
        """The turn of whoever removes names and manifests: a writer's, or, where a lock keeps
        writers out as well, None.
        """
        ...

    def sweeping(self, *, take_over: bool = False) -> AbstractContextManager[Sweeping]:
        """A sweeper's turn. take_over: other sweepers that have not ended are known to be dead."""
        ...


def is_name(name: str) -> bool:
    """Whether a store could have given a file this name."""
    return _NAME.fullmatch(name) is not None


def checked(name: str) -> str:
    """The name. Raises StoreError for one that could leave the folder."""
    if not is_name(name):
        raise StoreError(f"{name!r} is not a name of a file in a store")
    return name
