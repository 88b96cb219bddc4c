"""Messages -> token ids, such that no content can act as a control token.

IS: the rendered template encoded as one text, except that a control token (`<|im_start|>`, `</s>`,
`<tool_call>`) that a content spells out is encoded as the characters it is. IS NOT: a rule on what
a text may say, or the template (template). Without this a user's message can open a system turn,
and a tool's result an assistant's.

How: in the contents, characters that control tokens begin with give way to noncharacters of Unicode
before the template sees them. What the rendered text then spells is the template's; after that the
characters return. If contents spell nothing, the ids are those of the whole text, to the last one.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flashrt.text.messages import content_of, with_objects
from flashrt.text.template import (
    NONCHARACTERS,
    OWN_VARIABLES,
    ChatError,
    ChatTemplate,
    Message,
)
from flashrt.text.thought import FIELD, OPEN, opens_thought, readable
from flashrt.text.tokenizer import AddedToken, Tokenizer

# Written by whoever runs the model, or by the model: tokens that are added but not special, such as
# <think> and <tool_call>, are meant there. Special ones never are.
TRUSTED_ROLES = frozenset({"system", "developer", "assistant"})
_Place = tuple[int, AddedToken]  # where a text spells a control token
_STAND_IN = {"role": "user", "content": "?"}, {"role": "user", "content": "!"}


SWITCH = "enable_thinking"  # the template option that turns thoughts on and off


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a conversation; in_thought: they end within a thought.

    turn_starts: positions at which users' messages begin, ascending; without those that no control
    token begins. tail_start: tokens [0, tail_start) stay as they are when another question follows;
    templates that drop old thoughts write what comes after them in another way then. A boundary at
    each of these positions is what makes the next turn, and the way back, cost new tokens only.
    """

    tokens: list[int]
    in_thought: bool
    turn_starts: tuple[int, ...]
    tail_start: int


