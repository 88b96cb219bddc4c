"""Conversations: a session that is told messages and replies in text.

IS: messages -> tokens by the checkpoint's chat template, fed from where they differ from what the
session holds; replies as text, as events, and as messages; capsules together with the messages that
led to them. IS NOT: the syntax of tool calls (text.tool_calls), or a server.

A waypoint is kept where each question begins, and where a reply will be written in another way once
it is old: the next turn, or going back, feeds new tokens only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError, SessionError
from flashrt.base.messages import shown
from flashrt.capsule.capsule import Capsule
from flashrt.engine.sight import Image
from flashrt.session.engine import SessionEngine
from flashrt.session.pictures import with_words, without_pictures
from flashrt.session.session import EndReason, Session
from flashrt.session.waypoints import MOST_KEPT
from flashrt.text import tool_calls
from flashrt.text.grammar import Grammar
from flashrt.text.messages import Pair, checked_message, checked_messages, content_of
from flashrt.text.prompt import Prompt, PromptEncoder
from flashrt.text.reply import ReplyEvent, ReplyParser
from flashrt.text.stops import StopStrings
from flashrt.text.template import ChatError, Message
from flashrt.text.thought import FIELD
from flashrt.text.tool_calls import Tools, ToolSyntax, tool_syntax
from flashrt.text.tool_grammar import NONE, ToolChoice, chosen_tools, tool_call_grammar
from flashrt.weights.checkpoint import GENERATION_FILE, Checkpoint

Messages = tuple[Message, ...]  # oldest first
Said = tuple[Pair, ...]  # (role, content) of each message

_NEVER = -1e6  # a bias with which no token is sampled
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ChatPoint:
    """A point of a conversation: its capsule, and the messages before it."""

    capsule: Capsule
    messages: Messages

    @property
    def said(self) -> Said:
        """Role and content of each message."""
        return _said(self.messages)


@dataclass(frozen=True, slots=True)
class _Habits:
    """What all replies of a conversation have in common."""

    prompts: PromptEncoder
    sampling: Mapping[str, Any]
    tools: Tools
    syntax: ToolSyntax | None
    thinking: bool | None


@dataclass(frozen=True, slots=True)
class _Wish:
    """What was asked of one reply."""

    max_tokens: int
    stop: Iterable[str]
    thinking: bool | None
    tool_choice: ToolChoice | None
    is_continued: bool
    sampling: Mapping[str, Any]


@dataclass(slots=True)
class _Progress:
    """Of a reply, while it comes."""

    token_count: int = 0
    reason: EndReason | None = None
    message: Message | None = None
    parts: weakref.ref[Any] | None = None  # a generator

    @property
    def is_coming(self) -> bool:
        """Whether it has begun and not ended, however it ended: nobody has to say so."""
        parts = self.parts() if self.parts is not None else None
        return parts is not None and parts.gi_frame is not None


_Parts = Generator[tuple[str, list[ReplyEvent]], None, None]  # pieces, and what they made certain


class Reply(Iterator[str]):
    """A reply in pieces of whole characters, or as events. Made by `Chat.stream`; nothing runs
    before the first.

    Its message joins the conversation when it has ended, or was closed. If it fails, none does.
    """

    def __init__(self, begin: Callable[[_Progress], _Parts]) -> None:
        self._progress = _Progress()
        self._parts = begin(self._progress)
        self._progress.parts = weakref.ref(self._parts)

    @property
    def token_count(self) -> int:
        """Tokens that were sampled so far, except one that ended it."""
        return self._progress.token_count

    @property
    def reason(self) -> EndReason | None:
        """Why it ended: "stop" (the model ended its turn, or a stop string came), "length"
        (max_tokens) or "context" (the session is full). None while it runs, and when it was closed.
        """
        return self._progress.reason

    @property
    def message(self) -> Message | None:
        """The message that joined: "role", "content", perhaps "reasoning_content" and "tool_calls".
        None while it runs, and if nothing was said.
        """
        return self._progress.message

    def __next__(self) -> str:
        while True:
            piece, _ = next(self._parts)
            if piece:
                return piece

    def events(self) -> Iterator[ReplyEvent]:
        """The same as thought, text and calls of tools, apart, in place of pieces. Left early, the
        reply is closed.
        """
        try:
            for _, events in self._parts:
                yield from events
        finally:
            self.close()

    def close(self) -> None:
        """End it here; what was yielded was said."""
        self._parts.close()


class Chat:
    """A conversation on a session of its own. Made by `open_chat`.

    `messages` may be replaced at any time; what differs is fed again. `fed_tokens` counts the
    tokens that went through the model as prompt since it was made.
    """

    def __init__(
        self,
        engine: SessionEngine,
        session: Session,
        habits: _Habits,
    ) -> None:
        """An empty conversation."""
        self.session = session
        self.fed_tokens = 0
        self._engine, self._habits, self._prompts = engine, habits, habits.prompts
        self._messages: Messages = ()
        self._reply: _Progress | None = None  # the one that is coming
        self._images: list[Image] = []  # of the prompt at hand: held until they are fed
        self._reason: EndReason | None = None

    # -- what was said --------------------------------------------------------------------------

    @property
    def messages(self) -> Messages:
        """All messages: mappings with "role" and "content", perhaps "reasoning_content" (what the
        model thought before it answered), "tool_calls" and what else a template reads.
        """
        return self._messages

    @messages.setter
    def messages(self, messages: Iterable[Message | Pair]) -> None:
        self._check_idle("messages cannot change")
        self._messages = checked_messages(messages)

    @property
    def said(self) -> Said:
        """Role and content of each message. Replaced by pairs, messages that agree are kept."""
        return _said(self._messages)

    @said.setter
    def said(self, said: Iterable[Pair]) -> None:
        pairs, now = tuple(said), self.said
        same = next((i for i, (a, b) in enumerate(zip(pairs, now, strict=False)) if a != b), None)
        kept = min(len(pairs), len(now)) if same is None else same
        self.messages = (*self._messages[:kept], *pairs[kept:])

    @property
    def reason(self) -> EndReason | None:
        """Why the last reply ended; None before the first, and if it failed or was closed."""
        return self._reason

    def add(
        self, role: str, content: str | Sequence[Mapping[str, object]] | None, **more: object
    ) -> None:
        """Append a message; it is prefilled when something needs the state after it.

        more: `tool_calls` (arguments as objects or JSON text), `reasoning_content`, `name` and what
        else the template reads. Parts of a content may be images, where the model was loaded with
        them: {"type": "image", "image": path, bytes or array}, see `pictures`. Raises ChatError for
        what is no message, SessionError while a reply is coming.
        """
        self._check_idle("nothing can be added")
        message = checked_message({"role": role, "content": content, **more})
        self._messages = (*self._messages, message)

    # -- replies --------------------------------------------------------------------------------

    def reply(
        self,
        max_tokens: int = 256,
        *,
        stop: Iterable[str] = (),
        thinking: bool | None = None,
        tool_choice: ToolChoice | None = None,
        continue_final: bool = False,
        **sampling: Any,
    ) -> str:
        """The assistant's next message, which joins the conversation: its content, without what the
        model thought before and the tools it calls (`messages[-1]` has them). Empty, and no
        message, if the model said nothing. See `stream`.
        """
        coming = self.stream(
            max_tokens,
            stop=stop,
            thinking=thinking,
            tool_choice=tool_choice,
            continue_final=continue_final,
            **sampling,
        )
        for _ in coming:
            pass
        return "" if coming.message is None else content_of(coming.message)

    def stream(
        self,
        max_tokens: int = 256,
        *,
        stop: Iterable[str] = (),
        thinking: bool | None = None,
        tool_choice: ToolChoice | None = None,
        continue_final: bool = False,
        **sampling: Any,
    ) -> Reply:
        """The same in pieces, thought and calls included; `Reply.events` tells them apart. Closed
        early, what was yielded was said.

        stop: texts that end the reply; they are neither yielded nor part of it. thinking: whether
        the model thinks first, by the template's switch; None is as `open_chat` was told.
        tool_choice: "auto" (the default), "none", which keeps the tools in the prompt, "required",
        or a function as {"type": "function", "function": {"name": ...}}; a call is forced by a
        grammar (extra `grammar`). continue_final: go on with
        the last message, the assistant's, in place of a new one. sampling: see Session.generate.
        Raises, at the first piece, ChatError for messages that the template refuses and for what it
        cannot do, SessionError for a conversation that does not fit, for bad parameters and while
        another reply is coming; the conversation is as before then.
        """
        wish = _Wish(max_tokens, stop, thinking, tool_choice, continue_final, sampling)
        return Reply(lambda progress: self._speak(progress, wish))

    def tokens(
        self, messages: Iterable[Message | Pair] | None = None, *, is_asked: bool = False
    ) -> list[int]:
        """Token ids of the messages, or of others; `is_asked`: up to where a reply begins.

        Raises ChatError if the template refuses them.
        """
        told = self._messages if messages is None else checked_messages(messages)
        return self._encode(told, is_asked=is_asked).tokens

    # -- capsules -------------------------------------------------------------------------------

    def snapshot(self, name: str | None = None) -> ChatPoint:
        """Freeze the conversation, all messages prefilled. Raises PoolFull."""
        self._check_idle("no snapshot can be taken")
        self._feed(self._encode(self._messages, is_asked=False))
        return ChatPoint(self.session.snapshot(name), self._messages)

    def restore(self, point: ChatPoint) -> None:
        """Continue from a point. Raises CapsuleError."""
        self._check_idle("nothing can be restored")
        messages = checked_messages(point.messages)
        self.session.restore(point.capsule)
        self._messages = messages

    def fork(self, point: ChatPoint | None = None) -> Chat:
        """Another conversation on a free lane: this one, or a point's. Raises LaneBusy."""
        if point is None:
            self._check_idle("it cannot be forked")
        messages = self._messages if point is None else checked_messages(point.messages)
        other = self.session.fork(None if point is None else point.capsule)
        made = Chat(self._engine, other, self._habits)
        made._messages = messages
        return made

    def close(self) -> None:
        """Give the session's lane back."""
        self.session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------

    def _speak(self, progress: _Progress, wish: _Wish) -> _Parts:
        self._check_idle("there cannot be two")
        self._reason = None
        stops, habits = StopStrings(wish.stop), self._habits
        chosen = chosen_tools(habits.tools, wish.tool_choice)
        options = {**habits.sampling, "stop": self._engine.checkpoint.stop_tokens, **wish.sampling}
        syntax = habits.syntax
        if wish.tool_choice == NONE and syntax is not None:
            options, syntax = self._without_calls(options), None
        if self.session.position:  # bad parameters raise here, before anything moves
            self.session.generate(min(wish.max_tokens, 0), **options)
        prompt = self._encode(
            self._messages,
            is_asked=True,
            is_continued=wish.is_continued,
            thinking=wish.thinking,
        )
        if chosen is not None:
            assert wish.tool_choice is not None
            if options.get("grammar") is not None:
                raise ChatError("tool_choice: a reply cannot follow a grammar and call a tool")
            options["grammar"] = self._forced(wish.tool_choice, prompt)
        self._feed(prompt, room=1)
        generation = self.session.generate(wish.max_tokens, **options)
        decoder = self._prompts.tokenizer.stream()
        base = self._messages[-1] if wish.is_continued else None
        parser = ReplyParser(
            in_thought=prompt.in_thought,
            is_continued=base is not None and _says_anything(base),
            syntax=syntax,
            tools=habits.tools,
        )
        self._reply = progress
        try:
            for token in generation:
                progress.token_count += 1
                if piece := stops.push(decoder.push(token)):
                    yield piece, parser.push(piece)
                if stops.is_found:
                    break
            piece = stops.push(decoder.flush()) + stops.flush()
            events = [*parser.push(piece), *parser.flush()]
            if piece or events:
                yield piece, events
        except GeneratorExit:
            parser.flush()
            self._join(progress, parser, base)
            raise
        finally:
            generation.close()
        progress.reason = self._reason = "stop" if stops.is_found else generation.reason
        self._join(progress, parser, base)

    def _join(self, progress: _Progress, parser: ReplyParser, base: Message | None) -> None:
        """The reply becomes a message, or more of the message that it goes on with."""
        said = parser.message()
        if said is None:
            return
        message = said if base is None else _continued(base, parser)
        before = self._messages if base is None else self._messages[:-1]
        self._messages = (*before, message)
        progress.message = message

    def _without_calls(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options with which the token that begins a call is never sampled, if there is one."""
        token = self._prompts.tokenizer.token_id(tool_calls.OPEN)
        if token is None:
            return dict(options)
        return {**options, "logit_bias": {**(options.get("logit_bias") or {}), token: _NEVER}}

    def _forced(self, choice: ToolChoice, prompt: Prompt) -> Grammar:
        """What a reply in which the choice holds may say. Raises ChatError, GrammarError."""
        habits = self._habits
        if habits.syntax is None:
            raise ChatError(
                "tool_choice: the chat template shows no syntax of calls that is known, so none "
                "can be forced; say which with open_chat(syntax=...)"
            )
        text = tool_call_grammar(
            habits.tools.given, choice, habits.syntax, in_thought=prompt.in_thought,
            tokens={token.spelling for token in habits.prompts.tokenizer.added_tokens},
        )  # fmt: skip
        grammar = Grammar.lark(text)
        self._engine.grammars.compile(grammar)
        return grammar

    def _encode(
        self,
        messages: Messages,
        *,
        is_asked: bool,
        is_continued: bool = False,
        thinking: bool | None = None,
    ) -> Prompt:
        told, pictures = without_pictures(messages)
        self._images = images = [self._engine.glance(picture) for picture in pictures]
        prompt = self._prompts.encode(
            told,
            is_asked=is_asked,
            is_continued=is_continued,
            thinking=self._habits.thinking if thinking is None else thinking,
        )
        if not images:
            return prompt
        assert self._engine.sight is not None
        return with_words(prompt, self._engine.sight.image_token, [i.tokens for i in images])

    def _feed(self, prompt: Prompt, room: int = 0) -> None:
        """Bring the session to the tokens of a prompt: roll back what differs, feed the rest.

        Templates may drop or reword old turns, and sampled text may be tokenized in another way.
        room: positions that must be left. Raises SessionError, nothing moved, if it does not fit.
        """
        wanted, limit = prompt.tokens, self._engine.max_positions
        if len(wanted) + room > limit:
            raise SessionError(
                f"chat: the conversation has {len(wanted):,} tokens, of {limit:,} that a session "
                "holds; load with a larger max_positions, or go back to an earlier point"
            )
        same = shared(self.session.tokens, wanted)
        if same < self.session.position:
            self.session.rollback(same)
        at = same
        for boundary in _boundaries(prompt, same):
            self.session.prefill(wanted[at:boundary])
            self.session.keep_waypoint()
            at = boundary
        self.session.prefill(wanted[at:])
        self._images = []
        self.fed_tokens += len(wanted) - same

    def _check_idle(self, what: str) -> None:
        if self._reply is not None and self._reply.is_coming:
            raise SessionError(f"chat: a reply is coming, so {what}; let it end, or close it first")


def shared(one: Sequence[int] | NDArray[np.int32], other: Sequence[int]) -> int:
    """How many tokens two runs have in common from the start on."""
    n = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:n]) != np.asarray(other[:n]))
    return int(differing[0]) if len(differing) else n


def _boundaries(prompt: Prompt, fed: int) -> list[int]:
    """Where waypoints belong among the tokens that are still to be fed."""
    found = {p for p in (*prompt.turn_starts, prompt.tail_start) if fed <= p <= len(prompt.tokens)}
    return sorted(found - {0})[-MOST_KEPT:]


def _says_anything(message: Message) -> bool:
    return bool(content_of(message) or message.get(FIELD))


def _continued(base: Message, parser: ReplyParser) -> Message:
    """A message, and what was said on top of it."""
    content, thought = content_of(base), str(base.get(FIELD) or "")
    if thought and not content:
        thought += parser.thought
        content = parser.content
    else:
        content += parser.content
    made = {**base, "content": content}
    if thought:
        made[FIELD] = thought
    return {**made, "tool_calls": parser.calls} if parser.calls else made


def open_chat(
    engine: SessionEngine,
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    template_options: Mapping[str, object] | None = None,
    sampling: Mapping[str, Any] | None = None,
    thinking: bool | None = None,
    syntax: ToolSyntax | None = None,
) -> Chat:
    """An empty conversation on a free lane.

    tools: JSON schemas of functions, for the template; calls of them are read from replies, in the
    syntax that the template shows, or in `syntax`; one that is not known leaves them in the text.
    template_options: what the template takes besides, e.g. {"preserve_thinking": True}. thinking:
    whether the model thinks before it answers; None leaves it to the template. sampling: arguments
    of Session.generate for all replies; `recommended_sampling` gives the checkpoint's own. Raises
    LaneBusy, ChatError, or CheckpointError where the checkpoint has no tokenizer or no chat
    template.
    """
    text = engine.text
    if text.tokenizer is None or text.template is None:
        raise CheckpointError(
            f"{engine.checkpoint.path}: a conversation needs a tokenizer and a chat template; "
            "without them, feed token ids to engine.session()"
        )
    prompts = PromptEncoder(text.template, text.tokenizer, tools, template_options)
    found = (syntax or tool_syntax(text.template.source)) if tools else None
    habits = _Habits(prompts, dict(sampling or {}), Tools(tools or ()), found, thinking)
    return Chat(engine, engine.session(), habits)


def recommended_sampling(checkpoint: Checkpoint) -> dict[str, float]:
    """What generation_config.json says about sampling, as arguments of Session.generate: greedy
    unless `do_sample` is true. Raises CheckpointError for a value that is no number.
    """
    found, path = checkpoint.generation, checkpoint.path / GENERATION_FILE
    if not found.get("do_sample"):
        return {"temperature": 0.0}
    given: dict[str, float] = {"temperature": 1.0}
    for name in _SAMPLING:
        value = found.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: {name} is {shown(value)}; a number is expected")
        given[name] = value
    return given


def _said(messages: Messages) -> Said:
    return tuple((str(message["role"]), content_of(message)) for message in messages)
