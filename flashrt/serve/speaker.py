"""The speaker: tokens of the scheduler -> text, stop strings, thoughts and tool calls.

IS: the sink of a request; per choice a decoder, stop strings and a parser; every result goes to
the request's mailbox. IS NOT: JSON of any API (wire), or what a tool call looks like in text
(text.tool_calls). It runs in the scheduler's thread, so it raises nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flashrt.base.errors import FlashrtError
from flashrt.serve.ask import Reason, TokenLogprobs
from flashrt.serve.mailbox import Mailbox
from flashrt.text.reply import CallEnded, ReplyEvent, TextDelta
from flashrt.text.stops import StopStrings
from flashrt.text.tokenizer import Tokenizer


class Parser(Protocol):
    """Splits the text of one choice into pieces: see text.reply.ReplyParser."""

    def push(self, text: str) -> Iterable[ReplyEvent]:
        """Some more text; what has become certain."""

    def flush(self) -> Iterable[ReplyEvent]:
        """What is still held, at the end."""


class Notes(Protocol):
    """Who else is told what a choice says, in the scheduler's thread."""

    def take(self, piece: ReplyEvent) -> None:
        """A piece of it."""


@dataclass(frozen=True, slots=True)
class Began:
    """The request runs; of its prompt's tokens, `cached_tokens` were not fed."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Said:
    """Pieces of a choice, and the tokens that they came of, where they were asked for."""

    index: int
    pieces: tuple[ReplyEvent, ...]
    tokens: tuple[tuple[int, TokenLogprobs], ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A choice has ended. stop_string: the one that ended it."""

    index: int
    reason: Reason
    tokens: int
    stop_string: str | None
    node: str | None


@dataclass(frozen=True, slots=True)
class Failed:
    """All ended by an error; one that is not flashrt's is a fault of the server."""

    error: Exception


_Told = tuple[int, TokenLogprobs]
Event = Began | Said | Ended | Failed


@dataclass(slots=True)
class Clock:
    """When what happened, in seconds of time.perf_counter; 0 where it has not."""

    asked: float = field(default_factory=time.perf_counter)
    began: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0  # of all choices


class Plain:
    """A parser for text that is only text."""

    def push(self, text: str) -> Iterable[ReplyEvent]:
        """All of it."""
        return (TextDelta(text),) if text else ()

    def flush(self) -> Iterable[ReplyEvent]:
        """Nothing is held."""
        return ()