class PromptEncoder:
    """A template and a tokenizer of one checkpoint, with the tools and options of a conversation.

    Raises ChatError if an option has the name of something else.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, object]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._tools = list(tools) if tools else None
        self._options = dict(options or {})
        if taken := sorted(OWN_VARIABLES & self._options.keys()):
            raise ChatError(f"template options: {', '.join(taken)} cannot be given there")
        self._control = _control_of(tokenizer)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        is_asked: bool,
        is_continued: bool = False,
        thinking: bool | None = None,
    ) -> Prompt:
        """The prompt of messages; is_asked: up to where a reply begins; is_continued: up to where
        the last message, the assistant's, ends, so that what follows goes on with it. thinking:
        whether the model is to think first; None leaves it to the template.

        Raises ChatError if the template refuses them, or cannot do that.
        """
        given = self._given(messages, is_continued, thinking)
        is_asked = is_asked and not is_continued
        hidden, table = given, dict[int, str]()
        if self._control.handles & given.characters:
            table = self._control.disguise(given.characters | set(self.template.source))
            hidden = given.changed(lambda text, trusted: self._control.hide(text, trusted, table))
        text = self._text(hidden, is_asked)
        own = self._control.spelled(text)
        whole = self._whole(given, is_asked, text.translate(_back(table)), own) if table else text
        tokens = None if whole is None else self.tokenizer.encode(whole)
        if tokens is None or not self._control.are(tokens, own):
            tokens = self._control.encode_apart(text, table)
            if not self._control.are(tokens, own):
                raise ChatError(
                    "a content would be read as control tokens, and this tokenizer cannot encode "
                    f"it as text; take out what looks like a token of {self.tokenizer.path}"
                )
        if is_continued:
            in_thought = bool(messages[-1].get(FIELD)) and not content_of(messages[-1])
        else:
            in_thought = is_asked and opens_thought(text)
        if in_thought and thinking is False and not is_continued:
            raise ChatError(
                f"this chat template has no switch {SWITCH!r} and opens a thought by itself; leave "
                "out thinking=False"
            )
        places = _Places(text, own, self._control.positions(tokens), tokens)
        turn_starts = self._turn_starts(hidden, is_asked, places)
        return Prompt(tokens, in_thought, turn_starts, self._tail_start(hidden, places, table))

    def _given(
        self, messages: Sequence[Message], is_continued: bool, thinking: bool | None
    ) -> _Given:
        source, options = self.template.source, self._options
        if thinking is not None and SWITCH in source:
            options = {**options, SWITCH: thinking}
        elif thinking and OPEN not in source:
            raise ChatError(
                "thinking=True: this chat template knows no thoughts; leave out thinking"
            )
        given = _Given([with_objects(message) for message in messages], self._tools, options)
        if is_continued:
            given = _Given(
                _marked_end(given.messages, given.mark), self._tools, options, given.mark
            )
        readables = [readable(message, source) for message in given.messages]
        return _Given(readables, self._tools, options, given.cut)

    # -- positions in a prompt ------------------------------------------------------------------

    def _turn_starts(self, hidden: _Given, is_asked: bool, places: _Places) -> tuple[int, ...]:
        """See Prompt: a mark at each user's first word shows where the template puts it."""
        mark, users = hidden.mark, [m for m in hidden.messages if m["role"] == "user"]
        if not users:
            return ()
        messages = [_marked_start(m, mark) if m["role"] == "user" else m for m in hidden.messages]
        try:
            text = self._text(hidden.with_messages(messages), is_asked)
        except ChatError:
            return ()
        parts = text.split(mark)
        if "".join(parts) != places.text or len(parts) != len(users) + 1:
            return ()
        at, found = 0, set[int]()
        for part in parts[:-1]:
            at += len(part)
            if (start := places.turn_before(at)) is not None:
                found.add(start)
        return tuple(sorted(found))

    def _tail_start(self, hidden: _Given, places: _Places, table: Mapping[int, str]) -> int:
        """See Prompt: what the messages become once another answer and question follow."""
        answer, question = ({"role": r, "content": hidden.mark} for r in ("assistant", "user"))
        is_answered = hidden.messages and hidden.messages[-1]["role"] == "assistant"
        following = [question] if is_answered else [answer, question]
        messages = list(hidden.messages)
        if hidden.cut is not None:
            messages = [
                _mapped(m, lambda t, _: t.replace(hidden.mark, "?"), True) for m in messages
            ]
        try:
            text = self._render(hidden, [*messages, *following], False)
        except ChatError:
            return len(places.tokens)
        same = len(_common(places.text, text))
        if same == len(places.text):
            return len(places.tokens)
        start, position = places.token_before(same)
        piece = self.tokenizer.encode(places.text[start:same].translate(_back(table)))
        is_there = places.tokens[position : position + len(piece)] == piece
        return position + len(piece) if is_there else position

    def _whole(self, given: _Given, is_asked: bool, shown: str, own: list[_Place]) -> str | None:
        """The text as the template makes it of the contents as they are, if just its own control
        tokens are in it.

        `shown` is what it made of contents without any. It may look into contents and make another
        text of the real ones: that one counts if no content spells a control token.
        """
        try:
            text = self._text(given, is_asked)
        except ChatError:
            return None
        found = self._control.spelled(text)
        if text == shown:
            return text if found == own else None
        is_own = [t for _, t in found] == [t for _, t in own] and not given.spells(self._control)
        return text if is_own else None

    def _text(self, given: _Given, is_asked: bool) -> str:
        if given.cut is not None:
            whole, found, _ = self._render(given, given.messages, False).rpartition(given.cut)
            if not found:
                raise ChatError("the template does not show the end of the message to continue")
            return whole
        try:
            return self._render(given, given.messages, is_asked)
        except ChatError:
            if is_asked or any(message["role"] == "user" for message in given.messages):
                raise
            text = self._before_a_question(given)
            if text is None:
                raise
            return text

    def _render(self, given: _Given, messages: Sequence[Message], is_asked: bool) -> str:
        return self.template.render(
            messages, tools=given.tools, add_generation_prompt=is_asked, **given.options
        )

    def _before_a_question(self, given: _Given) -> str | None:
        """The text of messages that a template refuses without a user's turn: with one that stands
        in, up to where it begins. None if it is not that.
        """
        one, other = _STAND_IN
        try:
            text = self._render(given, [*given.messages, one], False)
        except ChatError:
            return None
        try:
            turn = self._render(given, [*given.messages, one, one], False).removeprefix(text)
            if turn and text.endswith(turn):
                return text.removesuffix(turn)
        except ChatError:  # it wants the assistant's turn between
            pass
        try:
            return _common(text, self._render(given, [*given.messages, other], False))
        except ChatError:
            return None


