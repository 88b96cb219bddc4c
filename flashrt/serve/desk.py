"""The desk: where a request that was understood becomes an ask of the scheduler.

IS: what all text routes share, from prompt tokens and options to an `Answer`. IS NOT: the JSON of
any API (wire), or scheduling (core).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.base.messages import visible
from flashrt.serve.access import Access
from flashrt.serve.answer import Answer, Heard
from flashrt.serve.ask import Ask
from flashrt.serve.core import Core
from flashrt.serve.mailbox import Mailbox
from flashrt.serve.served import Served
from flashrt.serve.speaker import Event, Parser, Plain, Speaker

log = logging.getLogger("flashrt.serve")


@dataclass(slots=True)
class Wanted:
    """A request for text. `tokens`: the prompt; `parser`: makes what reads one choice."""

    tokens: list[int]
    max_tokens: int
    sampling: dict[str, Any]
    n: int = 1
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    turn_starts: tuple[int, ...] = ()
    priority: int = 0
    session: str | None = None
    messages: tuple[Mapping[str, object], ...] | None = None
    parser: Callable[[], Parser] = Plain
    is_one_call: bool = False


class Desk:
    """One per server."""

    def __init__(self, core: Core, served: Served, access: Access) -> None:
        self.served, self.access = served, access
        self._core = core

    async def ask(self, wanted: Wanted, owner: str) -> Answer:
        """Hand a request to the scheduler. Raises FlashrtError if it is not taken."""
        messages = wanted.messages
        if wanted.session is not None and messages is not None:
            sessions = self._core.sessions
            known = await asyncio.wrap_future(sessions.messages(owner, wanted.session))
            messages = _new(known, messages)
        mailbox: Mailbox[Event] = Mailbox()
        speaker = Speaker(
            mailbox,
            self.served.tokenizer,
            wanted.n,
            wanted.stops,
            wanted.parser,
            is_one_call=wanted.is_one_call,
        )
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
                logprobs=wanted.logprobs,
                priority=wanted.priority,
                timeout_s=self.access.timeout_s,
                session=wanted.session,
                messages=messages if wanted.session is not None else None,
            )
        )
        session = wanted.session
        if session is None or messages is None:
            return Answer(mailbox, ticket, speaker.clock, wanted.n)

        async def remember(heard: Heard) -> None:
            assert heard.node is not None, "it is called for those that have one"
            said = self._core.sessions.annotate(owner, session, heard.node, [heard.message()])
            try:
                await asyncio.wrap_future(said)
            except FlashrtError as error:  # the session was deleted meanwhile, for instance
                log.warning("a reply is not in its session: %s", visible(str(error)))

        return Answer(mailbox, ticket, speaker.clock, wanted.n, remember)


def _new(
    known: Sequence[Mapping[str, object]], messages: Sequence[Mapping[str, object]]
) -> tuple[Mapping[str, object], ...]:
    """Messages that a session's tip does not have yet: a conversation is sent whole each time."""
    same = 0
    for old, new in zip(known, messages, strict=False):
        if {k: v for k, v in old.items() if v} != {k: v for k, v in new.items() if v}:
            break
        same += 1
    return tuple(messages[same:])
