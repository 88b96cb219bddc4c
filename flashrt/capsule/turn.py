"""The turn: whoever changes an engine's books has it, one thread at a time.

IS: one lock per engine around bookkeeping, given up while a kernel runs; and the mark that the last
change did not end, after which the next one repairs the books first. IS NOT: what is repaired
(table), or a lane's state (its `doubt`). It exists because an exception may strike at any line:
Ctrl-C, a signal handler, MemoryError.

Threads are those of an interpreter with a global lock; free-threaded Python is not supported.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Turn:
    """Of one engine. `repair` makes the books right again; `created`: what the change at hand has
    made that nobody outside has yet.
    """

    def __init__(self, repair: Callable[[list[Any]], None]) -> None:
        # RLock's own verbs are those that threading.Condition goes by: a line of Python between
        # taking and noting could be where an exception strikes.
        self.lock: Any = threading.RLock()
        self.created: list[Any] = []
        self._repair = repair
        self._is_over = True

    @property
    def is_mine(self) -> bool:
        """Whether this thread has the turn."""
        return bool(self.lock._is_owned())

    def begin(self) -> None:
        """A change begins; what an exception left behind is put in order first."""
        if not self._is_over:
            self._repair(self.created)
        self.created = []
        self._is_over = False

    def end(self, result: _R) -> _R:
        """The change is over. One line: an exception falls before it or after it."""
        return setattr(self, "_is_over", True) or result  # type: ignore[func-returns-value]

    def given_up(self) -> GivenUp:
        """In a `with` block others have their turn: while a kernel runs."""
        return GivenUp(self.lock)


class GivenUp:
    """See Turn.given_up."""

    __slots__ = ("_lock", "_state")

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._state: Any = None

    def __enter__(self) -> None:
        self._state = self._lock._release_save() if self._lock._is_owned() else None

    def __exit__(self, *exc: object) -> None:
        self._lock._acquire_restore(self._state) if self._state is not None else None


class HasTurn(Protocol):
    """Whose methods may be `in_turn`."""

    @property
    def turn(self) -> Turn: ...


_S = TypeVar("_S", bound=HasTurn)


def in_turn(
    method: Callable[Concatenate[_S, _P], _R],
) -> Callable[Concatenate[_S, _P], _R]:
    """A method that changes the books: one at a time, and repaired first where that is due. Within
    such a method others are part of the same change.
    """

    @functools.wraps(method)
    def call(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        turn = self.turn
        if turn.is_mine:
            return method(self, *args, **kwargs)
        with turn.lock:
            turn.begin()
            return turn.end(method(self, *args, **kwargs))

    return cast(Callable[Concatenate[_S, _P], _R], call)