class _Given:
    """All that a template is given, and the texts in it."""

    def __init__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None,
        options: Mapping[str, object],
        cut: str | None = None,
    ) -> None:
        """cut: a mark at which the rendered text ends."""
        self.messages, self.tools, self.options, self.cut = messages, tools, options, cut

    @cached_property
    def mark(self) -> str:
        """A character that occurs in no text: the one that cuts, or another. Raises ChatError."""
        free = self.cut or next((c for c in NONCHARACTERS[::-1] if c not in self.characters), None)
        if free is None:
            raise ChatError("the messages hold too many characters that Unicode keeps unused")
        return free

    def with_messages(self, messages: Sequence[Message]) -> _Given:
        """Others, all else the same."""
        return _Given(messages, self.tools, self.options, self.cut)

    @cached_property
    def characters(self) -> set[str]:
        """All that occur in texts."""
        found: set[str] = set()
        for text in _texts([self.messages, self.tools, self.options]):
            found.update(text)
        return found

    def spells(self, control: _ControlTokens) -> bool:
        """Whether a text spells a control token that its writer may not use."""
        found: list[bool] = []

        def look(text: str, is_trusted: bool) -> str:
            found.extend(t.is_special or not is_trusted for _, t in control.spelled(text))
            return text

        self.changed(look)
        return any(found)

    def changed(self, change: Callable[[str, bool], str]) -> _Given:
        """A copy with each text changed; the second argument is whether its writer is trusted."""
        return _Given(
            [_mapped(m, change, m["role"] in TRUSTED_ROLES) for m in self.messages],
            _mapped(self.tools, change, True),
            _mapped(self.options, change, True),
            self.cut,
        )


class _Places:
    """Where control tokens are, in a text and among its ids."""

    def __init__(
        self, text: str, own: Sequence[_Place], positions: Sequence[int], tokens: list[int]
    ) -> None:
        """own: of the text; positions: of the same ones among the ids."""
        self.text, self.tokens = text, tokens
        self._starts = [start for start, _ in own]
        self._ends = [start + len(token.spelling) for start, token in own]
        self._positions = positions

    def token_before(self, at: int) -> tuple[int, int]:
        """(place in the text, position among the ids) of the last control token that begins at or
        before a place; (0, 0) if none does.
        """
        i = bisect.bisect_right(self._starts, at) - 1
        return (self._starts[i], self._positions[i]) if i >= 0 else (0, 0)

    def turn_before(self, at: int) -> int | None:
        """Position of the control token that begins the turn of a user whose words begin at a
        place: the one before them, or the one before that if the role stands between the two.
        """
        i = bisect.bisect_right(self._ends, at) - 1
        if i < 0:
            return None
        role_comes_first = i and self.text[self._ends[i - 1] : self._starts[i]].strip() == "user"
        return self._positions[i - 1 if role_comes_first else i]


