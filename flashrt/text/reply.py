"""A model's reply, while it comes: thought, text, and calls of tools, apart.

IS: pieces of text in, events out, and the message that they make. IS NOT: the syntax of a call
(tool_calls), or where a reply ends (stops). Joined, the events of any cut of a reply are the same,
and they are what its message holds.

What is no call after all, and one that the reply's end cut off, comes out as the text that it was:
no text is lost. If it had begun by then, its `CallEnded` says that it is not whole.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashrt.text import tool_calls
from flashrt.text.stops import StopStrings
from flashrt.text.template import Message
from flashrt.text.thought import CLOSE, FIELD, OPEN
from flashrt.text.tool_calls import READERS, CallReader, Tools, ToolSyntax


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """More of the thought before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool begins, the `index`-th of the reply."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call is over. One that is not whole is no call: its text follows as text."""

    index: int
    is_whole: bool


ReplyEvent = TextDelta | ThoughtDelta | CallBegun | ArgumentsDelta | CallEnded


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: str = ""


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class ReplyParser:
    """Of one reply. `thought`, `content` and `calls` are what has come so far."""

    def __init__(
        self,
        *,
        in_thought: bool = False,
        is_continued: bool = False,
        syntax: ToolSyntax | None = None,
        tools: Tools | None = None,
        new_id: Callable[[], str] = _new_id,
    ) -> None:
        """in_thought: the prompt ends within a thought; one that does not close is a thought to its
        end. is_continued: something was said before, so a space at the beginning counts. syntax:
        of calls; with None they stay text. new_id: of calls.
        """
        self.thought = self.content = ""
        self._calls: list[_Call] = []
        self._syntax, self._tools, self._new_id = syntax, tools or Tools(()), new_id
        self._in_thought, self._is_first = in_thought, not is_continued
        self._n_begun = 0
        self._gap = ""  # spaces that count only if more follows
        self._held = ""
        self._end: StopStrings | None = None  # of the thought, or of the text before a call
        self._reader: CallReader | None = None
        self._read: Callable[[list[ReplyEvent]], bool] = self._read_beginning
        if is_continued:
            self._begin(in_thought)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Whole calls: {"id", "type", "function": {"name", "arguments": JSON text}}."""
        return [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self._calls
        ]

    def push(self, piece: str) -> list[ReplyEvent]:
        """Take a piece; what has become certain."""
        self._held += piece
        events: list[ReplyEvent] = []
        while self._held and self._read(events):
            pass
        return joined(events)

    def flush(self) -> list[ReplyEvent]:
        """The reply has ended; what was still held."""
        events: list[ReplyEvent] = []
        if self._read == self._read_beginning:
            self._begin(self._in_thought)
            while self._held and self._read(events):
                pass
        if self._reader is not None:
            self._reader.flush()
            self._end_call(events)
        elif self._end is not None:
            self._say(self._end.flush(), events)
        return joined(events)

    def message(self) -> dict[str, Any] | None:
        """The assistant's message so far; None if it says nothing."""
        if not (self.thought or self.content or self._calls):
            return None
        made: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thought:
            made[FIELD] = self.thought
        if self._calls:
            made["tool_calls"] = self.calls
        return made

    # -- inside: each reads one part of what is held, and says whether to go on -------------------

    def _read_beginning(self, events: list[ReplyEvent]) -> bool:
        begins = self._held.lstrip()
        if OPEN.startswith(begins):
            if begins != OPEN:
                return False
            self._in_thought = True
        elif begins.startswith(OPEN):
            self._in_thought = True
        if begins.startswith(OPEN):
            self._held = begins.removeprefix(OPEN)
        self._begin(self._in_thought)
        return True

    def _begin(self, in_thought: bool) -> None:
        """The thought, or the text."""
        self._in_thought = in_thought
        calls = () if self._syntax is None else (tool_calls.OPEN,)
        self._end = StopStrings((CLOSE,) if in_thought else calls)
        self._read = self._read_words

    def _read_words(self, events: list[ReplyEvent]) -> bool:
        assert self._end is not None, "made where the part began"
        self._say(self._end.push(self._held), events)
        self._held = self._end.rest
        if not self._end.is_found:
            return False
        if self._in_thought:
            self._gap, self._is_first = "", True
            self._begin(False)
        else:
            assert self._syntax is not None, "else nothing ends a text"
            self._reader, self._end = READERS[self._syntax](self._tools), None
            self._read = self._read_call
        return True

    def _read_call(self, events: list[ReplyEvent]) -> bool:
        reader = self._reader
        assert reader is not None, "made where the call began"
        had_begun = reader.name is not None
        arguments, self._held = reader.push(self._held), ""
        if reader.name is not None and not had_begun:
            self._calls.append(_Call(self._new_id(), reader.name))
            events.append(CallBegun(self._n_begun, self._calls[-1].id, reader.name))
        if arguments:
            self._calls[-1].arguments += arguments
            events.append(ArgumentsDelta(self._n_begun, arguments))
        if not reader.is_over:
            return False
        self._held = reader.rest
        self._end_call(events)
        return True

    def _end_call(self, events: list[ReplyEvent]) -> None:
        reader = self._reader
        assert reader is not None, "it is the one that ends"
        if reader.name is not None:
            events.append(CallEnded(self._n_begun, reader.is_whole))
            self._n_begun += 1
            if not reader.is_whole:
                self._calls.pop()
        self._reader = None
        self._begin(False)
        if not reader.is_whole:
            self._say(tool_calls.OPEN + reader.taken, events)

    def _say(self, text: str, events: list[ReplyEvent]) -> None:
        """Words, without spaces around them all."""
        text = self._gap + text
        if self._is_first:
            text = text.lstrip()
        words = text.rstrip()
        self._gap = text[len(words) :]
        if not words:
            return
        self._is_first = False
        if self._in_thought:
            self.thought += words
            events.append(ThoughtDelta(words))
        else:
            self.content += words
            events.append(TextDelta(words))


def reply_message(text: str, *, in_thought: bool) -> Message | None:
    """The assistant's message that a reply is, calls left as text; None if it says nothing."""
    parser = ReplyParser(in_thought=in_thought)
    parser.push(text)
    parser.flush()
    return parser.message()


def joined(events: list[ReplyEvent]) -> list[ReplyEvent]:
    """The same events, deltas that follow each other made one."""
    made: list[ReplyEvent] = []
    for event in events:
        last = made[-1] if made else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            made[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ThoughtDelta) and isinstance(last, ThoughtDelta):
            made[-1] = ThoughtDelta(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta):
            made[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            made.append(event)
    return made
