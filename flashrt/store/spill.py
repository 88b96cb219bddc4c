"""Spill: the disk tier of one process, a folder that goes when the process does.

IS: capsule.extent.Shelf over objects; equal bytes are kept once and counted. IS NOT: a store:
nobody else reads it. It exists so that a pool of a few GB can serve more capsules than it holds.

The folder lies in the cache folder, as a temporary folder may lie in memory. It is locked while its
process lives; what a killed process left behind is removed by the next one that spills.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

from flashrt.base.errors import CapsuleError
from flashrt.base.flags import flags
from flashrt.capsule.extent import StoredBytes
from flashrt.core.backend import Bytes
from flashrt.store.folder import LOCK, Directory
from flashrt.store.objects import object_name, put

_LIVE = "process-"  # folders whose lock is held, or was until the process died


class Spill:
    """See capsule.extent.Shelf. Nothing is made before the first use."""

    def __init__(self, parent: Path | None = None) -> None:
        """`parent`: where the folder will be made; default: `spill` in the cache folder."""
        self._parent = parent
        self._folder: Directory | None = None
        self._users: Counter[str] = Counter()

    def put(self, data: Bytes) -> StoredBytes:
        """See capsule.extent.Shelf. Raises CapsuleError when it cannot be written."""
        if self._folder is None:
            self._folder = self._make()
        stored, _ = put(self._folder, data)
        self._users[stored.digest] += 1
        return replace(stored, released=self._release)

    def _release(self, digest: str) -> None:
        self._users[digest] -= 1
        if not self._users[digest] and self._folder is not None:
            self._folder.delete(object_name(digest))

    def _make(self) -> Directory:
        parent = self._parent or flags().cache_dir / "spill"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
            fresh = Path(tempfile.mkdtemp(prefix="new-", dir=parent))
            handle = os.open(fresh / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            path = fresh.rename(parent / f"{_LIVE}{os.getpid()}-{fresh.name.removeprefix('new-')}")
        except OSError as error:
            raise CapsuleError(f"cannot make a folder for the disk tier: {error}") from error
        weakref.finalize(self, _remove, path, handle, os.getpid())
        return Directory(path, is_durable=False)


def _remove(path: Path, handle: int, owner: int) -> None:
    """At the end of the process, or with the engine; not at the end of a forked child."""
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _sweep(parent: Path) -> None:
    """Remove what dead processes left."""
    for path in parent.glob(f"{_LIVE}*"):
        with contextlib.suppress(OSError):  # another process may be sweeping, too
            handle = os.open(path / LOCK, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)
