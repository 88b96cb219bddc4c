"""The kernel cache: compiled kernels on disk, run only where nobody else can have written them.

IS: the one place that reads and writes such files. An entry is its content and a seal, the SHA-256
of its name and content. A file that belongs to another user, that others may write, or whose seal
does not fit, is not there: it is compiled again. What is made here is private to the user.
IS NOT: a compiler, or a key: callers name an entry by all that decides its bits. It exists because
what lies in a folder is executed: a planted library would run as this user, a damaged one would
compute something else under the same name.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashrt.base.errors import CacheWarning, CompileError
from flashrt.base.files import (
    PRIVATE,
    PRIVATE_FOLDER,
    lock_file,
    make_folders,
    opened,
    read_exactly,
    replacing,
)
from flashrt.base.locks import hold
from flashrt.base.system import others_write, owns
from flashrt.base.tracing import PLAN, trace

_SEAL = b"\nflashrt-sha256 "  # before 64 hex digits and a newline: a log with one is still text
_SEAL_NBYTES = len(_SEAL) + 64 + 1
_MOST_BYTES = 1 << 30  # more is no kernel; without a limit a file made of holes fills the memory
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_BUILDER = re.compile(r"(build-|new-|tmp)[a-z0-9_]{8}")  # a folder that one builds in
_LOCK = "lock"  # a file in it, held while the builder lives
_STALE_S = 3600.0  # one without a lock is a builder's first instant, or left by an earlier version


@dataclass(frozen=True, slots=True)
class Binary:
    """Compiled kernels: the bytes to load, and the file that holds them for the next time."""

    path: Path
    content: bytes
    log: str
    was_cached: bool


class KernelCache:
    """The entries of one folder."""

    def __init__(self, folder: Path) -> None:
        self._asked_for = folder
        self._is_swept = False

    @property
    def folder(self) -> Path:
        """Where entries are: the folder asked for, or a private one if others may write to that.

        Warns (CacheWarning) in the second case.
        """
        why = problem(self._asked_for)
        if not why:
            return self._asked_for
        warnings.warn(
            f"the kernel cache {self._asked_for} is not used: it {why}, and what lies there would "
            "be run; kernels are compiled anew by each process. Make it your own (chown, "
            "chmod go-w), or set FLASHRT_CACHE_DIR to a folder that is",
            CacheWarning,
            stacklevel=2,
        )
        return _folder_of_this_process()

    def path(self, name: str) -> Path:
        """Where an entry is, or would be."""
        return self.folder / name

    def names(self, pattern: str) -> list[str]:
        """Names of files that match, the newest first; some may not be fit to be read."""
        found = []
        for path in self.folder.glob(pattern):
            with contextlib.suppress(OSError):  # gone meanwhile
                found.append((path.stat().st_mtime_ns, path.name))
        return [name for _, name in sorted(found, reverse=True)]

    def read(self, name: str) -> bytes | None:
        """The content of an entry; None where there is none that can be trusted.

        Warns (CacheWarning) of a file that somebody else could have written.
        """
        path = self.path(name)
        try:
            with opened(path) as (handle, nbytes):
                why = _why_not_ours(os.fstat(handle))
                is_read = not why and nbytes <= _MOST_BYTES
                data = read_exactly(handle, nbytes).tobytes() if is_read else b""
        except FileNotFoundError:
            return None
        except OSError as error:  # a pipe, or a sector that cannot be read
            trace(PLAN, f"{path}: {error}; it is replaced")
            return None
        if why:
            warnings.warn(
                f"{path} is not run: it {why}; make it your own (chown, chmod go-w) or delete it",
                CacheWarning,
                stacklevel=2,
            )
            return None
        content = data[:-_SEAL_NBYTES]
        if data[-_SEAL_NBYTES:] == _seal(name, content):
            return content
        trace(PLAN, f"{path} is cut, changed or of an earlier version; it is replaced")
        return None

    def write(self, name: str, content: bytes) -> None:
        """Publish an entry: whole or not at all, and on disk when this returns.

        Raises CompileError where the folder cannot be written.
        """
        folder = self.folder
        with _told_as_compile_error(folder):
            _make_private(folder)
            with replacing(folder / name, is_durable=True, mode=PRIVATE) as temporary:
                temporary.write_bytes(content + _seal(name, content))

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """A folder to build in, gone afterwards; first, what killed builders left is removed.

        Raises CompileError where it cannot be made.
        """
        folder = self.folder
        with _told_as_compile_error(folder):
            _make_private(folder)
            if not self._is_swept:
                _sweep(folder)
                self._is_swept = True
            fresh = Path(tempfile.mkdtemp(prefix="new-", dir=folder))
            lock = lock_file(fresh / _LOCK, os.O_CREAT)
        work = fresh
        try:
            with _told_as_compile_error(folder):
                with contextlib.suppress(OSError):  # without locks nothing of this is ever swept
                    hold(lock)
                # Under this name others may sweep it, and find the lock held.
                work = fresh.rename(folder / fresh.name.replace("new-", "build-", 1))
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            lock.close()


def problem(folder: Path) -> str:
    """Why kernels in a folder may be somebody else's; empty where they may not, and where there is
    no such folder. A folder of our own that others may write to is closed to them.
    """
    try:
        status = folder.stat()
        is_shared = status.st_mode & stat.S_ISVTX  # as /tmp is
        if others_write(status) and owns(status) and not is_shared:
            folder.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
            status = folder.stat()
    except OSError:  # not there, or not to be entered: then nothing is read from it either
        return ""
    return _why_not_ours(status)


def _why_not_ours(status: os.stat_result) -> str:
    """Root could do to us whatever it likes; nobody else may have written what we run."""
    if status.st_uid != 0 and not owns(status):
        return f"belongs to another user ({status.st_uid})"
    if others_write(status):
        return f"may be written by others (mode {stat.S_IMODE(status.st_mode):03o})"
    return ""


def _seal(name: str, content: bytes) -> bytes:
    """Of the name too: an entry that was renamed is not another entry."""
    digest = hashlib.sha256(name.encode() + b"\0" + content)
    return _SEAL + digest.hexdigest().encode() + b"\n"


@contextlib.contextmanager
def _told_as_compile_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CompileError(
            f"cannot write the kernel cache {folder}: {error}; set FLASHRT_CACHE_DIR to a "
            "folder that you can write"
        ) from error


def _make_private(folder: Path) -> None:
    """The folder and those above it that are missing, for this user alone."""
    make_folders(folder, Path(folder.anchor), is_durable=True, mode=PRIVATE_FOLDER)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")


def _sweep(folder: Path) -> None:
    """Remove what builders left that were killed: their locks are free."""
    for path in folder.iterdir():
        if _BUILDER.fullmatch(path.name):
            with contextlib.suppress(OSError):  # a builder that ends, or another sweep
                status = path.lstat()
                if stat.S_ISDIR(status.st_mode) and owns(status):
                    _sweep_one(path, time.time() - status.st_mtime)


def _sweep_one(path: Path, age_s: float) -> None:
    if path.name.startswith("build-") and (path / _LOCK).exists():
        with lock_file(path / _LOCK) as lock:
            hold(lock, may_wait=False)
            shutil.rmtree(path, ignore_errors=True)
    elif age_s > _STALE_S and (path.name.startswith(("build-", "new-")) or _is_of_simt(path)):
        shutil.rmtree(path, ignore_errors=True)


def _is_of_simt(path: Path) -> bool:
    """Whether an earlier version built a simt kernel here; any program may name a folder so."""
    return (path / "stub.cpp").exists()


@functools.cache
def _folder_of_this_process() -> Path:
    """Made once, gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="flashrt-kernels-"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not at the end of a forked child
        shutil.rmtree(folder, ignore_errors=True)