class _ControlTokens:
    """The added tokens of a tokenizer that control a conversation: the special ones, but not the
    one for what is unknown, and others in brackets of some kind. The rest are words and spaces.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokens = [t for t in tokenizer.added_tokens if _is_control(t, tokenizer.unknown_id)]
        self._by_spelling = {token.spelling: token for token in tokens}
        self._ids = frozenset(token.id for token in tokens)
        longest = sorted(self._by_spelling, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        self.handles = frozenset(map(_handle, self._by_spelling))

    def spelled(self, text: str) -> list[_Place]:
        """Control tokens in a text, in order."""
        found = self._pattern.finditer(text)
        return [(match.start(), self._by_spelling[match[0]]) for match in found]

    def disguise(self, characters: set[str]) -> dict[int, str]:
        """What each handle becomes: a character that occurs nowhere. Raises ChatError."""
        free = [c for c in NONCHARACTERS if c not in characters]
        if len(free) < len(self.handles):
            raise ChatError("the messages hold too many characters that Unicode keeps unused")
        return {ord(handle): c for handle, c in zip(sorted(self.handles), free, strict=False)}

    def hide(self, text: str, is_trusted: bool, table: Mapping[int, str]) -> str:
        """A content in which nothing spells a control token; where its writer is trusted, those
        that are not special stay. Plain names stay too: templates ask for roles and fields.
        """
        found = self.spelled(text)
        if not found and text.isidentifier():
            return text
        made, at = [], 0
        for start, token in found if is_trusted else ():
            if not token.is_special:
                made += [text[at:start].translate(table), token.spelling]
                at = start + len(token.spelling)
        return "".join([*made, text[at:].translate(table)])

    def encode_apart(self, hidden: str, table: Mapping[int, str]) -> list[int]:
        """Ids of a text in whose contents control tokens are hidden."""
        made, at = [], 0
        for start, token in self.spelled(hidden):
            made += [hidden[at:start], self._respelled.secret[token.spelling]]
            at = start + len(token.spelling)
        text = "".join([*made, hidden[at:]]).translate(_back(table))
        tokens = self._respelled.tokenizer.encode(text)
        return [self._respelled.ids.get(token, token) for token in tokens]

    def positions(self, tokens: Sequence[int]) -> list[int]:
        """Of the control tokens among ids."""
        return [i for i, token in enumerate(tokens) if token in self._ids]

    def are(self, tokens: Sequence[int], own: Sequence[_Place]) -> bool:
        """Whether the control tokens among ids are these."""
        return [t for t in tokens if t in self._ids] == [token.id for _, token in own]

    @cached_property
    def _respelled(self) -> _Respelled:
        return _Respelled(self._tokenizer, tuple(self._by_spelling.values()))


class _Respelled:
    """A tokenizer whose control tokens are spelled in a way that no content can know.

    Its rules for everything else are those of the first, also for what stands beside one. Made when
    a content spells one for the first time: loading takes seconds for large vocabularies.
    """

    def __init__(self, tokenizer: Tokenizer, control: Sequence[AddedToken]) -> None:
        key = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(8))
        self.secret = {t.spelling: f"{key}{chr(0xF0000 + i)}" for i, t in enumerate(control)}
        file = json.loads(tokenizer.to_json())
        file["post_processor"] = None
        for token in file["added_tokens"]:
            if token["content"] in self.secret:
                token |= {"content": self.secret[token["content"]], "normalized": False}
        model = file["model"]
        if model["type"] != "BPE":  # whose pieces come of merges; the others look whole words up
            model["vocab"] = self._renamed(model["vocab"])
        self.tokenizer = Tokenizer(tokenizer.path, json.dumps(file))
        ids = {self.tokenizer.token_id(self.secret[t.spelling]): t.id for t in control}
        self.ids = {made: own for made, own in ids.items() if made is not None}

    def _renamed(self, vocab: object) -> object:
        if isinstance(vocab, dict):
            return {self.secret.get(piece, piece): token for piece, token in vocab.items()}
        if isinstance(vocab, list):  # of pairs: piece and score
            return [[self.secret.get(piece, piece), score] for piece, score in vocab]
        return vocab


@functools.lru_cache(maxsize=4)
def _control_of(tokenizer: Tokenizer) -> _ControlTokens:
    """One for all encoders of a tokenizer: what a content that spells control tokens needs takes
    seconds to make for a large vocabulary.
    """
    return _ControlTokens(tokenizer)


def _back(table: Mapping[int, str]) -> dict[int, str]:
    """From what handles became to the handles."""
    return {ord(disguise): chr(handle) for handle, disguise in table.items()}


def _is_control(token: AddedToken, unknown_id: int | None) -> bool:
    first, last = token.spelling[:1], token.spelling.rstrip()[-1:]
    has_brackets = not (first.isalnum() or last.isalnum() or first in " \t\r\n▁")
    return token.id != unknown_id and bool(last) and (token.is_special or has_brackets)


def _handle(spelling: str) -> str:
    """What hides a control token: its first character that is no letter, digit or space."""
    return next((c for c in spelling if not c.isalnum() and not c.isspace()), spelling[0])


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(name)
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)


def _mapped(value: Any, change: Callable[[str, bool], str], is_trusted: bool) -> Any:
    """A copy of a JSON-like value with each text changed, names too."""
    if isinstance(value, str):
        return change(value, is_trusted)
    if isinstance(value, Mapping):
        return {
            _mapped(name, change, is_trusted): _mapped(inner, change, is_trusted)
            for name, inner in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_mapped(inner, change, is_trusted) for inner in value]
    return value


def _marked_start(message: Message, mark: str) -> Message:
    """With a mark before its first word."""

    def marked(text: str) -> str:
        words = text.lstrip()
        return f"{text[: len(text) - len(words)]}{mark}{words}"

    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": marked(content)}
    if not isinstance(content, Sequence):
        return message
    parts, is_done = list[object](), False
    for part in content:
        if not is_done and isinstance(part, Mapping) and isinstance(part.get("text"), str):
            parts.append({**part, "text": marked(part["text"])})
            is_done = True
        else:
            parts.append(part)
    return {**message, "content": parts}


def _marked_end(messages: Sequence[Message], mark: str) -> list[Message]:
    """With a mark where the last message, the assistant's, goes on. Raises ChatError."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        raise ChatError("only a message of the assistant can be continued; the last one is not")
    if last.get("tool_calls"):
        raise ChatError("a message that calls tools cannot be continued; add what they returned")
    content, thought = content_of(last), last.get(FIELD)
    if thought and not content:
        return [*messages[:-1], {**last, FIELD: f"{thought}{mark}"}]
    return [*messages[:-1], {**last, "content": f"{content}{mark}"}]


def _common(one: str, other: str) -> str:
    """What two texts begin with alike."""
    most = range(1, min(len(one), len(other)) + 1)
    return one[: bisect.bisect_left(most, True, key=lambda n: one[:n] != other[:n])]
