"""Speculation policy: how many tokens to draft before the next verify.

IS: arithmetic on acceptance and measured time; it decides speed alone, never a token. IS NOT:
drafting or verifying (engine), or which tokens count (tail). Called by: session, tail.

A step that drafts K tokens yields 1 + the drafts that agree. With a[i] the share of drafts at depth
i that agreed when all before them did, it yields 1 + a[1] + a[1] a[2] + ... tokens on average;
"auto" takes the K whose expected tokens per second are highest.
"""

from __future__ import annotations

import math
from typing import Final, Literal

from flashrt.base.errors import SessionError

Draft = int | Literal["auto"]
FORGET: Final = 0.1  # weight of the newest observation
FIRST_GUESS: Final = 0.6  # acceptance at a depth that was never tried
GUESSED_SHARE: Final = 0.15  # time of one more drafted token, in decodes, until measured
PROBE_EVERY: Final = 32  # steps without drafting until it is tried again
PROBE_LENGTH: Final = 2


class DraftLength:
    """The draft length of each step: fixed, or adapted to acceptance and time."""

    def __init__(self, draft: Draft, limit: int) -> None:
        """`limit`: the engine's longest draft, 0 without a draft head. Raises SessionError."""
        if draft != "auto" and not (isinstance(draft, int) and draft >= 0):
            raise SessionError(f'generate: draft={draft!r} is neither "auto" nor a count of tokens')
        if draft and not limit:
            raise SessionError(
                f"generate: draft={draft!r}, but the engine has no draft head; "
                "load a checkpoint that has one (mtp.*), on a device that drafts, with draft=True"
            )
        if draft != "auto" and draft > limit:
            raise SessionError(f"generate: draft={draft} is beyond the longest draft, {limit}")
        self.draft = draft
        self.limit = limit
        self._agree = [FIRST_GUESS] * (limit + 1)  # by depth, [0] unused
        self._seconds: dict[int, float] = {}  # of a step, by draft length
        self._idle = 0  # steps since the last draft

    def next(self, room: int) -> int:
        """Tokens to draft in the next step, at most `room`."""
        wanted = self._adapted() if self.draft == "auto" else self.draft
        return max(0, min(wanted, room, self.limit))

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        """A step that drafted so many tokens, of which so many agreed, took so long."""
        self._idle = 0 if drafted else self._idle + 1
        for depth in range(1, min(drafted, accepted + 1) + 1):
            agreed = float(depth <= accepted)
            self._agree[depth] += FORGET * (agreed - self._agree[depth])
        known = self._seconds.setdefault(drafted, seconds)
        self._seconds[drafted] = known + FORGET * (seconds - known)

    def expected_tokens(self, length: int) -> float:
        """Tokens that a step with so many drafts yields on average."""
        shares = self._agree[1 : length + 1]
        return 1 + sum(math.prod(shares[: i + 1]) for i in range(length))

    def seconds(self, length: int) -> float:
        """Time of a step, measured or extrapolated from the nearest length that was tried."""
        if length in self._seconds:
            return self._seconds[length]
        near = min(self._seconds, key=lambda tried: abs(tried - length))
        base = self._seconds.get(0, self._seconds[near] / (1 + GUESSED_SHARE * near))
        slope = (self._seconds[near] - base) / near if near else GUESSED_SHARE * base
        return max(self._seconds[near] + (length - near) * slope, 1e-9)

    def _adapted(self) -> int:
        if not self._seconds or self.limit == 0:
            return 0  # measure a plain step first
        if self._idle >= PROBE_EVERY:
            return PROBE_LENGTH
        lengths = range(self.limit + 1)
        return max(lengths, key=lambda length: self.expected_tokens(length) / self.seconds(length))
