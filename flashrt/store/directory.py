"""A store's folder on a local filesystem.

IS: atomic durable writes (base.files), reads into memory that check what they read, and a lock:
writers hold it shared, sweepers alone, and the kernel takes it from a dead process. IS NOT: a
folder elsewhere (remote), or what the files mean (store).

Modes. Files are private (0600, folders 0700), as they hold prompts; in a store that was made to be
shared, what is new gets the mode of the file `format`.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path

import xxhash

from flashrt.base.errors import StoreError, StoreWarning
from flashrt.base.files import (
    PRIVATE,
    PRIVATE_FOLDER,
    lock_file,
    make_folders,
    opened,
    outcome,
    read_exactly,
    read_file,
    read_through,
    replacing,
    sweep_dead,
)
from flashrt.base.locks import hold
from flashrt.base.messages import printable
from flashrt.base.system import NO_FOLLOW, NO_WAIT
from flashrt.core.backend import Bytes
from flashrt.store.folder import (
    FORMAT_FILE,
    LOCK,
    MOST_MANIFEST_NBYTES,
    MOST_TEXT_NBYTES,
    TMP,
    Entry,
    checked,
    is_name,
)

PATIENCE_S = 1.0  # of waiting for the lock, until a warning says for whom
_SETTLED_S = 0.1  # a file that changed less long ago may change again within one tick of the clock


class Alone:
    """A turn under a lock: see folder.Publishing and folder.Sweeping. Nothing can come between."""

    grace_s = float("-inf")

    def spare(self, name: str) -> None:
        """Nobody sweeps."""

    def still_counts(self) -> bool:
        """The lock is held until the end."""
        return True

    def condemn(self, names: Collection[str]) -> None:
        """Nobody publishes."""

    def go_on(self) -> None:
        """The lock is held until the end."""


class Directory:
    """A folder of the local filesystem. See folder.Folder."""

    def __init__(self, root: Path, *, is_durable: bool = True, is_shared: bool = False) -> None:
        """is_durable: files outlive a loss of power; a folder of one process need not. is_shared:
        a new folder and its files have the modes that the umask gives.
        """
        self.root = root.absolute()
        self._is_durable = is_durable
        self._is_shared = is_shared
        self._seen: dict[str, tuple[str, tuple[int, ...]]] = {}  # digest and stamp of what was read

    @property
    def url(self) -> str:
        """The path."""
        return str(self.root)

    # -- reading --------------------------------------------------------------------------------

    def read(self, name: str, digest: str, nbytes: int | None = None) -> Bytes:
        """See Folder. Links are not followed, and nothing but plain files is opened."""
        state = xxhash.xxh3_128()
        with self._opened(name, nbytes) as (handle, size):
            data = read_exactly(handle, size, seen=state.update)
        self._compare(name, digest, state.hexdigest())
        return data

    def read_text(self, name: str, most_nbytes: int = MOST_TEXT_NBYTES) -> bytes:
        """See Folder."""
        path = f"{self.root}/{checked(name)}"
        try:
            return read_file(path, most_nbytes, follow_links=False)
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error

    def check(self, name: str, digest: str, nbytes: int) -> None:
        """See Folder."""
        state = xxhash.xxh3_128()
        with self._opened(name, nbytes) as (handle, size):
            stamp = _stamp(os.fstat(handle))
            read_through(handle, size, state.update)
        self._compare(name, digest, state.hexdigest())
        if time.time() - stamp[-1] / 1e9 > _SETTLED_S:
            self._seen[name] = digest, stamp

    def has(self, name: str, digest: str, nbytes: int) -> bool:
        """See Folder."""
        try:
            info = os.lstat(f"{self.root}/{checked(name)}")
            if info.st_size != nbytes:
                return False
            if self._seen.get(name) != (digest, _stamp(info)):
                self.check(name, digest, nbytes)
        except (OSError, StoreError):  # whatever is there is not that: it will be written
            return False
        return True

    def size(self, name: str) -> int | None:
        """See Folder."""
        try:
            return os.lstat(f"{self.root}/{checked(name)}").st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot look at {self.root / name}: {error.strerror}") from error

    def names(self, below: str) -> list[str]:
        """See Folder."""
        return sorted(name for name, _ in self._walk(below) if is_name(name))

    def list(self, below: str) -> list[Entry]:
        """See Folder."""
        now, found = time.time(), []
        for name, entry in self._walk(below):
            with contextlib.suppress(FileNotFoundError):  # another process removed it just now
                info = entry.stat(follow_symlinks=False)
                is_plain = _is_plain(name, entry)
                found.append(Entry(name, is_plain, info.st_size, now - info.st_mtime))
        return sorted(found, key=lambda e: e.name)

    def prefetch(self, name: str, digest: str, nbytes: int) -> None:
        """See Folder: the kernel reads ahead into the page cache."""
        with contextlib.suppress(StoreError), self._opened(name, nbytes) as (handle, size):
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, size, os.POSIX_FADV_WILLNEED)

    # -- writing --------------------------------------------------------------------------------

    def write(self, name: str, data: Bytes) -> None:
        """See Folder."""
        path = self.root / checked(name)
        try:
            self._make(self.root / TMP)
            self._make(path.parent)
            fresh = replacing(
                path,
                is_durable=self._is_durable,
                mode=self._file_mode(),
                temporary_in=self.root / TMP,
            )
            with fresh as temporary:
                temporary.write_bytes(data.data)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}; {outcome(error)}") from error

    def delete(self, name: str) -> None:
        """See Folder; not through links, which may lead out of the folder."""
        path = self.root / checked(name)
        try:
            for above in path.relative_to(self.root).parents:
                if (self.root / above).is_symlink() and above != Path():
                    raise StoreError(f"cannot remove {path}: {self.root / above} is a link")
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise StoreError(f"cannot remove {path}: {error.strerror}") from error

    # -- turns ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def publishing(self) -> Iterator[Alone]:
        """See Folder."""
        with self._locked(is_shared=True):
            yield Alone()

    @contextlib.contextmanager
    def removing(self) -> Iterator[None]:
        """See Folder."""
        with self._locked(is_shared=False):
            yield

    @contextlib.contextmanager
    def sweeping(self, *, take_over: bool = False) -> Iterator[Alone]:
        """See Folder; what dead writers left in `tmp/` goes first."""
        with self._locked(is_shared=False):
            sweep_dead(self.root / TMP)
            for entry in self.list(TMP):  # of versions that knew no other way to tell
                if entry.is_plain:
                    self.delete(entry.name)
            yield Alone()

    # -- inside ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opened(self, name: str, nbytes: int | None) -> Iterator[tuple[int, int]]:
        """A descriptor of a file of the right size. What the caller does may raise OSError, too."""
        path = f"{self.root}/{checked(name)}"
        try:
            with opened(path, follow_links=False) as (handle, size):
                if nbytes is not None and size != nbytes:
                    raise StoreError(f"{path} is damaged: {size:,} bytes, not {nbytes:,}")
                if nbytes is None and size > MOST_MANIFEST_NBYTES:
                    raise StoreError(f"{path} is damaged: {size:,} bytes are no manifest")
                yield handle, size
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error

    def _compare(self, name: str, digest: str, found: str) -> None:
        if found != digest:
            self._seen.pop(name, None)
            raise StoreError(
                f"{self.root}/{name} is damaged: its bytes do not match its name; run "
                "`flashrt store verify`"
            )

    def _walk(self, below: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Everything but folders, by name. No link is followed, not even that of the top."""
        folders = [checked(below)]
        parts = below.split("/")
        if any((self.root / "/".join(parts[:n])).is_symlink() for n in range(1, len(parts) + 1)):
            return
        while folders:
            folder = folders.pop()
            with (
                contextlib.suppress(FileNotFoundError, NotADirectoryError),
                os.scandir(f"{self.root}/{folder}") as entries,
            ):
                for entry in entries:
                    name = f"{folder}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                    else:
                        yield name, entry

    @contextlib.contextmanager
    def _locked(self, *, is_shared: bool) -> Iterator[None]:
        path = self.root / LOCK
        try:
            self._make(self.root)
            mode = self._file_mode()
            flags = os.O_CREAT | NO_FOLLOW | NO_WAIT
            file = lock_file(path, flags, 0o666 if mode is None else mode)
        except OSError as error:
            raise StoreError(f"cannot lock {path}: {error.strerror}") from error
        try:
            self._wait(file.fileno(), is_shared=is_shared)
            yield
        finally:
            file.close()

    def _wait(self, handle: int, *, is_shared: bool) -> None:
        """Until the lock is ours; who holds it is said after a second."""
        until = time.monotonic() + PATIENCE_S
        try:
            while time.monotonic() < until:
                with contextlib.suppress(BlockingIOError):
                    hold(handle, is_shared=is_shared, may_wait=False)
                    return
                time.sleep(0.01)
            what = "sweeps or removes" if is_shared else "saves, sweeps or removes"
            warnings.warn(
                f"{self.root}: waiting for {holders(handle)}, which {what} there; the lock is free "
                "when it ends",
                StoreWarning,
                stacklevel=5,
            )
            hold(handle, is_shared=is_shared)
        except OSError as error:
            raise StoreError(
                f"cannot lock {self.root / LOCK}: {error.strerror}; a store needs a filesystem "
                "with locks (flock, or Windows' own)"
            ) from error

    def _file_mode(self) -> int | None:
        """Of files to come: that of `format`; before there is one, private or by the umask."""
        with contextlib.suppress(OSError):
            return stat.S_IMODE(os.lstat(f"{self.root}/{FORMAT_FILE}").st_mode) & 0o666
        return None if self._is_shared else PRIVATE

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            mode = self._file_mode()
            if mode is not None:
                mode = PRIVATE_FOLDER if mode == PRIVATE else mode | (mode & 0o444) >> 2
            make_folders(folder, self.root, is_durable=self._is_durable, mode=mode)


def holders(handle: int) -> str:
    """Who holds a lock on an open file, for a message: Linux tells, others may not."""
    info = os.fstat(handle)
    where = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    found = set[str]()
    with contextlib.suppress(OSError, IndexError, ValueError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if "->" not in words and words[1] == "FLOCK" and words[5] == where:
                found.add(_process(int(words[4])))
    return ", ".join(sorted(found)) or "another process"


def _process(pid: int) -> str:
    with contextlib.suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        command = printable(b" ".join(words).decode("utf-8", "replace").strip())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return f"process {pid} ({command}{', stopped' if state == 'T' else ''})"
    return f"process {pid}"


def _stamp(info: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does; the time of the last change is last."""
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def _is_plain(name: str, entry: os.DirEntry[str]) -> bool:
    return is_name(name) and entry.is_file(follow_symlinks=False)
