"""What POSIX systems have and native Windows has not, in one place.

IS: the same few questions and calls on both: flags of open, reads and writes at an offset, users,
modes, forks. Where Windows lacks a thing, what stands here in its place is said beside it.
IS NOT: locks (locks) or files (files).
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable

NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)  # Windows: links need a privilege to be made
NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)  # Windows has no pipes among its files
BINARY: int = getattr(os, "O_BINARY", 0)  # elsewhere files are bytes anyway
HAS_POSITIONS = hasattr(os, "preadv") and hasattr(os, "pwrite")
# Windows: no folder can be opened to be synced, and no open file renamed over, and who may write a
# file is a list that modes do not show.
IS_POSIX = hasattr(os, "geteuid")

_SEEKING = threading.Lock()  # where a handle has one position, and no call that leaves it alone


def read_at(handle: int, out: memoryview, offset: int) -> int:
    """Fill `out` from `offset` on as far as one call does; how many bytes. Raises OSError."""
    if HAS_POSITIONS:
        return os.preadv(handle, [out], offset)
    with _SEEKING:
        os.lseek(handle, offset, os.SEEK_SET)
        data = os.read(handle, len(out))
    out[: len(data)] = data
    return len(data)


def write_at(handle: int, data: memoryview, offset: int) -> int:
    """Write as far as one call does; how many bytes. Raises OSError."""
    if HAS_POSITIONS:
        return os.pwrite(handle, data, offset)
    with _SEEKING:
        os.lseek(handle, offset, os.SEEK_SET)
        return os.write(handle, data)


def owns(status: os.stat_result) -> bool:
    """Whether a file is this user's; Windows: a cache folder lies in the user's own profile."""
    return not IS_POSIX or status.st_uid == os.geteuid()


def others_write(status: os.stat_result) -> bool:
    """Whether users but its owner may write a file, as far as modes show it."""
    return IS_POSIX and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def set_mode(handle: int, mode: int) -> None:
    """The mode of an open file; Windows: it is as its folder says. Raises OSError."""
    if IS_POSIX:
        os.fchmod(handle, mode)


def at_fork(
    child: Callable[[], object],
    *,
    before: Callable[[], object] | None = None,
    parent: Callable[[], object] | None = None,
) -> None:
    """What a fork does in the child, and around it; Windows has none."""
    if not hasattr(os, "register_at_fork"):
        return
    os.register_at_fork(after_in_child=child)
    if before is not None:
        os.register_at_fork(before=before)
    if parent is not None:
        os.register_at_fork(after_in_parent=parent)
