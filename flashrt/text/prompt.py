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
_Place = tuple[int, AddedToken]  # where a text spells a control token
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
        self._control = _ControlTokens(tokenizer)

    def encode(self, messages: Sequence[Message], *, is_asked: bool) -> Prompt:
        """The prompt of messages; is_asked: up to where a reply begins. Raises ChatError."""
        given = _Given(
            [readable(message, self._template.source) for message in messages],
            self._tools,
            self._options,
        )
        hidden, table = given, dict[int, str]()
        if self._control.handles & given.characters:
            table = self._control.disguise(given.characters | set(self._template.source))
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
        return Prompt(tokens, is_asked and opens_thought(text))

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
        )


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


def _common(one: str, other: str) -> str:
    """What two texts begin with alike."""
    ends = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(ends, min(len(one), len(other)))]
