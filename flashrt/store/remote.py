"""A store's folder on a filesystem of fsspec, with a local folder as a cache of what is immutable.

IS: whole files over the network, and the turns of writers by announcements (writers). IS NOT: a
local directory (directory), or what the files mean (store).

A file appears whole: by one put where the service makes that atomic, else under a temporary name
that is moved; where neither is so, whoever reads it finds out by its checksum. Ages are by the
service's clock: that of a file which the sweeper has just written. The cache is trusted as little
as the network: a copy that does not verify is fetched again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from flashrt.base.errors import StoreError
from flashrt.base.flags import flags
from flashrt.core.backend import Bytes
from flashrt.store.directory import Directory
from flashrt.store.folder import (
    MOST_MANIFEST_NBYTES,
    MOST_TEXT_NBYTES,
    TMP,
    Entry,
    Publishing,
    Sweeping,
    checked,
    is_name,
)
from flashrt.store.writers import CLOCK, Writers, name_of

GRACE_S = 3600.0  # younger files are never swept: writers of older versions announce nothing
ATOMIC_PUT = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "cos", "r2", "memory"}
)
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "created")
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "version_id", "content_hash")


class Remote:
    """A folder of an fsspec filesystem. See folder.Folder."""

    def __init__(self, url: str) -> None:
        """Raises StoreError when fsspec has no such filesystem."""
        self.url = url.rstrip("/")
        self._owner = 0  # the process that opened the filesystem: a forked one opens its own
        self._opened: Any = None
        self._root = ""
        self._open()
        place = flags().cache_dir / "stores" / xxhash.xxh3_64_hexdigest(self.url.encode())
        self._cache = Directory(place, is_durable=False)
        self._seen: dict[str, tuple[str, object]] = {}  # digest and version of what was read
        self.writers = Writers(self)

    # -- reading --------------------------------------------------------------------------------

    def read(self, name: str, digest: str, nbytes: int | None = None) -> Bytes:
        """See Folder. From the cache, if its copy verifies."""
        with contextlib.suppress(StoreError):
            return self._cache.read(name, digest, nbytes)
        data = self._fetch(name, digest, nbytes)
        with contextlib.suppress(StoreError):  # a full disk here is no reason to fail
            self._cache.write(name, data)
        return data

    def read_text(self, name: str, most_nbytes: int = MOST_TEXT_NBYTES) -> bytes:
        """See Folder."""
        info = self._info(name)
        if info is None:
            raise StoreError(f"cannot read {self.url}/{name}: no such file")
        if (size := int(info["size"] or 0)) > most_nbytes:
            raise StoreError(f"{self.url}/{name} is damaged: {size:,} bytes are too many")
        raw = self._call(lambda fs: fs.cat_file(self._path(name)), f"read {self.url}/{name}")
        return bytes(raw)

    def check(self, name: str, digest: str, nbytes: int) -> None:
        """See Folder."""
        self._fetch(name, digest, nbytes)

    def has(self, name: str, digest: str, nbytes: int) -> bool:
        """See Folder. Where the service tells no version of a file, it is read each time."""
        info = self._info(name)
        if info is None or info["size"] != nbytes:
            return False
        version = _version(info)
        if version is None or self._seen.get(name) != (digest, version):
            try:
                self.check(name, digest, nbytes)
            except StoreError as error:
                if error.__cause__ is not None and not _is_gone(error):
                    raise  # nobody knows
                return False
        return True

    def size(self, name: str) -> int | None:
        """See Folder."""
        info = self._info(name)
        return None if info is None else int(info["size"] or 0)

    def names(self, below: str) -> list[str]:
        """See Folder."""
        path = self._path(below)
        found = self._find(path, f"list {self.url}/{below}")
        return sorted(n for n in map(self._inside, found) if is_name(n))

    def list(self, below: str) -> list[Entry]:
        """See Folder. Ages are by the service's clock, as far as it tells."""
        path = self._path(below)
        found = self._find(path, f"list {self.url}/{below}")
        now = self._now_s()
        entries = []
        for full, info in found.items():
            name, changed = self._inside(full), _time_s(info)
            age_s = None if now is None or changed is None else now - changed
            is_plain = is_name(name) and not info.get("islink")
            entries.append(Entry(name, is_plain, int(info["size"] or 0), age_s))
        return sorted(entries, key=lambda e: e.name)

    def prefetch(self, name: str, digest: str, nbytes: int) -> None:
        """See Folder: into the local cache, before this returns."""
        self.read(name, digest, nbytes)

    # -- writing --------------------------------------------------------------------------------

    def write(self, name: str, data: Bytes) -> None:
        """See Folder."""
        if self._is_atomic():
            self.put(name, data.tobytes())
            return
        path, what = self._path(name), f"write {self.url}/{name}"
        temporary = f"{TMP}/{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self.put(temporary, data.tobytes())
            if self.size(temporary) != data.nbytes:
                raise StoreError(f"cannot {what}: the file came out shorter than what was sent")
            self._make_folder(path, what)
            self._seen.pop(name, None)
            self._call(lambda fs: fs.mv(self._path(temporary), path), what)
        except BaseException as error:
            with contextlib.suppress(StoreError):
                self.delete(temporary)
            if not isinstance(error, StoreError) or self.size(name) is None:
                raise
            # Some filesystems do not move onto a file that is there; whoever reads it checks it.
            self.put(name, data.tobytes())

    def put(self, name: str, data: bytes) -> None:
        """See writers.Files: at once, under its own name."""
        path, what = self._path(name), f"write {self.url}/{name}"
        self._seen.pop(name, None)
        self._make_folder(path, what)
        self._call(lambda fs: fs.pipe_file(path, data), what)

    def get(self, name: str, most_nbytes: int) -> bytes | None:
        """See writers.Files: all bytes of a file, None when there is none."""
        try:
            return self.read_text(name, most_nbytes)
        except StoreError:
            if self.size(name) is None:
                return None
            raise

    def delete(self, name: str) -> None:
        """See Folder."""
        path = self._path(name)
        self._seen.pop(name, None)
        with contextlib.suppress(StoreError):
            self._cache.delete(name)
        if self.size(name) is not None:
            try:
                self._call(lambda fs: fs.rm_file(path), f"remove {self.url}/{name}")
            except StoreError:
                if self.size(name) is not None:  # else another process was faster
                    raise

    # -- turns ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def publishing(self) -> Iterator[Publishing]:
        """See Folder."""
        with self.writers.publishing() as turn:
            yield turn

    @contextlib.contextmanager
    def removing(self) -> Iterator[Publishing | None]:
        """See Folder."""
        with self.writers.publishing() as turn:
            yield turn

    @contextlib.contextmanager
    def sweeping(self, *, take_over: bool = False) -> Iterator[Sweeping]:
        """See Folder."""
        with self.writers.sweeping(GRACE_S, take_over=take_over) as turn:
            yield turn

    # -- inside ---------------------------------------------------------------------------------

    def _fetch(self, name: str, digest: str, nbytes: int | None) -> Bytes:
        """All bytes, from the service, checked."""
        info = self._info(name)
        where = f"{self.url}/{name}"
        if info is None:
            raise StoreError(f"cannot read {where}: no such file")
        size = int(info["size"] or 0)
        if size != nbytes and (nbytes is not None or size > MOST_MANIFEST_NBYTES):
            raise StoreError(f"{where} is damaged: {size:,} bytes, not {nbytes or 'a manifest'}")
        raw = self._call(lambda fs: fs.cat_file(self._path(name)), f"read {where}")
        data: Bytes = np.frombuffer(raw, np.uint8)
        if xxhash.xxh3_128_hexdigest(data.data) != digest:
            raise StoreError(
                f"{where} is damaged: its bytes do not match its name; run `flashrt store verify`"
            )
        self._seen[name] = digest, _version(info)
        return data

    def _info(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        try:
            self._call(lambda fs: fs.invalidate_cache(), "look")
            found = self._call(lambda fs: fs.info(path), f"look at {self.url}/{name}")
        except StoreError as error:
            if _is_gone(error):
                return None
            raise
        return None if found.get("type") == "directory" else dict(found)

    def _find(self, path: str, what: str) -> dict[str, dict[str, Any]]:
        self._call(lambda fs: fs.invalidate_cache(), what)
        try:
            return dict(self._call(lambda fs: fs.find(path, detail=True), what))
        except StoreError as error:
            if _is_gone(error):
                return {}
            raise

    def _now_s(self) -> float | None:
        """The service's time, from a file written for it; None where it does not tell, or where
        nothing can be written.
        """
        name = name_of(CLOCK, secrets.token_hex(8))
        with contextlib.suppress(StoreError):
            self.put(name, b"what time is it?\n")
            info = self._info(name)
            self.delete(name)
            return None if info is None else _time_s(info)
        return None

    def _make_folder(self, path: str, what: str) -> None:
        self._call(lambda fs: fs.makedirs(path.rpartition("/")[0], exist_ok=True), what)

    def _is_atomic(self) -> bool:
        """Whether one put makes a file appear whole."""
        protocol = self._fs.protocol
        return bool(ATOMIC_PUT & {*((protocol,) if isinstance(protocol, str) else protocol)})

    def _open(self) -> None:
        import fsspec  # only who uses a remote store pays for the import

        try:
            self._opened, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(f"cannot open {self.url}: {error}") from error
        self._owner = os.getpid()

    @property
    def _fs(self) -> Any:
        if self._owner != os.getpid():
            self._open()
        return self._opened

    def _inside(self, full: str) -> str:
        return full[full.index(self._root) + len(self._root) :].lstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked(name)}"

    def _call(self, call: Callable[[Any], Any], what: str) -> Any:
        try:
            return call(self._fs)
        except StoreError:
            raise
        except Exception as error:  # every filesystem has errors of its own
            raise StoreError(f"cannot {what}: {error}") from error


def _is_gone(error: StoreError) -> bool:
    return isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)


def _time_s(info: dict[str, Any]) -> float | None:
    """When a file changed, in seconds by the service's clock."""
    for key in _TIMES:
        stamp = info.get(key)
        if isinstance(stamp, str):
            with contextlib.suppress(ValueError):
                stamp = datetime.datetime.fromisoformat(stamp)
        if isinstance(stamp, datetime.datetime):
            return stamp.timestamp()
        if isinstance(stamp, int | float):
            return float(stamp)
    return None


def _version(info: dict[str, Any]) -> object:
    """What changes when a file does; None where the service tells nothing of the kind."""
    found = [str(info[key]) for key in _VERSIONS if info.get(key)]
    if not found and (changed := _time_s(info)) is not None:
        found = [str(changed)]
    return (info.get("size"), *found) if found else None
