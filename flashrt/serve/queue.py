"""Requests that wait: bounded, fair between owners, then by priority, then by arrival.

IS: who is next. IS NOT: lanes or time. Whoever calls it holds the scheduler's lock.

An owner whose requests have the fewest lanes is next; of equals, the one that was served longest
ago. Within an owner the highest priority is next, but every so often the oldest: none starves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

OLDEST_EVERY = 4  # of an owner's requests, one in so many is the oldest, whatever its priority

_T = TypeVar("_T")


@dataclass(slots=True)
class _Waiting(Generic[_T]):
    arrival: int
    priority: int
    item: _T


class FairQueue(Generic[_T]):
    """Items by owner."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[_Waiting[_T]]] = {}  # in order of arrival
        self._served: dict[str, int] = {}  # of owners that wait: when they were served last
        self._taken: dict[str, int] = {}  # of owners that wait: how many were
        self._arrivals = itertools.count()
        self._turns = itertools.count(1)
        self._first = itertools.count(-1, -1)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def lengths(self) -> dict[str, int]:
        """By owner, of those that wait."""
        return {owner: len(waiting) for owner, waiting in self._waiting.items()}

    def length(self, owner: str) -> int:
        """Items of an owner."""
        return len(self._waiting.get(owner, ()))

    def push(self, owner: str, priority: int, item: _T, *, is_next: bool = False) -> None:
        """Behind the others of its priority; `is_next`: before all others of the owner."""
        waiting = self._waiting.setdefault(owner, [])
        if is_next:
            waiting.insert(0, _Waiting(next(self._first), 1 << 62, item))
        else:
            waiting.append(_Waiting(next(self._arrivals), priority, item))

    def pop(self, lanes_of: Mapping[str, int]) -> _T | None:
        """The next one, given how many lanes each owner has; None when nobody waits."""
        if not self._waiting:
            return None
        owner = min(self._waiting, key=lambda o: (lanes_of.get(o, 0), self._served.get(o, 0), o))
        waiting = self._waiting[owner]
        taken = self._taken[owner] = self._taken.get(owner, 0) + 1
        self._served[owner] = next(self._turns)
        at = 0
        if taken % OLDEST_EVERY:
            at = min(range(len(waiting)), key=lambda i: (-waiting[i].priority, waiting[i].arrival))
        item = waiting.pop(at).item
        self._clear(owner)
        return item

    def remove(self, is_gone: Callable[[_T], bool]) -> list[_T]:
        """Take out all for which it is true."""
        gone: list[_T] = []
        for owner in list(self._waiting):
            waiting = self._waiting[owner]
            out = [w.item for w in waiting if is_gone(w.item)]
            if out:
                kept = [w for w in waiting if not any(w.item is item for item in out)]
                self._waiting[owner] = kept
                gone += out
            self._clear(owner)
        return gone

    def _clear(self, owner: str) -> None:
        """Nothing is kept of an owner who does not wait, but when he was served."""
        if not self._waiting[owner]:
            del self._waiting[owner]
            self._taken.pop(owner, None)
            if len(self._served) > 1024:  # owners come and go
                del self._served[min(self._served, key=lambda o: self._served[o])]
