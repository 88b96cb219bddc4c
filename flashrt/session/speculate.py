"""Speculation policy: how many tokens to draft before the next verify.

IS: arithmetic on acceptance and measured time; it decides speed alone, never a token. IS NOT:
drafting or verifying (engine), or which tokens count (tail).

A step that drafts K tokens yields 1 + the drafts that agree. With a[i] the share of drafts at depth
i that agree when all before them did, it yields 1 + a[1] + a[1] a[2] + ... tokens on average;
"auto" takes the K whose expected tokens per second are highest. A share is counted, recent steps
more than old ones, and starts out as that of the depth before; a time is averaged, and guessed
from the nearest length while a length was never tried. Every so often a step tries another length,
so that an unlucky measurement does not stay.
"""

from __future__ import annotations

from typing import Final, Literal

from flashrt.base.errors import SessionError

Draft = int | Literal["auto"]
KEEP: Final = 0.96  # of what was counted, at each new observation: about the last 25 count
FIRST_GUESS: Final = 0.6  # acceptance of the first drafted token, until counted
GUESS_WEIGHT: Final = 3.0  # observations that a guess is worth
NEWEST: Final = 0.2  # weight of the newest time
GUESSED_SHARE: Final = 0.15  # time of one more drafted token, in decodes, until measured
TRY_EVERY: Final = 16  # steps from one that tries another length to the next


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
        self._tried = [0.0] * limit  # drafts by depth, all before them having agreed
        self._agreed = [0.0] * limit  # of those
        self._seconds: dict[int, float] = {}  # of a step, by draft length
        self._steps = 0

    def next(self, room: int) -> int:
        """Tokens to draft in the next step, at most `room`."""
        wanted = self._adapted() if self.draft == "auto" else self.draft
        return max(0, min(wanted, room, self.limit))

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        """A step that drafted so many tokens, of which so many agreed, took so long."""
        if self.draft != "auto":
            return  # nobody will ask
        self._steps += 1
        for depth in range(min(drafted, accepted + 1)):
            self._tried[depth] = 1 + KEEP * self._tried[depth]
            self._agreed[depth] = (depth < accepted) + KEEP * self._agreed[depth]
        known = self._seconds.setdefault(drafted, seconds)
        self._seconds[drafted] = known + NEWEST * (seconds - known)

    def expected_tokens(self, length: int) -> float:
        """Tokens that a step with so many drafts yields on average."""
        share, run, expected = FIRST_GUESS, 1.0, 1.0
        for agreed, tried in zip(self._agreed[:length], self._tried[:length], strict=True):
            share = (agreed + GUESS_WEIGHT * share) / (tried + GUESS_WEIGHT)
            run *= share
            expected += run
        return expected

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
        lengths = range(self.limit + 1)
        best = max(lengths, key=lambda length: self.expected_tokens(length) / self.seconds(length))
        if self._steps % TRY_EVERY == 0:
            others = (best + 1, 0, best - 1)
            return max(0, others[self._steps // TRY_EVERY % len(others)])
        return best
