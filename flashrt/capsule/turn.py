"""The turn: whoever changes an engine's books has it, one thread at a time.

IS: one lock per engine around bookkeeping, given up while a kernel runs; and the mark that the last
change did not end, after which the next one repairs the books first. IS NOT: what is repaired
(table), or a lane's state (lineage.Lane). It exists because an exception may strike at any line:
Ctrl-C, a signal handler, MemoryError.

Threads are those of an interpreter with a global lock; free-threaded Python is not supported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from flashrt.base.locks import reentrant_lock

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Turn:
    """Of one engine. `repair` makes the books right again; `created`: what the change at hand has
    made that nobody outside has yet.
    """

    def __init__(self, repair: Callable[[list[Any]], None]) -> None:
        # RLock's own verbs are those that threading.Condition goes by: a line of Python between
        # taking and noting could be where an exception strikes.
        lock = reentrant_lock()
        self.lock = lock
        self.is_mine: Callable[[], bool] = lock._is_owned  # this thread's
        self.created: list[Any] = []
        self.unfinished: list[Turn] = []  # itself, while a change is being made
        self.end: Callable[[], None] = self.unfinished.clear  # the change is over
        self._repair = repair

    def repair(self) -> None:
        """What an exception left behind is put in order."""
        self._repair(self.created)

    def go_on(self, created: list[Any]) -> None:
        """The change that gave the turn up has it back. What another thread left unfinished in the
        meantime is put in order now: the end of this change would hide it.
        """
        if self.unfinished:
            self.repair()
            self.end()
        self.created = created
        self.unfinished.append(self)

    def keep(self) -> None:
        """What was made so far has an owner: an exception does not take it back."""
        self.created = []

    def given_up(self) -> GivenUp:
        """In a `with` block others have their turn: a kernel runs, and the books are right."""
        return GivenUp(self)


class GivenUp:
    """See Turn.given_up."""

    __slots__ = ("_created", "_state", "_turn")

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._state: Any = None
        self._created: list[Any] = []

    def __enter__(self) -> None:
        turn = self._turn
        if turn.is_mine():
            self._created, turn.created = turn.created, []
            turn.end()
            self._state = turn.lock._release_save()

    def __exit__(self, *exc: object) -> None:
        turn = self._turn
        if self._state is not None:
            turn.lock._acquire_restore(self._state)
            turn.go_on(self._created)


class HasTurn(Protocol):
    """Whose methods may be `in_turn`."""

    @property
    def turn(self) -> Turn: ...


class HasLock(HasTurn, Protocol):
    """Whose methods may be `exclusive`."""

    @property
    def lock(self) -> Any:
        """An RLock of its own."""
        ...


_S = TypeVar("_S", bound=HasTurn)
_L = TypeVar("_L", bound=HasLock)


def _behind(error: RuntimeError) -> BaseException | None:
    """What fell after a kernel and before the turn was had back, if that is why the lock says that
    it is not held.
    """
    return error.__context__ if "un-acquired lock" in f"{error}" else None


def in_turn(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """A method that changes the books: one at a time, and repaired first where that is due. Within
    such a method others are part of the same change.
    """

    # Lock, change and unlock are on one line: a tracer strikes between lines, and what is left then
    # is a change that did not finish, never a lock that nobody gives back. A change begins with a
    # repair, if one is due, and with nothing made; calls of C alone, as each verb pays for them.
    @functools.wraps(method)
    def call(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        turn = self.turn
        if turn.is_mine():
            return method(self, *args, **kwargs)
        try:
            with turn.lock: return (turn.unfinished and turn.repair(), turn.created.clear(), turn.unfinished.append(turn), method(self, *args, **kwargs), turn.end())[3]  # type: ignore[func-returns-value]  # noqa: E501, E701  # fmt: skip
        except RuntimeError as error:
            if (struck := _behind(error)) is None:
                raise
            raise struck from None

    return cast(Callable[Concatenate[_S, _P], _R], call)


def exclusive(method: Callable[Concatenate[_L, _P], _R]) -> Callable[Concatenate[_L, _P], _R]:
    """The same for a method of one session or loop, which nobody else may enter meanwhile, not even
    while a kernel runs and the turn is given up.
    """

    @functools.wraps(method)
    def call(self: _L, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        turn = self.turn
        if turn.is_mine():
            return method(self, *args, **kwargs)
        try:
            with self.lock, turn.lock: return (turn.unfinished and turn.repair(), turn.created.clear(), turn.unfinished.append(turn), method(self, *args, **kwargs), turn.end())[3]  # type: ignore[func-returns-value]  # noqa: E501, E701  # fmt: skip
        except RuntimeError as error:
            if (struck := _behind(error)) is None:
                raise
            raise struck from None

    return cast(Callable[Concatenate[_L, _P], _R], call)
