"""Messages -> token ids, such that no content can act as the conversation's own marks.

IS: the rendered template encoded as one text, except that an added token (`<|im_start|>`, `</s>`,
`<tool_call>`) that a content spells out is encoded as the characters it is. IS NOT: a rule on what
a text may say, or the template (template). Without this a user's message can open a system turn,
and a tool's result an assistant's.

How: in the contents, characters that added tokens begin with give way to noncharacters of Unicode
before the template sees them. What the rendered text then spells is the template's; after that the
characters return. If contents spell nothing, the ids are those of the whole text, to the last one.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flashrt.text.template import (
    NONCHARACTERS,
    OWN_VARIABLES,
    ChatError,
    ChatTemplate,
    Message,
)
from flashrt.text.thought import opens_thought, readable
from flashrt.text.tokenizer import AddedToken, Tokenizer

# Written by whoever runs the model, or by the model: tokens that are added but not special, such as
# <think> and <tool_call>, are meant there. Special ones never are.
TRUSTED_ROLES = frozenset({"system", "developer", "assistant"})
_Place = tuple[int, AddedToken]  # where a text spells a mark
_STAND_IN = {"role": "user", "content": "?"}, {"role": "user", "content": "!"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a conversation; in_thought: they end where a thought has begun."""

    tokens: list[int]
    in_thought: bool


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
        self.tokenizer = tokenizer
        self._template = template
        self._tools = list(tools) if tools else None
        self._options = dict(options or {})
        if taken := sorted(OWN_VARIABLES & self._options.keys()):
            raise ChatError(f"template options: {', '.join(taken)} cannot be given there")
        self._marks = _Marks(tokenizer)

    def encode(self, messages: Sequence[Message], *, is_asked: bool) -> Prompt:
        """The prompt of messages; is_asked: up to where a reply begins. Raises ChatError."""
        given = _Given(
            [readable(message, self._template.source) for message in messages],
            self._tools,
            self._options,
        )
        hidden, table = given, dict[int, str]()
        if self._marks.handles & given.characters:
            table = self._marks.disguise(given.characters | set(self._template.source))
            hidden = given.changed(lambda text, trusted: self._marks.hide(text, trusted, table))
        text = self._text(hidden, is_asked)
        own = self._marks.spelled(text)
        tokens = self._whole(given, is_asked, text.translate(_back(table)), own)
        if tokens is None:
            tokens = self._marks.encode_apart(text, table)
            if not self._marks.are(tokens, own):
                raise ChatError(
                    "a content would be read as marks of the conversation, and this tokenizer "
                    "cannot encode it as text; take out what looks like a token of "
                    f"{self.tokenizer.path}"
                )
        return Prompt(tokens, is_asked and opens_thought(text))

    def _whole(
        self, given: _Given, is_asked: bool, shown: str, own: list[_Place]
    ) -> list[int] | None:
        """Ids of the text as the template makes it, if just the template's own marks are in it.

        `shown` is what it makes of contents without marks. It may look into contents and make
        another text of the real ones: that one counts if no content spells a mark.
        """
        try:
            text = self._text(given, is_asked)
        except ChatError:
            return None
        found = self._marks.spelled(text)
        if text == shown:
            is_own = found == own
        else:
            is_own = [m for _, m in found] == [m for _, m in own] and not given.spells(self._marks)
        tokens = self.tokenizer.encode(text) if is_own else []
        return tokens if is_own and self._marks.are(tokens, own) else None

    def _text(self, given: _Given, is_asked: bool) -> str:
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
        return self._template.render(
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
    ) -> None:
        self.messages, self.tools, self.options = messages, tools, options

    @cached_property
    def characters(self) -> set[str]:
        """All that occur in texts."""
        found: set[str] = set()
        for text in _texts([self.messages, self.tools, self.options]):
            found.update(text)
        return found

    def spells(self, marks: _Marks) -> bool:
        """Whether a text spells a mark that its writer may not."""
        found: list[bool] = []

        def look(text: str, is_trusted: bool) -> str:
            found.extend(not (is_trusted and not m.is_special) for _, m in marks.spelled(text))
            return text

        self.changed(look)
        return any(found)

    def changed(self, change: Callable[[str, bool], str]) -> _Given:
        """A copy with each text changed; the second argument is whether its writer is trusted."""
        return _Given(
            [_mapped(m, change, m["role"] in TRUSTED_ROLES) for m in self.messages],
            _mapped(self.tools, change, True),
            _mapped(self.options, change, True),
        )


