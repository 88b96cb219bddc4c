"""The tail: tokens beyond a lane's boundary, known to the host but not yet in the device's state.

IS: which of them are history, how they get into the state, and what comes next. IS NOT: the draft
length (speculate), or validation (session).

    committed            pending               ahead
  0 ......... lane.position ........... end ............ base + len(known)

A token is history as soon as `take` moved `end` past it, and fed only when something needs the
state after it. A verify leaves the state as it was, but the device keeps the rows that agreed: they
are committed when they are needed, and only those that are history by then. So an iterator closed
early, or an interrupt, leaves exactly what was yielded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashrt.capsule.lineage import Lane
from flashrt.engine.tokens import TokenEngine
from flashrt.ops.rows import STOP_WORDS
from flashrt.ops.sample import SamplerParams
from flashrt.session.speculate import DraftLength

_NONE = range(0)
_NO_TOKENS = np.empty(0, np.int32)


class _Known(NamedTuple):
    """What the host knows beyond the boundary; swapped as a whole, void once the lane was moved."""

    moves: int  # of the lane when this was known
    base: int  # position of the first of `tokens`
    end: int  # one past the last token that is history; the lane may be further
    tokens: tuple[int, ...] = ()  # at positions base, base + 1, ...
    params: SamplerParams | None = None  # that tokens ahead were sampled with
    kept: range = _NONE  # positions whose rows the device can commit without another pass
    logits_at: int = -1  # boundary whose logits are in the logits region
    logits_before_at: int = -1  # boundary of those that were there before
    is_ahead: bool = False  # the lane may be one token beyond `end`


class Due(NamedTuple):
    """What the next token of a generation takes, on the device."""

    kept: NDArray[np.int32]  # pending tokens whose rows it has: to be committed
    token: int  # the pending token after those, to be fed; -1: none, a sample is wanted
    drafts: int  # tokens to guess after it


class Tail:
    """Of one session. `committed` is called whenever the lane's boundary has moved."""

    def __init__(self, engine: TokenEngine, lane: Lane, committed: Callable[[], None]) -> None:
        self._engine = engine
        self._lane = lane
        self._committed = committed
        self.clear()

    def clear(self) -> None:
        """The lane is at a boundary that nothing here knows."""
        self._state = _Known(self._lane.moves, self._lane.position, self._lane.position)

    @property
    def _known(self) -> _Known:
        if self._state.moves != self._lane.record.moves:
            self.clear()
        return self._state

    @property
    def end(self) -> int:
        """One past the last token that is history."""
        known, position = self._known, self._lane.record.position
        return known.end if known.end > position or known.is_ahead else position

    @property
    def pending(self) -> list[int]:
        """History that is not committed yet."""
        known = self._known
        return list(known.tokens[self._lane.position - known.base : self.end - known.base])

    def cut(self, end: int) -> None:
        """Less history: `end` is in [lane.position, self.end]."""
        self._state = self._known._replace(end=end, is_ahead=False)

    @property
    def last(self) -> int | None:
        """The token that became history last, while nothing else ran since."""
        known = self._known
        at = self.end - 1 - known.base
        return known.tokens[at] if 0 <= at < len(known.tokens) else None

    def take(self) -> None:
        """The token that `next` returned is history."""
        self.cut(self.end + 1)

    def next(
        self, params: SamplerParams, draft: DraftLength, wanted: int, stops: frozenset[int]
    ) -> int:
        """The token after `end`; -1 if the logits are NaN. `wanted`: how many will be, at most.
        One of `stops` will not be history.
        """
        known, position, end = self._known, self._lane.record.position, self.end
        if known.base <= end < known.base + len(known.tokens):
            if known.params is not params and known.params != params:
                self.sample(params)
        elif self._may_queue(params, draft, stops):
            return self._queue(params, wanted, stops)
        elif end > position:
            self._step(params, draft, wanted)
        else:
            self.sample(params)
        known = self._state
        return known.tokens[end - known.base]

    def due(self, draft: DraftLength, wanted: int) -> Due | None:
        """What `next` will do on the device, if it will do anything that lanes can share."""
        known, position = self._known, self._lane.record.position
        end = max(known.end, position)
        if known.base <= end < known.base + len(known.tokens):
            return None  # it knows the token, or knows one that was sampled with other parameters
        kept = self._kept()
        position += len(kept)
        if position == end:
            return Due(kept, -1, 0)
        room = self._engine.max_positions - position
        length = draft.next(min(wanted, room) - 1)
        return Due(kept, known.tokens[position - known.base], length)

    def kept_committed(self) -> None:
        """The rows that the device kept, all of them pending, are committed."""
        self._committed()

    def sampled(self, params: SamplerParams, token: int) -> None:
        """A token was sampled at the lane's boundary, where all history is."""
        self._restart((token,), params, logits_at=self._lane.record.position)

    def fed(self, params: SamplerParams, following: int) -> None:
        """What was pending is committed: `following` was sampled after it."""
        self.sampled(params, following)
        self._committed()

    def verified(self, params: SamplerParams, first: int, sampled: Sequence[int]) -> None:
        """A verify began with `first`, which is pending, and sampled these after its rows."""
        position = self._lane.position
        kept = range(position, position + len(sampled))
        self._restart((first, *sampled), params, kept)

    def take_pending(self) -> NDArray[np.int32]:
        """History that is to be fed: int32 [0] or [1]; whatever the device kept is committed.

        It goes in front of what is fed next, in the same replay: the bits do not depend on that.
        """
        self._commit_kept()
        return np.array(self.pending, np.int32)

    def settle(self) -> None:
        """All history becomes state. One row without logits, sampling or a read of the device: what
        follows is sampled when somebody asks.
        """
        state, record = self._state, self._lane.record
        if state.moves != record.moves or state.end <= record.position:
            return
        pending = self.take_pending()
        if len(pending):
            self._engine.prefill(self._lane, pending)
            self.clear()
            self._committed()

    def sample(self, params: SamplerParams | None = None) -> None:
        """All history becomes state; logits of its boundary, and a token ahead, sampled with
        `params`, or as the token before.
        """
        params = params or self._known.params or SamplerParams()
        self._commit_kept()
        if pending := self.pending:  # one token at most: the one that the device sampled last
            self._decode(params, pending[0])
            return
        self.sampled(params, self._engine.sample(self._lane, params))

    def logits(self, boundary: int) -> NDArray[np.float32] | None:
        """Logits that choose the token at `boundary`, float32 [vocab_size], where the device still
        has them.
        """
        known = self._known
        if boundary == known.logits_at:
            return self._engine.logits(self._lane)
        if boundary == known.logits_before_at:
            return self._engine.logits_before(self._lane)
        if boundary - 1 in known.kept:
            return self._engine.verify_logits(self._lane, boundary - 1 - known.kept.start)
        return None

    # -- inside ---------------------------------------------------------------------------------

    def _restart(
        self,
        tokens: tuple[int, ...],
        params: SamplerParams,
        kept: range = _NONE,
        logits_at: int = -1,
    ) -> None:
        """Known tokens begin at the lane's boundary."""
        record, known = self._lane.record, self._state
        end = position = record.position
        if known.moves == record.moves and known.end > end:
            end = known.end
        self._state = _Known(record.moves, position, end, tokens, params, kept, logits_at)

    def _kept(self) -> NDArray[np.int32]:
        """As many pending tokens as the device has kept rows of: int32 [n]."""
        known = self._known
        if not known.kept or self._lane.position != known.kept.start:
            return _NO_TOKENS
        return np.array(self.pending[: len(known.kept)], np.int32)

    def _commit_kept(self) -> None:
        known, tokens = self._known, self._kept()
        if not len(tokens):
            return
        n = len(tokens)
        if n < len(known.kept):  # the device's token is the one after; more is not known to it
            known_tokens = known.tokens[: known.kept.start + n + 1 - known.base]
            self._state = known._replace(tokens=known_tokens)
        self._engine.commit(self._lane, tokens)
        self._committed()

    def _may_queue(self, params: SamplerParams, draft: DraftLength, stops: frozenset[int]) -> bool:
        """Whether what comes next can be queued behind what is under way: it must be a plain
        decode, and need nothing of the host's, as a grammar does.
        """
        is_plain = draft.draft == 0 and params.allowed is None and len(stops) < STOP_WORDS
        return is_plain and self._engine.goes_ahead

    def _queue(self, params: SamplerParams, wanted: int, stops: frozenset[int]) -> int:
        """`next`, with the decode of what it returns under way."""
        engine, lane = self._engine, self._lane
        self._commit_kept()
        known = self._known
        if known.end > lane.record.position:  # one token at most is pending
            engine.begin_decode(lane, self.pending[0], params, stops)
            self._restart((), params)
            self._committed()
        elif known.params != params or not engine.has_following(lane, stops):
            engine.begin_sample(lane, params, stops)
            self._restart((), params)
        end = self.end
        is_more = wanted > 1 and end + 1 < engine.max_positions
        self._state = self._known._replace(is_ahead=is_more)
        token, is_fed = engine.following(lane, is_more=is_more)
        logits_at = (end + 1, end) if is_fed else (end, -1)
        self._state = _Known(
            lane.record.moves, end, end, (token,), params, _NONE, *logits_at, is_ahead=is_fed
        )
        if is_fed:
            self._committed()
        return token

    def _decode(self, params: SamplerParams, token: int) -> None:
        self._engine.set_sampler(self._lane, params)
        self.fed(params, self._engine.decode(self._lane, token))

    def _step(self, params: SamplerParams, draft: DraftLength, wanted: int) -> None:
        """Feed what is pending, and so learn at least one token more."""
        start = time.perf_counter()
        self._commit_kept()
        lane, known = self._lane, self._known
        position = lane.record.position
        if known.end <= position:  # nothing is pending
            self.sample(params)
            return
        first = known.tokens[position - known.base]
        length = draft.next(min(wanted, self._engine.max_positions - position) - 1)
        n_accepted = 0
        if length:
            self._engine.set_sampler(lane, params)
            self._engine.need_token(lane, first)
            self._engine.draft(lane, length)
            sampled = self._engine.verify(lane, length + 1)
            self.verified(params, first, sampled)
            n_accepted = len(sampled) - 1
        else:
            self._decode(params, first)
        draft.record(length, n_accepted, time.perf_counter() - start)
