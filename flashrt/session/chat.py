"""Conversations: a session that is told messages and replies in text.

IS: messages -> tokens by the checkpoint's chat template, fed from where they differ from what the
session holds; capsules together with the messages that led to them. IS NOT: the syntax of tool
calls in replies (text is handed on as it is), or a server.
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
from flashrt.session.engine import SessionEngine
from flashrt.session.session import EndReason, Session
from flashrt.text.messages import Pair, checked_message, checked_messages, content_of
from flashrt.text.prompt import Prompt, PromptEncoder
from flashrt.text.reply import reply_message
from flashrt.text.stops import StopStrings
from flashrt.text.template import Message
from flashrt.weights.checkpoint import GENERATION_FILE, Checkpoint

Messages = tuple[Message, ...]  # oldest first
Said = tuple[Pair, ...]  # (role, content) of each message

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


@dataclass(slots=True)
class _Progress:
    """Of a reply, while it comes."""

    token_count: int = 0
    reason: EndReason | None = None
    pieces: weakref.ref[Any] | None = None  # a generator

    @property
    def is_coming(self) -> bool:
        """Whether it has begun and not ended, however it ended: nobody has to say so."""
        pieces = self.pieces() if self.pieces is not None else None
        return pieces is not None and pieces.gi_frame is not None


class Reply(Iterator[str]):
    """A reply in pieces of whole characters. Made by `Chat.stream`; nothing runs before the first.

    Its message joins the conversation when it has ended, or was closed. If it fails, none does.
    """

    def __init__(self, begin: Callable[[_Progress], Generator[str, None, None]]) -> None:
        self._progress = _Progress()
        self._pieces = begin(self._progress)
        self._progress.pieces = weakref.ref(self._pieces)

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

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End it here; what was yielded was said."""
        self._pieces.close()


class Chat:
    """A conversation on a session of its own. Made by `open_chat`.

    `messages` may be replaced at any time; what differs is fed again. `fed_tokens` counts the
    tokens that went through the model as prompt since it was made.
    """

    def __init__(
        self,
        engine: SessionEngine,
        session: Session,
        prompts: PromptEncoder,
        sampling: Mapping[str, Any],
    ) -> None:
        """An empty conversation; `sampling`: for replies that say nothing else."""
        self.session = session
        self.fed_tokens = 0
        self._engine, self._prompts, self._sampling = engine, prompts, dict(sampling)
        self._messages: Messages = ()
        self._reply: _Progress | None = None  # the one that is coming
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
        else the template reads. Raises ChatError for what is no message, SessionError while a reply
        is coming.
        """
        self._check_idle("nothing can be added")
        message = checked_message({"role": role, "content": content, **more})
        self._messages = (*self._messages, message)

    # -- replies --------------------------------------------------------------------------------

    def reply(self, max_tokens: int = 256, *, stop: Iterable[str] = (), **sampling: Any) -> str:
        """The assistant's next message, which joins the conversation: its content, without what the
        model thought before. Empty, and no message, if the model said nothing. See `stream`.
        """
        before = len(self._messages)
        for _ in self.stream(max_tokens, stop=stop, **sampling):
            pass
        return content_of(self._messages[-1]) if len(self._messages) > before else ""

    def stream(self, max_tokens: int = 256, *, stop: Iterable[str] = (), **sampling: Any) -> Reply:
        """The same in pieces, thought included. Closed early, what was yielded was said.

        stop: texts that end the reply; they are neither yielded nor part of it. sampling: see
        Session.generate. Raises, at the first piece, ChatError for messages that the template
        refuses, SessionError for a conversation that does not fit, for bad parameters and while
        another reply is coming; the conversation is as before then.
        """
        return Reply(lambda progress: self._speak(progress, max_tokens, stop, sampling))

    def tokens(
        self, messages: Iterable[Message | Pair] | None = None, *, is_asked: bool = False
    ) -> list[int]:
        """Token ids of the messages, or of others; `is_asked`: up to where a reply begins.

        Raises ChatError if the template refuses them.
        """
        told = self._messages if messages is None else checked_messages(messages)
        return self._prompts.encode(told, is_asked=is_asked).tokens

    # -- capsules -------------------------------------------------------------------------------

    def snapshot(self, name: str | None = None) -> ChatPoint:
        """Freeze the conversation, all messages prefilled. Raises PoolFull."""
        self._check_idle("no snapshot can be taken")
        self._feed(self._prompts.encode(self._messages, is_asked=False))
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
        made = Chat(self._engine, other, self._prompts, self._sampling)
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

    def _speak(
        self,
        progress: _Progress,
        max_tokens: int,
        stop: Iterable[str],
        sampling: Mapping[str, Any],
    ) -> Generator[str, None, None]:
        self._check_idle("there cannot be two")
        self._reason = None
        stops = StopStrings(stop)
        options = {**self._sampling, "stop": self._engine.checkpoint.stop_tokens, **sampling}
        if self.session.position:  # bad parameters raise here, before anything moves
            self.session.generate(min(max_tokens, 0), **options)
        prompt = self._prompts.encode(self._messages, is_asked=True)
        self._feed(prompt, room=1)
        generation = self.session.generate(max_tokens, **options)
        decoder, pieces = self._prompts.tokenizer.stream(), list[str]()
        self._reply = progress
        try:
            for token in generation:
                progress.token_count += 1
                if piece := stops.push(decoder.push(token)):
                    pieces.append(piece)
                    yield piece
                if stops.is_found:
                    break
            if piece := stops.push(decoder.flush()) + stops.flush():
                pieces.append(piece)
                yield piece
        except GeneratorExit:
            self._join("".join(pieces), prompt)
            raise
        finally:
            generation.close()
        progress.reason = self._reason = "stop" if stops.is_found else generation.reason
        self._join("".join(pieces), prompt)

    def _join(self, text: str, prompt: Prompt) -> None:
        message = reply_message(text, in_thought=prompt.in_thought)
        if message is not None:
            self._messages = (*self._messages, message)

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
        self.session.prefill(wanted[same:])
        self.fed_tokens += len(wanted) - same

    def _check_idle(self, what: str) -> None:
        if self._reply is not None and self._reply.is_coming:
            raise SessionError(f"chat: a reply is coming, so {what}; let it end, or close it first")


def shared(one: Sequence[int] | NDArray[np.int32], other: Sequence[int]) -> int:
    """How many tokens two runs have in common from the start on."""
    n = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:n]) != np.asarray(other[:n]))
    return int(differing[0]) if len(differing) else n


def open_chat(
    engine: SessionEngine,
    *,
    tools: Sequence[Mapping[str, object]] | None = None,
    template_options: Mapping[str, object] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> Chat:
    """An empty conversation on a free lane.

    tools: JSON schemas of functions, for the template. template_options: what the template takes
    besides, e.g. {"enable_thinking": False}. sampling: arguments of Session.generate for all
    replies; `recommended_sampling` gives the checkpoint's own. Raises LaneBusy, ChatError, or
    CheckpointError where the checkpoint has no tokenizer or no chat template.
    """
    text = engine.text
    if text.tokenizer is None or text.template is None:
        raise CheckpointError(
            f"{engine.checkpoint.path}: a conversation needs a tokenizer and a chat template; "
            "without them, feed token ids to engine.session()"
        )
    prompts = PromptEncoder(text.template, text.tokenizer, tools, template_options)
    return Chat(engine, engine.session(), prompts, sampling or {})


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