class _Marks:
    """The added tokens of a tokenizer that are marks of a conversation: the special ones, but not
    the one for what is unknown, and others that look like one. The rest are words and white space.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        marks = [t for t in tokenizer.added_tokens if _is_mark(t, tokenizer.unknown_id)]
        self._by_spelling = {mark.spelling: mark for mark in marks}
        self._ids = frozenset(mark.id for mark in marks)
        longest = sorted(self._by_spelling, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        self.handles = frozenset(map(_handle, self._by_spelling))

    def spelled(self, text: str) -> list[_Place]:
        """Marks in a text, in order."""
        found = self._pattern.finditer(text)
        return [(match.start(), self._by_spelling[match[0]]) for match in found]

    def disguise(self, characters: set[str]) -> dict[int, str]:
        """What each handle becomes: a character that occurs nowhere. Raises ChatError."""
        free = [c for c in NONCHARACTERS if c not in characters]
        if len(free) < len(self.handles):
            raise ChatError("the messages hold too many characters that Unicode keeps unused")
        return {ord(handle): c for handle, c in zip(sorted(self.handles), free, strict=False)}

    def hide(self, text: str, is_trusted: bool, table: Mapping[int, str]) -> str:
        """A content in which nothing spells a mark; where its writer is trusted, marks that are not
        special stay.
        """
        made, at = [], 0
        for start, mark in self.spelled(text) if is_trusted else ():
            if not mark.is_special:
                made += [text[at:start].translate(table), mark.spelling]
                at = start + len(mark.spelling)
        return "".join([*made, text[at:].translate(table)])

    def encode_apart(self, hidden: str, table: Mapping[int, str]) -> list[int]:
        """Ids of a text in whose contents marks are hidden."""
        made, at = [], 0
        for start, mark in self.spelled(hidden):
            made += [hidden[at:start], self._respelled.secret[mark.spelling]]
            at = start + len(mark.spelling)
        text = "".join([*made, hidden[at:]]).translate(_back(table))
        tokens = self._respelled.tokenizer.encode(text)
        return [self._respelled.ids.get(token, token) for token in tokens]

    def are(self, tokens: Sequence[int], own: Sequence[_Place]) -> bool:
        """Whether the marks among ids are these."""
        return [t for t in tokens if t in self._ids] == [mark.id for _, mark in own]

    @cached_property
    def _respelled(self) -> _Respelled:
        return _Respelled(self._tokenizer, tuple(self._by_spelling.values()))


class _Respelled:
    """A tokenizer whose marks are spelled in a way that no content can know.

    Its rules for everything else are those of the first, also for what stands beside a mark. Made
    when a content spells a mark for the first time: loading takes seconds for large vocabularies.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Sequence[AddedToken]) -> None:
        key = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(8))
        self.secret = {m.spelling: f"{key}{chr(0xF0000 + i)}" for i, m in enumerate(marks)}
        file = json.loads(tokenizer.to_json())
        file["post_processor"] = None
        for token in file["added_tokens"]:
            if token["content"] in self.secret:
                token |= {"content": self.secret[token["content"]], "normalized": False}
        model = file["model"]
        if model["type"] != "BPE":  # whose pieces come of merges; the others look whole words up
            model["vocab"] = self._renamed(model["vocab"])
        self.tokenizer = Tokenizer(tokenizer.path, json.dumps(file))
        ids = {self.tokenizer.token_id(self.secret[m.spelling]): m.id for m in marks}
        self.ids = {made: own for made, own in ids.items() if made is not None}

    def _renamed(self, vocab: object) -> object:
        if isinstance(vocab, dict):
            return {self.secret.get(piece, piece): token for piece, token in vocab.items()}
        if isinstance(vocab, list):  # of pairs: piece and score
            return [[self.secret.get(piece, piece), score] for piece, score in vocab]
        return vocab


def _back(table: Mapping[int, str]) -> dict[int, str]:
    """From what handles became to the handles."""
    return {ord(disguise): chr(handle) for handle, disguise in table.items()}


def _is_mark(token: AddedToken, unknown_id: int | None) -> bool:
    first, last = token.spelling[:1], token.spelling.rstrip()[-1:]
    has_brackets = not (first.isalnum() or last.isalnum() or first in " \t\r\n▁")
    return token.id != unknown_id and bool(last) and (token.is_special or has_brackets)


def _handle(spelling: str) -> str:
    """The character by which a mark is hidden: the first that is no letter, digit or space."""
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


def _common(one: str, other: str) -> str:
    """What two texts begin with alike."""
    ends = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(ends, min(len(one), len(other)))]
