"""Conversations: a session that is told messages and replies in text.

IS: messages -> tokens by the checkpoint's chat template, fed from where they differ from what the
session holds; capsules together with the messages that led to them. IS NOT: tools or their syntax
(text is handed on as it is), or a server. Called by: users, demo, examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.capsule.capsule import Capsule
from flashrt.session.session import Session
from flashrt.text.template import ChatTemplate, chat_template_of
from flashrt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from flashrt.load import SessionEngine

Said = tuple[tuple[str, str], ...]  # (role, content) of each message, oldest first


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of a conversation: its capsule, and what was said before it."""

    capsule: Capsule
    said: Said


class Chat:
    """A conversation on a session of its own. Made by `open_chat`.

    `fed_tokens` counts the tokens that went through the model as prompt since it was made.
    """

    def __init__(
        self, session: Session, template: ChatTemplate, tokenizer: Tokenizer, stop: tuple[int, ...]
    ) -> None:
        """An empty conversation; `stop`: ids that end a reply, from the checkpoint."""
        self.session = session
        self.said: Said = ()
        self.fed_tokens = 0
        self._template, self._tokenizer, self._stop = template, tokenizer, stop

    def add(self, role: str, content: str) -> None:
        """Append a message; it is prefilled when something needs the state after it."""
        self.said = (*self.said, (role, content))

    def reply(self, max_tokens: int = 256, **sampling: Any) -> str:
        """The assistant's next message, which joins the conversation; see Session.generate."""
        for _ in self.stream(max_tokens, **sampling):
            pass
        return self.said[-1][1]

    def stream(self, max_tokens: int = 256, **sampling: Any) -> Iterator[str]:
        """The same in pieces of whole characters. Closed early, what was yielded was said."""
        self._feed(is_asked=True)
        decoder, pieces = self._tokenizer.stream(), list[str]()
        try:
            for token in self.session.generate(max_tokens, stop=self._stop, **sampling):
                if piece := decoder.push(token):
                    pieces.append(piece)
                    yield piece
            if piece := decoder.flush():
                pieces.append(piece)
                yield piece
        finally:
            self.add("assistant", "".join(pieces).strip())

    def tokens(self, said: Said | None = None, *, is_asked: bool = False) -> list[int]:
        """Token ids of what was said, here or in `said`; `is_asked`: up to where a reply begins."""
        told = self.said if said is None else said
        messages = [{"role": role, "content": content} for role, content in told]
        text = self._template.render(messages, add_generation_prompt=is_asked)
        return self._tokenizer.encode(text)

    # -- capsules -------------------------------------------------------------------------------

    def snapshot(self, name: str | None = None) -> Moment:
        """Freeze the conversation, all messages prefilled. Raises PoolFull."""
        self._feed(is_asked=False)
        return Moment(self.session.snapshot(name), self.said)

    def restore(self, moment: Moment) -> None:
        """Continue from a moment. Raises CapsuleError."""
        self.session.restore(moment.capsule)
        self.said = moment.said

    def fork(self, moment: Moment | None = None) -> Chat:
        """Another conversation on a free lane: this one, or a moment's. Raises LaneBusy."""
        other = self.session.fork(None if moment is None else moment.capsule)
        made = Chat(other, self._template, self._tokenizer, self._stop)
        made.said = self.said if moment is None else moment.said
        return made

    def close(self) -> None:
        """Give the session's lane back."""
        self.session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------

    def _feed(self, *, is_asked: bool) -> None:
        """Bring the session to the tokens of what was said: roll back what differs, feed the rest.

        Templates may drop or reword old turns, and sampled text may be tokenized in another way.
        """
        wanted = self.tokens(is_asked=is_asked)
        same = shared(self.session.tokens, wanted)
        self.session.rollback(same)
        self.session.prefill(wanted[same:])
        self.fed_tokens += len(wanted) - same


def shared(one: Sequence[int] | NDArray[np.int32], other: Sequence[int]) -> int:
    """How many tokens two runs have in common from the start on."""
    n = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:n]) != np.asarray(other[:n]))
    return int(differing[0]) if len(differing) else n


def open_chat(engine: SessionEngine) -> Chat:
    """An empty conversation on a free lane.

    Raises LaneBusy, or CheckpointError where the checkpoint has no tokenizer or no chat template.
    """
    template = chat_template_of(engine.checkpoint.path)
    if engine.tokenizer is None or template is None:
        raise CheckpointError(
            f"{engine.checkpoint.path}: a conversation needs tokenizer.json and a chat template; "
            "without them, feed token ids to engine.session()"
        )
    return Chat(engine.session(), template, engine.tokenizer, engine.checkpoint.stop_tokens)
