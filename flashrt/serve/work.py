"""Requests that are being carried out, and the lanes that do it: the nouns of the scheduler.

IS: what is known of a request, of each of its choices, of a lane that works for one, and of what a
choice leaves. The scheduler's thread alone writes here. IS NOT: a decision (admission), or a step
(scheduler).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashrt.serve.ask import Ask, Reason, Ticket, TokenLogprobs
from flashrt.serve.prefix import Entry
from flashrt.session.session import Generation, Session

State = Literal["idle", "prompt", "decode", "end"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What may wait, and what may run."""

    queue: int = 256  # requests that wait, in all
    queue_per_owner: int = 64
    most_choices: int = 16  # n of a request
    drain_s: float = 30.0  # at close, running requests may go on for so long
    itl_s: float | None = None  # what a step that also feeds prompts may take; None: see Pace
    noted: int | None = None  # logprobs of each token, and of so many likeliest; None: if asked for


class Ends:
    """What becomes of the state that a choice leaves: nodes of sessions, and the store."""

    def begin(self, asked: Asked) -> None:
        """Called by `submit`, in the caller's thread. Raises SessionError."""

    def leave(self, asked: Asked, left: Left, tell: Callable[[str | None], None]) -> None:
        """A choice has ended: `tell` is to be called with its node, once what it left is kept."""
        tell(None)

    def over(self, asked: Asked) -> None:
        """The request is over, however it ended."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a choice leaves."""

    index: int
    reason: Reason
    tokens: NDArray[np.int32]  # all that are committed
    end: Entry | None  # None: there was no room for a capsule
    start: Entry | None  # where the last turn of the prompt starts
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()  # of tokens, by position


@dataclass(slots=True, eq=False)
class Asked:
    """A request on its way. `lock` of the scheduler is not needed: only its thread writes."""

    ask: Ask
    owner: str  # its key
    tokens: NDArray[np.int32]
    submitted: float
    deadline: float
    ticket: Ticket
    submitted_at: float = 0.0
    has_begun: bool = False
    is_over: bool = False
    is_deaf: bool = False  # its sink raised: nothing more is told
    n_ended: int = 0
    n_generated: int = 0
    prompt: Entry | None = None  # where choices part; held until all have begun
    start: Entry | None = None
    made: list[Entry] = field(default_factory=list)  # entries that it made
    cached: int = 0
    action: str = ""
    began: float = 0.0
    first_token: float | None = None


@dataclass(slots=True, eq=False)
class Choice:
    """One of the choices of a request."""

    asked: Asked
    index: int
    stops: list[int] = field(default_factory=list)  # prompt positions to stop at, ascending
    generation: Generation | None = None
    n_tokens: int = 0
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)  # see Left
    reason: Reason | None = None  # once it has ended, and its last token is not state yet
    last_token: float = 0.0


@dataclass(slots=True, eq=False)
class Worker:
    """A lane and what it does."""

    session: Session
    owner: str | None = None  # whose state it has; None: nobody may go on from it
    choice: Choice | None = None
    used: float = 0.0
    waiting: deque[Callable[[], object]] = field(default_factory=deque)  # to be done while idle

    @property
    def state(self) -> State:
        """What it does."""
        choice = self.choice
        if choice is None:
            return "idle"
        if choice.reason is not None:
            return "end"
        return "decode" if choice.generation is not None and not choice.stops else "prompt"


@dataclass(frozen=True, slots=True)
class LaneStatus:
    """One lane, as it was."""

    index: int
    state: State
    owner: str | None  # its key
    position: int
    session: str | None
    prompt_tokens: int
    generated_tokens: int
