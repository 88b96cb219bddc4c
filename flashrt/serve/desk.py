"""The desk: where a request that was understood becomes an ask of the scheduler.

IS: what all text routes share, from prompt tokens and options to an `Answer`. IS NOT: the JSON of
any API (wire), or scheduling (core).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashrt.serve.access import Access
from flashrt.serve.answer import Answer
from flashrt.serve.ask import Ask
from flashrt.serve.core import Core
from flashrt.serve.mailbox import Mailbox
from flashrt.serve.served import Served
from flashrt.serve.speaker import Event, Parser, Plain, Speaker


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

    def ask(self, wanted: Wanted, owner: str) -> Answer:
        """Hand a request to the scheduler. Raises FlashrtError if it is not taken."""
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
                messages=wanted.messages,
            )
        )
        return Answer(mailbox, ticket, speaker.clock, wanted.n)
