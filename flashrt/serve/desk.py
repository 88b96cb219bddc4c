"""The desk: where a request that was understood becomes an ask of the scheduler.

IS: what all text routes share, from prompt tokens and options to an `Answer`. IS NOT: the JSON of
any API (wire), or scheduling (core).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.engine.sight import Image
from flashrt.serve.access import Access
from flashrt.serve.answer import Answer, Heard
from flashrt.serve.ask import Ask
from flashrt.serve.core import Core
from flashrt.serve.mailbox import Mailbox
from flashrt.serve.served import Served
from flashrt.serve.speaker import Event, Parser, Plain, Speaker


@dataclass(slots=True)
class Wanted:
    """A request for text. `tokens`: the prompt; `parser`: makes what reads one choice.

    In a session: `tip` is the node that it goes on from, `messages` are new with it, and the reply
    goes on where `unfinished`, a message, ends.
    """

    tokens: list[int]
    max_tokens: int
    sampling: dict[str, Any]
    n: int = 1
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    turn_starts: tuple[int, ...] = ()
    images: tuple[Image, ...] = ()
    priority: int = 0
    session: str | None = None
    tip: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    unfinished: Mapping[str, Any] | None = None
    parser: Callable[[], Parser] = Plain
    is_one_call: bool = False


class Desk:
    """One per server."""

    def __init__(self, core: Core, served: Served, access: Access) -> None:
        self.served, self.access = served, access
        self.sessions, self.eyes = core.sessions, core.eyes
        self._core = core

    async def ask(self, wanted: Wanted, owner: str) -> Answer:
        """Hand a request to the scheduler. Raises FlashrtError if it is not taken."""
        mailbox: Mailbox[Event] = Mailbox()
        session, keeps = wanted.session, wanted.session is not None and wanted.messages is not None
        notes = [Heard() for _ in range(wanted.n)] if keeps else []
        speaker = Speaker(
            mailbox,
            self.served.tokenizer,
            wanted.n,
            wanted.stops,
            wanted.parser,
            is_one_call=wanted.is_one_call,
            notes=notes,
        )

        def replied(index: int) -> list[Mapping[str, Any]]:
            speaker.finish(index)
            return [_joined(wanted.unfinished, notes[index].message())]

        ticket = self._core.submit(
            Ask(
                owner=owner,
                tokens=tuple(wanted.tokens),
                sink=speaker,
                max_tokens=wanted.max_tokens,
                n=wanted.n,
                sampling=wanted.sampling,
                stop_tokens=self.served.stop_tokens,
                turn_starts=wanted.turn_starts,
                images=wanted.images,
                logprobs=wanted.logprobs,
                priority=wanted.priority,
                timeout_s=self.access.timeout_s,
                session=session,
                tip=wanted.tip,
                messages=wanted.messages if keeps else None,
                replied=replied if keeps else None,
            )
        )

        async def etag_of(node: str) -> str | None:
            assert session is not None, "only turns of sessions have nodes"
            try:
                turn = await asyncio.wrap_future(self.sessions.turn(owner, session, node))
            except FlashrtError:  # the session was deleted meanwhile
                return None
            return turn.etag

        return Answer(mailbox, ticket, speaker.clock, wanted.n, session, etag_of)


def _joined(unfinished: Mapping[str, Any] | None, reply: dict[str, Any]) -> Mapping[str, Any]:
    """A reply, with the message before it that it goes on."""
    if unfinished is None:
        return reply
    joined = {**unfinished, **reply}
    joined["content"] = (unfinished.get("content") or "") + reply["content"]
    return joined
