"""An answer while it comes: the events of a request, and what was heard so far.

IS: the reader of a mailbox; per choice its text, thought, tool calls and logprobs; counts and
times. IS NOT: JSON of any API (wire). A client that went away is told of by `cancel`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from flashrt.serve.ask import Ticket, TokenLogprobs
from flashrt.serve.mailbox import Mailbox
from flashrt.serve.refusal import Refusal
from flashrt.serve.speaker import Began, Clock, Ended, Event, Failed, Said
from flashrt.text.reply import ArgumentsDelta, CallBegun, CallEnded, ReplyEvent, TextDelta

QUIET_S = 10.0  # of silence, before a client is told that all is well


def new_id(prefix: str) -> str:
    """A name that was never used."""
    return f"{prefix}{uuid.uuid4().hex}"


@dataclass(slots=True)
class ToolCall:
    """A tool call: `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""

    def as_openai(self) -> dict[str, Any]:
        """As OpenAI's chat API has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Heard:
    """What one choice has said so far. reason: None while it speaks."""

    text: str = ""
    thought: str = ""
    begun: dict[int, ToolCall] = field(default_factory=dict)
    tokens: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    reason: str | None = None
    stop_string: str | None = None
    token_count: int = 0
    node: str | None = None

    def take(self, piece: ReplyEvent) -> None:
        """Join a piece to it."""
        if isinstance(piece, TextDelta):
            self.text += piece.text
        elif isinstance(piece, CallBegun):
            self.begun[piece.index] = ToolCall(piece.id, piece.name)
        elif isinstance(piece, ArgumentsDelta):
            self.begun[piece.index].arguments += piece.text
        elif isinstance(piece, CallEnded):
            if not piece.is_whole:  # it comes as text
                del self.begun[piece.index]
        else:
            self.thought += piece.text

    @property
    def calls(self) -> list[ToolCall]:
        """Its tool calls, in order."""
        return list(self.begun.values())

    def message(self) -> dict[str, Any]:
        """The assistant's message that it is."""
        made: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thought:
            made["reasoning_content"] = self.thought
        if self.begun:
            made["tool_calls"] = [call.as_openai() for call in self.calls]
        return made


class Answer:
    """Of one request. `prompt_tokens` and `cached_tokens` are known once it has begun."""

    def __init__(
        self,
        mailbox: Mailbox[Event],
        ticket: Ticket,
        clock: Clock,
        n: int,
        session: str | None = None,
        etag_of: Callable[[str], Coroutine[Any, Any, str | None]] | None = None,
    ) -> None:
        """session: which it belongs to; etag_of: the etag of a node of it."""
        self.prompt_tokens = self.cached_tokens = 0
        self.heard = [Heard() for _ in range(n)]
        self._mailbox, self._ticket, self._clock = mailbox, ticket, clock
        self._session, self._etag_of = session, etag_of
        self._etag: str | None = None
        self._taken: list[Event] = []
        self._is_over = False

    @property
    def token_count(self) -> int:
        """Tokens of all choices."""
        return sum(choice.token_count for choice in self.heard)

    @property
    def is_over(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.reason is not None for choice in self.heard)

    @property
    def place(self) -> dict[str, Any]:
        """Its place in the session that it belongs to: a field of the answer, or none."""
        if self._session is None or self.heard[0].node is None:
            return {}
        place: dict[str, Any] = {
            "id": self._session,
            "node": self.heard[0].node,
            "etag": self._etag,
        }
        if len(self.heard) > 1:
            place["nodes"] = [choice.node for choice in self.heard]
        return {"session": place}

    async def events(self) -> AsyncIterator[Event | None]:
        """Events in order until every choice has ended; None after some silence.

        Raises Refusal if it is cancelled by the server, or takes too long; else what it failed by.
        """
        while True:
            for event in self._taken:
                self._note(event)
                # The scheduler answers once it is done with the turn: then the next one may come.
                if self._session and self._etag_of and self.is_over and self.heard[0].node:
                    self._etag = await self._etag_of(self.heard[0].node)
                yield event
                if self.is_over:
                    self._is_over = True
                    return
            self._taken = []
            try:
                self._taken = await asyncio.wait_for(self._mailbox.take(), QUIET_S)
            except TimeoutError:
                yield None
                continue
            if not self._taken:
                self.cancel()
                raise Refusal(503, "the answer was not read for too long, and was given up")

    async def begin(self, patience_s: float = 5.0) -> None:
        """Wait for the first words, but not for ever. Raises what it failed by before them: so that
        can still have a status of its own.
        """
        try:
            async with asyncio.timeout(patience_s):
                while all(isinstance(event, Began) for event in self._taken):
                    taken = await self._mailbox.take()
                    if not taken:  # overrun; `events` says so
                        return
                    self._taken += taken
        except TimeoutError:
            return
        for event in self._taken:
            if isinstance(event, Failed):
                self._note(event)
            if isinstance(event, Ended) and event.tokens == 0:
                _check_reason(event.reason)

    async def whole(self) -> list[Heard]:
        """All choices, when they have ended. Raises Refusal."""
        async for _ in self.events():
            pass
        return self.heard

    def cancel(self) -> None:
        """Nobody wants it any more. Harmless once it is over."""
        if not self._is_over:
            self._is_over = True
            self._mailbox.close()
            self._ticket.cancel()

    def timings(self) -> dict[str, Any]:
        """As llama.cpp's server reports them."""
        clock, fed = self._clock, self.prompt_tokens - self.cached_tokens
        now = time.perf_counter()
        begun = clock.began or now
        first = clock.first or clock.last or now
        prompt_ms = max(0.0, first - begun) * 1e3
        predicted_ms = max(0.0, (clock.last or first) - first) * 1e3
        count = clock.tokens
        return {
            "cache_n": self.cached_tokens,
            "prompt_n": fed,
            "prompt_ms": round(prompt_ms, 3),
            "prompt_per_token_ms": round(prompt_ms / fed, 3) if fed else 0.0,
            "prompt_per_second": round(fed / prompt_ms * 1e3, 3) if prompt_ms else 0.0,
            "predicted_n": count,
            "predicted_ms": round(predicted_ms, 3),
            "predicted_per_token_ms": round(predicted_ms / count, 3) if count else 0.0,
            "predicted_per_second": round(count / predicted_ms * 1e3, 3) if predicted_ms else 0.0,
            "queue_ms": round(max(0.0, begun - clock.asked) * 1e3, 3),
        }

    def _note(self, event: Event) -> None:
        if isinstance(event, Began):
            self.prompt_tokens, self.cached_tokens = event.prompt_tokens, event.cached_tokens
        elif isinstance(event, Failed):
            self._is_over = True
            raise event.error
        elif isinstance(event, Said):
            choice = self.heard[event.index]
            for piece in event.pieces:
                choice.take(piece)
            choice.tokens.extend(event.tokens)
        else:
            _check_reason(event.reason)
            choice = self.heard[event.index]
            choice.reason, choice.stop_string = event.reason, event.stop_string
            choice.token_count, choice.node = event.tokens, event.node


def _check_reason(reason: str) -> None:
    if reason == "timeout":
        raise Refusal(504, "the request took longer than the server allows (--timeout)")
    if reason == "cancelled":
        raise Refusal(503, "the request was cancelled: the server is shutting down")
