"""Folders: where a store's files lie. A directory, or any fsspec filesystem with a cache in front.

IS: whole files by name: atomic durable writes, checked names, reads without locks. IS NOT: what the
files mean (store).

A directory is used directly: a file is written in `tmp/` and renamed (base.files); so a name, once
seen, has its content, whenever the writer is killed. Writers of one directory hold its lock shared,
the sweeper exclusively; a dead process holds no lock.
A remote filesystem publishes a whole file at once, or is verified by whoever reads it; it has no
lock, so sweeping there leaves young files alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from flashrt.base.errors import StoreError
from flashrt.base.files import replacing, sync_folder
from flashrt.base.flags import flags
from flashrt.core.backend import Bytes

TMP, LOCK = "tmp", "lock"
GRACE_S = 3600.0  # files of a remote folder that are younger are never swept
_NAME = re.compile(r"[A-Za-z0-9%_~-][A-Za-z0-9%._~-]*(/[A-Za-z0-9%_~-][A-Za-z0-9%._~-]*)*")


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a folder."""

    name: str
    nbytes: int
    age_s: float


class Folder(Protocol):
    """Whole files by name; names are relative, with "/"."""

    @property
    def url(self) -> str: ...
    def read(self, name: str, nbytes: int | None = None) -> Bytes:
        """All bytes, mapped or cached. Raises StoreError when there is no such file, or when it
        does not have `nbytes`.
        """
        ...

    def write(self, name: str, data: Bytes) -> None:
        """Create or replace a file, whole or not at all. Raises StoreError."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""
        ...

    def list(self, below: str) -> list[Entry]:
        """All files below a folder name, sorted by name; none when it is not there."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def prefetch(self, name: str) -> None:
        """Bring a file near."""
        ...

    def publishing(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is swept meanwhile."""
        ...

    def sweeping(self) -> contextlib.AbstractContextManager[float]:
        """Nobody publishes meanwhile; gives the age in seconds below which nothing is swept."""
        ...


def open_folder(url: str) -> Folder:
    """A directory path, or a URL of fsspec (s3://bucket/store, gs://..., memory://...)."""
    if "://" not in url:
        return Directory(Path(url))
    if url.startswith("file://"):
        return Directory(Path(url.removeprefix("file://")))
    return Remote(url)


def checked(name: str) -> str:
    """The name. Raises StoreError for one that could leave the folder."""
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name!r} is not a name of a file in a store")
    return name


class Directory:
    """A folder of the local filesystem."""

    def __init__(self, root: Path, *, is_durable: bool = True) -> None:
        """`is_durable`: files outlive a loss of power; a folder of one process need not."""
        self.root = root.absolute()
        self._is_durable = is_durable

    @property
    def url(self) -> str:
        """The path."""
        return str(self.root)

    def read(self, name: str, nbytes: int | None = None) -> Bytes:
        """See Folder. Links are not followed, and nothing but plain files is opened."""
        path = f"{self.root}/{checked(name)}"
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                info = os.fstat(handle)
                if not stat.S_ISREG(info.st_mode):
                    raise StoreError(f"{path} is not a plain file")
                if nbytes is not None and info.st_size != nbytes:
                    raise StoreError(f"{path} is damaged: {info.st_size} bytes, not {nbytes}")
                if not info.st_size:
                    return np.empty(0, np.uint8)
                mapping = mmap.mmap(handle, info.st_size, prot=mmap.PROT_READ)
                return np.frombuffer(mapping, np.uint8)
            finally:
                os.close(handle)
        except (OSError, ValueError) as error:  # ValueError: it became shorter meanwhile
            raise StoreError(f"cannot read {path}: {error}") from error

    def write(self, name: str, data: Bytes) -> None:
        """See Folder."""
        path = self.root / checked(name)
        try:
            self._make(self.root / TMP)
            self._make(path.parent)
            fresh = replacing(path, is_durable=self._is_durable, temporary_in=self.root / TMP)
            with fresh as temporary:
                temporary.write_bytes(data.data)
        except OSError as error:
            raise StoreError(
                f"cannot write {path}: {error}; nothing half-written was left"
            ) from error

    def size(self, name: str) -> int | None:
        """See Folder."""
        try:
            return os.lstat(f"{self.root}/{checked(name)}").st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot look at {self.root / name}: {error}") from error

    def list(self, below: str) -> list[Entry]:
        """See Folder."""
        now, found = time.time(), []
        for folder, _, names in os.walk(self.root / checked(below)):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # another process removed it just now
                    info = path.lstat()
                    inside = path.relative_to(self.root).as_posix()
                    found.append(Entry(inside, info.st_size, now - info.st_mtime))
        return sorted(found, key=lambda e: e.name)

    def delete(self, name: str) -> None:
        """See Folder."""
        path = self.root / checked(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot remove {path}: {error}") from error

    def prefetch(self, name: str) -> None:
        """See Folder: the kernel reads ahead into the page cache."""
        path = self.root / checked(name)
        with (
            contextlib.suppress(OSError, ValueError),
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping,
        ):
            mapping.madvise(mmap.MADV_WILLNEED)

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """See Folder."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def sweeping(self) -> Iterator[float]:
        """See Folder; what dead writers left in `tmp/` goes first."""
        with self._locked(fcntl.LOCK_EX):
            for entry in self.list(TMP):
                self.delete(entry.name)
            yield -1e9

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        path = self.root / LOCK
        try:
            self._make(self.root)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise StoreError(f"cannot lock {path}: {error}") from error
        try:
            fcntl.flock(handle, kind)
            yield
        finally:
            os.close(handle)

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            if self._is_durable:
                sync_folder(folder.parent)


class Remote:
    """A folder of an fsspec filesystem; files are read through a directory of the cache folder."""

    def __init__(self, url: str) -> None:
        """Raises StoreError when fsspec has no such filesystem."""
        import fsspec  # only who uses a remote store pays for the import

        self.url = url.rstrip("/")
        try:
            self._fs: Any
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"cannot open {url}: {error}") from error
        place = flags().cache_dir / "stores" / xxhash.xxh3_64_hexdigest(self.url.encode())
        self._cache = Directory(place)

    def read(self, name: str, nbytes: int | None = None) -> Bytes:
        """See Folder. Only immutable files (objects, capsules) are cached."""
        path, is_cached = self._path(name), not name.startswith("refs/")
        cached = self._cache.size(name) if is_cached else None
        if cached is not None and nbytes in (None, cached):
            return self._cache.read(name, nbytes)
        raw = self._call(lambda: self._fs.cat_file(path), f"read {self.url}/{name}")
        data: Bytes = np.frombuffer(raw, np.uint8)
        if is_cached:
            self._cache.write(name, data)
            return self._cache.read(name, nbytes)
        return data

    def write(self, name: str, data: Bytes) -> None:
        """See Folder."""
        path = self._path(name)
        self._call(
            lambda: (
                self._fs.makedirs(path.rpartition("/")[0], exist_ok=True),
                self._fs.pipe_file(path, data.tobytes()),
            ),
            f"write {self.url}/{name}",
        )

    def size(self, name: str) -> int | None:
        """See Folder."""
        path = self._path(name)
        try:
            info = self._call(lambda: self._fs.info(path), f"look at {self.url}/{name}")
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return int(info["size"])

    def list(self, below: str) -> list[Entry]:
        """See Folder; age is infinite where the filesystem keeps no time."""
        path = self._path(below)
        self._fs.invalidate_cache()
        found = self._call(lambda: self._fs.find(path, detail=True), f"list {self.url}/{below}")
        entries = []
        for full, info in found.items():
            inside = full[full.index(self._root) + len(self._root) :].lstrip("/")
            entries.append(Entry(inside, int(info["size"]), self._age_s(full, info)))
        return sorted(entries, key=lambda e: e.name)

    def delete(self, name: str) -> None:
        """See Folder."""
        path = self._path(name)
        self._cache.delete(name)
        if self.size(name) is not None:
            self._call(lambda: self._fs.rm_file(path), f"remove {self.url}/{name}")

    def prefetch(self, name: str) -> None:
        """See Folder: into the local cache, before this returns."""
        self.read(name)

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """See Folder; there is no lock, but young files are not swept."""
        yield

    @contextlib.contextmanager
    def sweeping(self) -> Iterator[float]:
        """See Folder."""
        yield GRACE_S

    def forget(self, name: str) -> None:
        """Drop the cached copy of a file: it did not verify."""
        self._cache.delete(name)

    def _age_s(self, path: str, info: dict[str, Any]) -> float:
        for key in ("LastModified", "mtime", "updated", "created"):
            if (stamp := info.get(key)) is not None:
                seconds = stamp if isinstance(stamp, int | float) else stamp.timestamp()
                return time.time() - seconds
        return float("inf")

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked(name)}"

    def _call(self, call: Callable[[], Any], what: str) -> Any:
        try:
            return call()
        except Exception as error:  # every filesystem has errors of its own
            raise StoreError(f"cannot {what}: {error}") from error
