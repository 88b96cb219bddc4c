"""Locks that a forked child finds free, where a thread held them that it does not have.

IS: threading's reentrant lock, and what becomes of all of them after os.fork. IS NOT: repair of
what such a thread was changing; whoever takes the lock next does that. It exists because a child
would wait for ever for a thread that only its parent has.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

_R = TypeVar("_R")

_LOCKS: weakref.WeakSet[Any] = weakref.WeakSet()


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


def _free_others() -> None:
    """In a child: its one thread keeps what it holds."""
    for lock in _LOCKS:
        if not lock._is_owned():
            lock._at_fork_reinit()


os.register_at_fork(after_in_child=_free_others)
