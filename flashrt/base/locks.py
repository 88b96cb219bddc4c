"""Locks: of threads, which a forked child finds free, and of files, between processes.

IS: threading's reentrant lock, and what becomes of all of them after os.fork; the lock of an open
file, which the system takes back from a process that died: flock or, on native Windows, a byte
locked by msvcrt. IS NOT: repair of what a lost thread was changing; whoever takes the lock next
does that. Thread locks are here because a child would wait for ever for a thread that only its
parent has.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flashrt.base.system import at_fork

try:
    import fcntl
except ImportError:  # native Windows
    _WINDOWS: Any = importlib.import_module("msvcrt")
else:
    _WINDOWS = None

_LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()
_LOCKED_BYTE = 0x7FFFFFFE  # beyond what is read and written: Windows keeps others from that byte
_RETRY_S = 0.01
_R = TypeVar("_R")


def reentrant_lock() -> Any:
    """An RLock, with the verbs that threading.Condition goes by."""
    lock: Any = threading.RLock()
    _LOCKS.add(lock)
    return lock


def while_holding(locks: Sequence[Any], work: Callable[[], _R]) -> _R:
    """`work()` while all locks are held, taken in this order. Lock and unlock are on one line: an
    exception falls before it or after it, see capsule/turn.
    """
    if not locks:
        return work()
    with locks[0]: return while_holding(locks[1:], work)  # noqa: E701  # fmt: skip


def hold(file: io.FileIO | int, *, is_shared: bool = False, may_wait: bool = True) -> None:
    """Take the lock of an open file; it is free when the file is closed.

    Many may hold it shared, or one alone; Windows has the second kind only. Raises BlockingIOError
    where another has it and `may_wait` is false, OSError where the filesystem has no locks.
    """
    handle = file if isinstance(file, int) else file.fileno()
    if _WINDOWS is None:
        kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        fcntl.flock(handle, kind if may_wait else kind | fcntl.LOCK_NB)
        return
    while True:
        try:
            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            try:
                _WINDOWS.locking(handle, _WINDOWS.LK_NBLCK, 1)
            finally:
                os.lseek(handle, 0, os.SEEK_SET)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK):
                raise
            if not may_wait:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock") from error
        time.sleep(_RETRY_S)


def _free_others() -> None:
    """In a child: its one thread keeps what it holds."""
    for lock in _LOCKS:
        if not lock._is_owned():
            lock._at_fork_reinit()


at_fork(_free_others)
