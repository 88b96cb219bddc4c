"""Files: read whole, or replaced whole or not at all. The one place that opens them by name.

IS: reads of plain files into memory of our own; a replacement that is written beside the old file,
synced, renamed. IS NOT: formats, folders published whole, logs, or errors: OSError goes to the
caller, who knows what the file was for.

Reading. Nothing is mapped: a bad sector, or a file cut meanwhile, raises; a mapping would kill the
process. A pipe, a device or a folder is refused before it is opened.
Replacing. Whoever opens the name sees the old content or the new, also when the writer is killed;
with `is_durable` also after a loss of power. A killed writer's temporary file goes with the next.
Locks (see locks). The system takes one from a process that died, `lock_file` from a call that was
struck.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashrt.base.locks import hold
from flashrt.base.system import (
    BINARY,
    IS_POSIX,
    NO_FOLLOW,
    NO_WAIT,
    at_fork,
    owns,
    read_at,
    set_mode,
)

PRIVATE = 0o600  # for what holds prompts and states: capsules, objects, recordings
PRIVATE_FOLDER = 0o700
_CHUNK_NBYTES = 1 << 20  # looked at while a processor's cache still has it
_PAGE_NBYTES = 4096
_LONGEST_SUFFIX = 16  # a longer one is no suffix that a writer goes by
_TEMPORARY = re.compile(r"\.flashrt-\d+-[0-9a-f]{16}(\.[^.]{0,15})?")
_swept: set[str] = set()  # folders that this process has looked through for what dead writers left
at_fork(_swept.clear)


class UnsyncedError(OSError):
    """A file has its name and its new content, but the disk did not confirm the name."""


def outcome(error: OSError) -> str:
    """What there is after `replacing` raised; for the end of a message."""
    if isinstance(error, UnsyncedError):
        return "the new file is there, but a loss of power may take it back"
    return "nothing half-written was left, and what was there before is untouched"


# -- reading --------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], *, follow_links: bool = True) -> Iterator[tuple[int, int]]:
    """A descriptor to read a plain file by, and its size. Raises OSError for anything else."""
    flags = 0 if follow_links else NO_FOLLOW
    # Before it is opened: to open a device can make it act. Not by way of a Path: this is half of
    # what it takes to read one of a store's 60,000 names.
    _need_plain(os.stat(path, follow_symlinks=follow_links).st_mode, path)  # noqa: PTH116
    handle = os.open(path, os.O_RDONLY | NO_WAIT | BINARY | flags)
    try:
        info = os.fstat(handle)
        _need_plain(info.st_mode, path)
        yield handle, info.st_size
    finally:
        os.close(handle)


def read_file(
    path: str | os.PathLike[str], most_nbytes: int, *, follow_links: bool = True
) -> bytes:
    """All bytes of a plain file. Raises OSError; for more than `most_nbytes` before it reads."""
    with opened(path, follow_links=follow_links) as (handle, nbytes):
        if nbytes > most_nbytes:
            text = f"{nbytes:,} bytes where at most {most_nbytes:,} are expected"
            raise OSError(errno.EFBIG, text, str(path))
        raw = os.read(handle, nbytes)  # from its start: it was opened just now
        return raw if len(raw) == nbytes else read_exactly(handle, nbytes).tobytes()


def read_exactly(
    handle: int, nbytes: int, offset: int = 0, seen: Callable[[memoryview], object] | None = None
) -> NDArray[np.uint8]:
    """Bytes [offset, offset + nbytes), in new memory; `seen` is given each part as it comes.

    Raises OSError when the file ends before that.
    """
    room = np.empty(nbytes + _PAGE_NBYTES, np.uint8)
    first = -room.ctypes.data % _PAGE_NBYTES  # some processors' block copies are slow elsewhere
    data = room[first : first + nbytes]
    for part, at in _parts(data.data):
        read_into(handle, part, offset + at)
        if seen is not None:
            seen(part)
    return data


def read_through(handle: int, nbytes: int, seen: Callable[[memoryview], object]) -> None:
    """`seen` is given the first `nbytes` in parts; none is kept. Raises OSError."""
    room = np.empty(min(nbytes, _CHUNK_NBYTES), np.uint8).data
    for at in range(0, nbytes, _CHUNK_NBYTES):
        part = room[: min(_CHUNK_NBYTES, nbytes - at)]
        read_into(handle, part, at)
        seen(part)


def read_into(handle: int, out: memoryview, offset: int) -> None:
    """Fill `out` with the bytes from `offset` on. Raises OSError when the file ends before that."""
    done = 0
    while done < len(out):
        count = read_at(handle, out[done:], offset + done)
        if not count:
            text = f"it ends at byte {offset + done:,}, inside what is to be read"
            raise OSError(errno.ENODATA, text)
        done += count


def _parts(whole: memoryview) -> Iterator[tuple[memoryview, int]]:
    for at in range(0, len(whole), _CHUNK_NBYTES):
        yield whole[at : at + _CHUNK_NBYTES], at


def _need_plain(mode: int, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe",
            stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
        }  # fmt: skip
        kind = kinds.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a plain file", os.fspath(path))


# -- replacing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(
    path: Path, *, is_durable: bool, mode: int | None = None, temporary_in: Path | None = None
) -> Iterator[Path]:
    """Gives a fresh path with the same suffix; what is written there gets the name `path`.

    mode: the new file's, exactly (default: that of any new file, by the umask). A link is replaced,
    not followed; a device or a pipe is refused. `temporary_in`: a folder of the same filesystem for
    the temporary file (default: the folder of `path`, under a hidden name). Raises OSError.
    """
    if temporary_in is None and _is_stream(path):
        raise OSError(errno.EINVAL, "not a file, so it cannot be replaced", str(path))
    folder = path.parent if temporary_in is None else temporary_in
    if (known := str(folder.absolute())) not in _swept:
        _swept.add(known)
        sweep_dead(folder)
    suffix = path.suffix if len(path.suffix) <= _LONGEST_SUFFIX else ""
    temporary, lock = _temporary(folder, suffix, mode)
    try:
        mode = stat.S_IMODE(os.fstat(lock.fileno()).st_mode) if mode is None else mode
        yield temporary
        temporary.chmod(mode)  # some writers make a file of their own
        if is_durable:
            _sync(temporary, os.O_RDWR)
        if not IS_POSIX:
            lock.close()  # Windows renames no open file
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        lock.close()
    if is_durable:
        try:
            sync_folder(path.parent)
        except OSError as error:
            raise UnsyncedError(error.errno, error.strerror, str(path.parent)) from error


def replace_file(
    path: Path, data: bytes | memoryview | str, *, is_durable: bool, mode: int | None = None
) -> None:
    """A file of these bytes, or of this text as UTF-8; see `replacing`. Raises OSError.

    What cannot be replaced, such as /dev/stdout, is written to.
    """
    raw = data.encode() if isinstance(data, str) else data
    if _is_stream(path):
        path.write_bytes(raw)
        return
    with replacing(path, is_durable=is_durable, mode=mode) as temporary:
        temporary.write_bytes(raw)


def sweep_dead(folder: Path) -> int:
    """Remove what writers who were killed left in a folder; how many files. Others' files, and
    those of writers who live, stay: a writer holds a lock on its own, and the lock dies with it.
    """
    swept = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                swept += _removed_if_abandoned(folder / entry.name)
    return swept


def make_folders(folder: Path, root: Path, *, is_durable: bool, mode: int | None = None) -> None:
    """The folder, and each one above it that is missing; names of new ones below `root`, and of
    `root` itself, outlive a loss of power. mode: as in `replacing`. Raises OSError.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for fresh in reversed(missing):
        is_inside = fresh == root or root in fresh.parents
        with contextlib.suppress(FileExistsError):  # made by another process just now
            fresh.mkdir(0o777 if mode is None or not is_inside else mode)
            if mode is not None and is_inside:
                fresh.chmod(mode | stat.S_IMODE(fresh.stat().st_mode) & stat.S_ISGID)
        if is_durable:
            sync_folder(fresh.parent)


