"""What a request is to the scheduler, and what it is told back: the seam between serving and wire.

IS: nouns on token ids, and the errors of serving. IS NOT: text or HTTP (whoever calls `Core`), or
scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from flashrt.base.errors import FlashrtError, SessionError
from flashrt.engine.sight import Image

Reason = Literal["stop", "length", "context", "cancelled", "timeout"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of a sampled token at temperature 1, and the likeliest with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sink(Protocol):
    """Who is told. Called in the scheduler's thread: must be quick, and must not raise; one that
    raises is told nothing more, and its request ends.
    """

    def began(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Once per request, when its prompt has a lane. `cached_tokens` are not fed to the model;
        all others are.
        """
        ...

    def token(self, index: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        """The next token of a choice; False ends the choice after this token."""
        ...

    def ended(self, index: int, reason: Reason, node: str | None) -> None:
        """A choice is over, once each; `node`: its id in the tree of the request's session."""
        ...

    def failed(self, error: FlashrtError) -> None:
        """The request is over; nothing comes after it."""
        ...


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for tokens."""

    owner: str  # whose: sessions, index entries and capsules are never shared between owners
    tokens: tuple[int, ...]  # the prompt
    sink: Sink
    max_tokens: int  # 0: feed the prompt, and nothing else
    n: int = 1  # choices: with seeds seed, seed + 1, ...
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of Session.generate
    stop_tokens: frozenset[int] = frozenset()  # end generation, and are not yielded
    turn_starts: tuple[int, ...] = ()  # positions of the prompt worth a capsule, ascending
    images: tuple[Image, ...] = ()  # of the prompt: they are held in memory as long as it is
    logprobs: int | None = None  # how many of the likeliest tokens; None: no logprobs
    priority: int = 0  # higher first
    timeout_s: float | None = None  # since it was submitted
    session: str | None = None  # the session that it goes on
    tip: str | None = None  # the node that it goes on from: refused if the session has another tip
    messages: tuple[Mapping[str, Any], ...] | None = None  # kept with the session's new node
    # What a choice has said, as messages for its node: asked once it has ended, in the scheduler's
    # thread, before `ended` is told.
    replied: Callable[[int], Sequence[Mapping[str, Any]]] | None = None


class Ticket:
    """A request that was taken."""

    def __init__(self, cancel: Callable[[Ticket], None]) -> None:
        self._cancel = cancel
        self.is_cancelled = False

    def cancel(self) -> None:
        """End it at the next token, from any thread; more than once, or too late, does nothing."""
        self.is_cancelled = True
        self._cancel(self)


class QueueFull(FlashrtError):
    """Too many requests wait; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Closing(FlashrtError):
    """The server is shutting down; the request was not carried out."""


class TimedOut(FlashrtError):
    """A request waited for longer than its timeout, and was never begun."""


class NoSession(SessionError):
    """The owner has no session, or the session has no node, of this name or id."""


class SessionBusy(SessionError):
    """A turn of the session is running or waiting; nothing was changed."""


class SessionConflict(SessionError):
    """The session is not in the state that the caller expects; nothing was changed."""

    def __init__(self, message: str, etag: str) -> None:
        super().__init__(message)
        self.etag = etag  # of the state it is in


class ForeignSession(SessionError):
    """A session that a model with another tokenizer made: its tokens mean nothing here."""


class NoSlot(SessionError):
    """There is no such lane, or it holds no state of the owner's."""


class NoSlotFile(SessionError):
    """The owner has saved no slot under this name."""


class BadSlotFile(SessionError):
    """A name that cannot be one, or a saved slot that does not fit or is damaged; no lane was
    changed.
    """
