"""Spill: the disk tier of one process, a folder that goes when the process does.

IS: capsule.extent.Shelf over objects; equal bytes are kept once and counted. IS NOT: a store:
nobody else reads it. It exists so that a pool of a few GB can serve more capsules than it holds.

The folder lies in the cache folder, as a temporary folder may lie in memory. It is locked while its
process lives; what a killed process left behind is removed by the next one that spills. A forked
process reads what its parent put, as long as the parent keeps it, and gets a folder of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from flashrt.base.errors import CapsuleError
from flashrt.base.files import PRIVATE_FOLDER, lock_file, make_folders
from flashrt.base.flags import flags
from flashrt.base.locks import hold
from flashrt.base.system import IS_POSIX, NO_FOLLOW
from flashrt.capsule.extent import StoredBytes
from flashrt.core.backend import Bytes
from flashrt.store.directory import Directory
from flashrt.store.folder import LOCK
from flashrt.store.objects import object_name, put

_LIVE = "process-"  # folders whose lock is held, or was until the process died
_FRESH = "new-"  # before they are locked, for a moment
_FRESH_S = 3600.0


class Spill:
    """See capsule.extent.Shelf. Nothing is made before the first use."""

    def __init__(self, parent: Path | None = None) -> None:
        """`parent`: where the folder will be made; default: `spill` in the cache folder."""
        self._parent = parent
        self._home: _Home | None = None

    def put(self, data: Bytes) -> StoredBytes:
        """See capsule.extent.Shelf. Raises CapsuleError when it cannot be written, or does not read
        back: whoever asked gives its own copy away.
        """
        if self._home is None or self._home.owner != os.getpid():
            self._home = self._make()
        home = self._home
        stored, is_new = put(home.folder, data)
        if is_new:
            stored.check()
        home.users[stored.digest] += 1
        return replace(stored, released=home.release)

    def _make(self) -> _Home:
        parent = self._parent or flags().cache_dir / "spill"
        try:
            make_folders(parent, parent, is_durable=False, mode=PRIVATE_FOLDER)
            _sweep(parent)
            fresh = Path(tempfile.mkdtemp(prefix=_FRESH, dir=parent))
            path = parent / f"{_LIVE}{os.getpid()}-{fresh.name.removeprefix(_FRESH)}"
            if not IS_POSIX:  # Windows renames no folder with an open file: for a moment unlocked
                fresh = fresh.rename(path)
            lock = lock_file(fresh / LOCK, os.O_CREAT)
            hold(lock)
            if IS_POSIX:
                fresh.rename(path)
        except OSError as error:
            raise CapsuleError(f"cannot make a folder for the disk tier: {error}") from error
        weakref.finalize(self, _remove, path, lock, os.getpid())
        return _Home(Directory(path, is_durable=False), os.getpid())


@dataclass(frozen=True, slots=True)
class _Home:
    """The folder of one process, and how many need each object."""

    folder: Directory
    owner: int  # the process that made it
    users: Counter[str] = field(default_factory=Counter)

    def release(self, digest: str) -> None:
        """One user less. Of a forked copy nobody counts: the bytes are its parent's."""
        if self.owner != os.getpid():
            return
        self.users[digest] -= 1
        if not self.users[digest]:
            del self.users[digest]
            self.folder.delete(object_name(digest))


def _remove(path: Path, lock: io.FileIO, owner: int) -> None:
    """At the end of the process, or with the engine; a forked child's end leaves the folder."""
    if not IS_POSIX:
        lock.close()  # Windows removes no open file
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
    lock.close()


def _sweep(parent: Path) -> None:
    """Remove what dead processes left."""
    for path in [*parent.glob(f"{_LIVE}*"), *parent.glob(f"{_FRESH}*")]:
        with contextlib.suppress(OSError):  # another process may be sweeping, too
            is_fresh = path.name.startswith(_FRESH)
            if is_fresh and time.time() - path.lstat().st_mtime < _FRESH_S:
                continue
            made = os.O_CREAT if is_fresh else 0  # killed before it made its lock
            with lock_file(path / LOCK, NO_FOLLOW | made) as lock:
                hold(lock, may_wait=False)
                if not IS_POSIX:
                    lock.close()
                shutil.rmtree(path, ignore_errors=True)
