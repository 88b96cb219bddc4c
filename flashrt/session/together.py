"""Generations of several sessions side by side: lanes that decode share a replay.

IS: which steps of generations and prompts can be one replay, in which order tokens are yielded, and
what becomes of the others when one fails. IS NOT: a step itself (session, tail), or a scheduler: it
decides whose turn it is (`step` does what it says). Tokens, states and capsules are those of each
session alone, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import FlashrtError, SessionError
from flashrt.base.locks import while_holding
from flashrt.capsule.turn import Turn, in_turn
from flashrt.engine.tokens import TokenEngine
from flashrt.models.model import STEP_ROWS, VERIFY_EACH_ROWS
from flashrt.ops.sample import SamplerParams
from flashrt.session.session import Generation, Session
from flashrt.session.tail import Due


@dataclass(frozen=True, slots=True, eq=False)
class Feed:
    """A piece of a session's prompt. `then`, with its last piece: the parameters of the generation
    that follows, whose first token is sampled in the same replay.
    """

    session: Session
    tokens: NDArray[np.int32]
    then: SamplerParams | None = None


def together(*generations: Generation) -> Iterator[tuple[int, int]]:
    """(index, token) of each generation in turn, as one pass over the weights gives them.

        for index, token in flashrt.together(*(fork.generate(64, seed=i) for i, fork in ...)):

    Each is what `Session.generate` returned, of sessions of one engine; each ends by its own stop,
    and its `reason` says why. Those that draft are verified in one pass as well. A generation that
    fails ends alone: the others go on, then the first failure is raised, with a note of its index.
    Raises SessionError for sessions of several engines, and for two generations of one session.
    """
    replays = _Replays([generation.session for generation in generations])
    return _turns(generations, replays)


def step(decoding: Sequence[Generation], feeds: Sequence[Feed] = ()) -> None:
    """Pieces of prompts and the next token of generations in one replay, for schedulers.

    The pieces are committed; `next(generation)` then takes its token without a replay (but for the
    step of one generation alone, which is left to it). The bits are those of each session alone.
    With pieces there are at most `engine.most_together` sessions, and STEP_ROWS (64) rows: a row
    per generation, one per token of a piece, and one more for a session whose last token is still
    pending. That bounds how long the generations wait for the prompts. Without, drafts are made and
    verified, and any number of sessions take turns.

    Raises SessionError for more, for sessions of several engines, for a session that is named
    twice, and what `Session.prefill` raises for a piece; nothing has happened then.
    """
    named = [*(g.session for g in decoding), *(feed.session for feed in feeds)]
    if named:
        _Replays(named).run(list(decoding), list(feeds))


def _turns(generations: Sequence[Generation], replays: _Replays) -> Iterator[tuple[int, int]]:
    live = dict(enumerate(generations))
    failures: list[FlashrtError] = []
    while live:
        if len(live) > 1:
            replays.run(list(live.values()), [])
        for index, generation in list(live.items()):
            try:
                token = next(generation)
            except StopIteration:
                del live[index]
            except FlashrtError as error:
                error.add_note(f"in generation {index} of together(); the others went on")
                failures.append(error)
                del live[index]
            else:
                yield index, token
    if failures:
        raise failures[0]


class _Replays:
    """Shared replays of some sessions of one engine."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            if session.is_closed:
                raise SessionError(
                    "together: a session is closed; open another with engine.session()"
                )
        if len({id(session.engine) for session in sessions}) > 1:
            raise SessionError("together: the sessions are of several engines; a replay has one")
        if len({id(session) for session in sessions}) < len(sessions):
            raise SessionError("together: a session is named twice; fork it first")
        ordered = sorted(sessions, key=lambda session: session.lane.index)
        self._locks = [
            session.lock for session in ordered
        ]  # so two threads never wait for each other
        if sessions:
            self.turn: Turn = sessions[0].turn
            self._engine: TokenEngine = sessions[0].engine

    def run(self, live: Sequence[Generation], feeds: Sequence[Feed]) -> None:
        """The next step of all that have one, as many at once as a replay holds."""
        if self.turn.is_mine():
            self._run(live, feeds)
        else:
            while_holding(self._locks, lambda: self._run(live, feeds))

    @in_turn
    def _run(self, live: Sequence[Generation], feeds: Sequence[Feed]) -> None:
        engine, due = self._engine, list[_Step]()
        for generation in live:
            if (found := generation.due()) is not None:
                due.append(_Step(generation, found))
        pieces = [feed.session.piece(feed.tokens) for feed in feeds]
        if feeds:
            self._check_rows(len(due), pieces)
        if not feeds and len(due) < 2:
            return  # its own step does that
        for group in _groups([s for s in due if len(s.due.kept)], engine.most_together):
            engine.commit_each([(s.session.lane, s.due.kept) for s in group])
            for s in group:
                s.session.tail.kept_committed()
        for s in due:
            engine.set_sampler(s.session.lane, s.generation.params)
        for group in _groups([s for s in due if s.due.token < 0], engine.most_together):
            self._sample(group)
        decoding = [s for s in due if s.due.token >= 0]
        if feeds:
            self._mix(decoding, feeds, pieces)
            return
        for group in _verify_groups(decoding, engine.most_together):
            self._decode(group)

    def _check_rows(self, n_decoding: int, pieces: Sequence[NDArray[np.int32]]) -> None:
        n_rows = n_decoding + sum(map(len, pieces))
        n_runs, most = n_decoding + len(pieces), self._engine.most_together
        if n_runs > most or n_rows > STEP_ROWS or not all(map(len, pieces)):
            raise SessionError(
                f"step: {n_decoding} generations and pieces of {[len(p) for p in pieces]} tokens; "
                f"a step takes 1 to {most} sessions, {STEP_ROWS} rows in all, and no empty piece"
            )

    def _sample(self, group: Sequence[_Step]) -> None:
        tokens = self._engine.sample_each([s.session.lane for s in group])
        for s, token in zip(group, tokens, strict=True):
            s.session.tail.sampled(s.generation.params, token)

    def _mix(
        self,
        decoding: Sequence[_Step],
        feeds: Sequence[Feed],
        pieces: Sequence[NDArray[np.int32]],
    ) -> None:
        engine = self._engine
        for feed in feeds:
            if feed.then is not None:
                engine.set_sampler(feed.session.lane, feed.then)
        runs = [(s.session.lane, np.array([s.due.token], np.int32)) for s in decoding]
        runs += [(f.session.lane, piece) for f, piece in zip(feeds, pieces, strict=True)]
        following = engine.feed_together(runs)
        for s, token in zip(decoding, following, strict=False):
            s.session.tail.fed(s.generation.params, token)
        for feed, token in zip(feeds, following[len(decoding) :], strict=True):
            feed.session.fed(feed.then, token)

    def _decode(self, group: Sequence[_Step]) -> None:
        engine = self._engine
        lanes, tokens = [s.session.lane for s in group], [s.due.token for s in group]
        if not any(s.due.drafts for s in group):
            for s, token in zip(group, engine.decode_together(lanes, tokens), strict=True):
                s.session.tail.fed(s.generation.params, token)
            return
        start = time.perf_counter()
        for lane, token in zip(lanes, tokens, strict=True):
            engine.need_token(lane, token)
        engine.draft_each([(s.session.lane, s.due.drafts) for s in group if s.due.drafts])
        found = engine.verify_each([(s.session.lane, s.due.drafts + 1) for s in group])
        spent = time.perf_counter() - start
        for s, sampled in zip(group, found, strict=True):
            s.session.tail.verified(s.generation.params, s.due.token, sampled)
            s.generation.draft.record(s.due.drafts, len(sampled) - 1, spent)


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What a generation is about to do."""

    generation: Generation
    due: Due

    @property
    def session(self) -> Session:
        return self.generation.session


def _groups(steps: Sequence[_Step], most: int) -> Iterator[Sequence[_Step]]:
    for first in range(0, len(steps), most):
        yield steps[first : first + most]


def _verify_groups(steps: Sequence[_Step], most: int) -> Iterator[Sequence[_Step]]:
    """Those that draft first: who only decodes fills up what rows they leave."""
    group, n_rows = list[_Step](), 0
    for s in sorted(steps, key=lambda s: -s.due.drafts):
        if len(group) == most or n_rows + s.due.drafts + 1 > VERIFY_EACH_ROWS:
            yield group
            group, n_rows = [], 0
        group.append(s)
        n_rows += s.due.drafts + 1
    if group:
        yield group