class _Choice:
    """The text of one choice."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str], parser: Parser) -> None:
        self.decoder, self.stops, self.parser = tokenizer.stream(), StopStrings(stops), parser
        self.tokens = 0
        self.has_called = False  # and it may do so once
        self._decoded = 0  # characters so far
        self.rest: tuple[list[ReplyEvent], list[_Told]] | None = None  # once it has ended
        self._given = 0  # of them, those before any stop string that were handed on
        self._held: list[tuple[int, int, TokenLogprobs]] = []  # where a token's text begins, ...

    def push(
        self, token: int, logprobs: TokenLogprobs | None
    ) -> tuple[list[ReplyEvent], list[_Told]]:
        """Take a token; pieces, and tokens whose text is out."""
        self.tokens += 1
        if logprobs is not None:
            self._held.append((self._decoded, token, logprobs))
        text = self.decoder.push(token)
        self._decoded += len(text)
        given = self.stops.push(text)
        self._given += len(given)
        return list(self.parser.push(given)), self._told(is_last=False)

    @property
    def is_done(self) -> bool:
        """Whether nothing more of it counts."""
        return self.stops.is_found or self.has_called

    def up_to_a_call(self, pieces: list[ReplyEvent]) -> list[ReplyEvent]:
        """Pieces up to the end of the first whole tool call."""
        for i, piece in enumerate(pieces):
            if isinstance(piece, CallEnded) and piece.is_whole:
                self.has_called = True
                return pieces[: i + 1]
        return pieces

    def end(self) -> tuple[list[ReplyEvent], list[_Told]]:
        """The rest."""
        if self.has_called:
            return [], self._told(is_last=True)
        text = self.decoder.flush()
        self._decoded += len(text)
        given = self.stops.push(text) + self.stops.flush()
        self._given += len(given)
        pieces = [*self.parser.push(given), *self.parser.flush()]
        return pieces, self._told(is_last=True)

    def _told(self, *, is_last: bool) -> list[_Told]:
        """Tokens of a stop string are not part of the answer, so they are not told of."""
        if not self._held:
            return []
        is_all = is_last and not self.stops.is_found
        told = [(t, p) for start, t, p in self._held if is_all or start < self._given]
        self._held = [] if is_last else [h for h in self._held if h[0] >= self._given]
        return told


class Speaker:
    """A sink whose text goes to a mailbox."""

    def __init__(
        self,
        mailbox: Mailbox[Event],
        tokenizer: Tokenizer,
        n: int,
        stops: Iterable[str] = (),
        parser: Callable[[], Parser] = Plain,
        *,
        is_one_call: bool = False,
        notes: Sequence[Notes] = (),
    ) -> None:
        """`parser`: makes one for each of the `n` choices. is_one_call: a choice ends with its
        first whole tool call. `notes`: of each choice, or none at all.
        """
        self.clock = Clock()
        self._mailbox, self._is_one_call, self._notes = mailbox, is_one_call, notes
        strings = tuple(stops)
        self._choices = [_Choice(tokenizer, strings, parser()) for _ in range(n)]

    def began(self, prompt_tokens: int, cached_tokens: int) -> None:
        """See Sink."""
        self.clock.began = time.perf_counter()
        self._mailbox.put(Began(prompt_tokens, cached_tokens))

    def token(self, index: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        """See Sink."""
        clock, now = self.clock, time.perf_counter()
        clock.first, clock.last = clock.first or now, now
        clock.tokens += 1
        choice = self._choices[index]
        try:
            pieces, told = choice.push(token, logprobs)
        except Exception as error:  # a parser or a tokenizer met what it cannot take
            self._mailbox.put(Failed(error))
            return False
        pieces = self._noted(index, pieces)
        if pieces or told:
            self._mailbox.put(Said(index, tuple(pieces), tuple(told)))
        # Where a client went, the ticket is cancelled; one that does not read does not do that.
        return not (choice.is_done or self._mailbox.is_overrun)

    def ended(self, index: int, reason: Reason, node: str | None) -> None:
        """See Sink."""
        choice = self._choices[index]
        try:
            pieces, told = self._rest(index)
        except Exception as error:
            self._mailbox.put(Failed(error))
            return
        if pieces or told:
            self._mailbox.put(Said(index, tuple(pieces), tuple(told)))
        reason = "stop" if choice.is_done else reason
        self._mailbox.put(Ended(index, reason, choice.tokens, choice.stops.found, node))

    def failed(self, error: FlashrtError) -> None:
        """See Sink."""
        self._mailbox.put(Failed(error))

    def finish(self, index: int) -> None:
        """Let the notes of a choice that has ended be whole, before `ended` is told."""
        with contextlib.suppress(Exception):  # `ended` meets it again, and tells
            self._rest(index)

    def _rest(self, index: int) -> tuple[list[ReplyEvent], list[_Told]]:
        choice = self._choices[index]
        if choice.rest is None:
            pieces, told = choice.end()
            choice.rest = self._noted(index, pieces), told
        return choice.rest

    def _noted(self, index: int, pieces: list[ReplyEvent]) -> list[ReplyEvent]:
        """Those that count, which the notes have then."""
        if self._is_one_call:
            pieces = self._choices[index].up_to_a_call(pieces)
        if self._notes:
            for piece in pieces:
                self._notes[index].take(piece)
        return pieces