def sync_folder(folder: Path) -> None:
    """Names that were made or replaced in a folder outlive a loss of power. Raises OSError."""
    if IS_POSIX:  # else there is no way to ask for it
        _sync(folder, os.O_RDONLY)


# -- locks ----------------------------------------------------------------------------------------


def lock_file(path: Path, flags: int = 0, mode: int = PRIVATE) -> io.FileIO:
    """A file to hold a lock by (locks.hold); `flags`: further ones of os.open. Raises OSError.

    An object and no descriptor: where an exception strikes before it is closed, it closes itself,
    and its lock goes with it. Else the process would hold the lock for as long as it lives, against
    itself too.
    """
    return io.FileIO(
        path, "r+", opener=lambda name, usual: os.open(name, usual | BINARY | flags, mode)
    )


def _temporary(folder: Path, suffix: str, mode: int | None) -> tuple[Path, io.FileIO]:
    """A new file, held by its lock: whoever finds the file unlocked may take it for a dead
    writer's. Where a filesystem has no locks, nothing is ever swept.
    """
    while True:
        path = folder / f".flashrt-{os.getpid()}-{secrets.token_hex(8)}{suffix}"
        flags = os.O_CREAT | os.O_EXCL | NO_FOLLOW
        file = lock_file(path, flags, 0o666 if mode is None else mode)
        try:
            with contextlib.suppress(OSError):
                hold(file, may_wait=False)
            if mode is not None:
                set_mode(file.fileno(), mode)
            if os.fstat(file.fileno()).st_nlink:  # else a sweeper came between the two lines
                return path, file
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            file.close()
            raise
        file.close()


def _removed_if_abandoned(path: Path) -> bool:
    """Removes a file of ours that no writer holds the lock of; removed while we hold it."""
    with contextlib.suppress(OSError), lock_file(path, NO_FOLLOW | NO_WAIT) as file:
        hold(file, may_wait=False)
        if owns(os.fstat(file.fileno())):
            if not IS_POSIX:
                file.close()  # Windows removes no open file
            path.unlink()
            return True
    return False


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_stream(path: Path) -> bool:
    """Whether the name stands for something that is neither a file nor a folder, or for what this
    process has open, as /dev/stdout does even where a shell sends that to a file.
    """
    try:
        if path.is_symlink() and path.readlink().parts[:2] == ("/", "proc"):
            return True
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
