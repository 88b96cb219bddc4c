"""Reuse: what to do with tokens already computed when a prompt comes in. Pure functions.

IS: (live lane, known boundaries, tokens wanted) -> continue | rollback | restore | cold, with
tokens, bytes and a reason; and which boundaries to place. IS NOT: anything that touches a session
or a file (opening).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


class Action(enum.StrEnum):
    """What a session does before it prefills the rest; the order is the preference among equals."""

    CONTINUE = "continue"  # the live lane is a prefix of the prompt
    ROLLBACK = "rollback"  # the live lane was, before it went elsewhere
    RESTORE = "restore"  # a capsule is
    COLD = "cold"  # nothing is


@dataclass(frozen=True, slots=True)
class Boundary:
    """A capsule whose tokens are a prefix of the prompt."""

    position: int
    nbytes: int  # that a restore would move
    tier: str  # device, host or disk
    key: object = None  # for the caller


@dataclass(frozen=True, slots=True)
class Live:
    """A lane: its tokens, and the positions that it can go back to by itself."""

    tokens: Tokens
    boundaries: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Rates:
    """What time is made of; measured where it can be."""

    us_per_token: float = 500.0  # of prefill
    us_per_byte: dict[str, float] = field(
        default_factory=lambda: {"device": 1e-4, "host": 2e-4, "disk": 1e-3}
    )


@dataclass(frozen=True, slots=True)
class Decision:
    """After `action`, [0, position) is there; then `n_prefill` tokens are to be prefilled."""

    action: Action
    position: int
    n_prefill: int
    nbytes: int
    estimate_us: float
    reason: str
    boundary: Boundary | None = None

    def __str__(self) -> str:
        return (
            f"{self.action}: {self.position:,} tokens kept, {self.n_prefill:,} to prefill, "
            f"{self.nbytes:,} bytes to move; {self.reason}"
        )


def decide(
    wanted: Tokens,
    boundaries: Iterable[Boundary],
    live: Live | None = None,
    fixed_nbytes: int = 0,
    rates: Rates | None = None,
) -> Decision:
    """The way to `wanted` that takes the least time.

    `fixed_nbytes`: what going back within the lane moves. Boundaries beyond the prompt are ignored.
    """
    rates, n = rates or Rates(), len(wanted)

    def option(
        action: Action, position: int, nbytes: int, reason: str, boundary: Boundary | None = None
    ) -> Decision:
        tier = "device" if boundary is None else boundary.tier
        rest = n - position
        estimate_us = rest * rates.us_per_token + nbytes * rates.us_per_byte[tier]
        return Decision(action, position, rest, nbytes, estimate_us, reason, boundary)

    options = [option(Action.COLD, 0, 0, "nothing known is a prefix of the prompt")]
    if live is not None:
        common, length = common_prefix(live.tokens, wanted), len(live.tokens)
        if common == length > 0:
            reason = f"the live {length:,} tokens are a prefix of the prompt"
            options.append(option(Action.CONTINUE, length, 0, reason))
        elif back := max((b for b in live.boundaries if b <= common), default=0):
            reason = (
                f"the live tokens agree up to {common:,} of {length:,}, a boundary is at {back:,}"
            )
            options.append(option(Action.ROLLBACK, back, fixed_nbytes, reason))
    for b in boundaries:
        if 0 < b.position <= n:
            reason = f"a capsule on the {b.tier} tier covers {b.position:,} of {n:,} tokens"
            options.append(option(Action.RESTORE, b.position, b.nbytes, reason, b))
    order = list(Action)
    return min(options, key=lambda o: (o.estimate_us, order.index(o.action), -o.position))


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def boundaries_due(
    start: int, stop: int, wanted: Iterable[int] = (), every: int | None = None
) -> list[int]:
    """Where to keep a capsule while prefilling [start, stop): the positions that the caller wants
    (ends of messages and tool calls), and every so many tokens. Waypoints are apart from these.
    """
    due = {p for p in wanted if start < p <= stop}
    if every is not None:
        due |= set(range((start // every + 1) * every, stop + 1, every))
    return sorted(due)
