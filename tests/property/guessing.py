"""Drafts that agree as often as a test wants: the head of a random model guesses right by chance.

IS: `guessing`, which lets the engine draft and then writes true tokens over some of its guesses,
and the claims that hold on every device. IS NOT: a change of what a verify does: any token may
stand among the drafted ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.capsule.lineage import Lane
from flashrt.core.backend import Graph

Outcome = tuple[list[int], str, bytes]


def outcome(session: flashrt.Session) -> Outcome:
    """Tokens, digest, and the bits of the next logits."""
    return session.tokens.tolist(), session.digest(), session.logits().tobytes()


def cold(engine: flashrt.Engine, tokens: list[int]) -> Outcome:
    """The same after a plain prefill, on a lane of its own."""
    with engine.session() as session:
        session.prefill(tokens)
        return outcome(session)


def check_drafted_run(
    engine: flashrt.Engine,
    prompt: list[int],
    n_tokens: int,
    draft: Any,
    params: dict[str, Any],
    *,
    agree: float,
    is_poisoned: bool,
) -> None:
    """`n_tokens` that are drafted are those of plain decoding, and so is the state after them."""
    following = truth(engine, prompt, n_tokens + 8, **params)
    with pytest.MonkeyPatch.context() as patch, engine.session() as session:
        if is_poisoned:  # what a step leaves in scratch is not used by the next
            patch.setattr(engine, "boundary", engine.arena.poison_scratch)
        session.prefill(prompt)
        with guessing(engine, prompt, following, agree):
            assert list(session.generate(n_tokens, draft=draft, **params)) == following[:n_tokens]
        assert outcome(session) == cold(engine, prompt + following[:n_tokens])


def check_wrong_commit_shows(engine: flashrt.Engine, prompt: list[int]) -> None:
    """Negative control: one row more is committed than what agreed."""
    following = truth(engine, prompt, 3)
    wrong = [following[0], (following[1] + 1) % engine.vocab_size]
    with engine.session() as session:
        session.prefill(prompt)
        next(iter(session.generate(1)))
        engine._write_io(session.lane, "drafted", np.array(wrong, np.int32))
        assert engine.verify(session.lane, 2) == following[1:2]
        engine.commit(session.lane, np.array(following[:2], np.int32))
        assert session.digest() != cold(engine, prompt + following[:2])[1]


def truth(
    engine: flashrt.Engine, history: Sequence[int], n_tokens: int, **params: Any
) -> list[int]:
    """What plain decoding yields after a history, on a lane of its own."""
    room = min(n_tokens, engine.max_positions - len(history))
    with engine.session() as oracle:
        oracle.prefill(history)
        return list(oracle.generate(room, draft=0, **params))


@contextmanager
def guessing(
    engine: flashrt.Engine, history: Sequence[int], following: Sequence[int], agree: float
) -> Iterator[None]:
    """Each drafted token is replaced by the true one with probability `agree`."""
    known = [*history, *following]
    with guessing_each(engine, {lane.index: known for lane in engine.lanes}, agree):
        yield


@contextmanager
def guessing_each(
    engine: flashrt.Engine, known_of: Mapping[int, Sequence[int]], agree: float
) -> Iterator[None]:
    """The same of several lanes: their histories and what follows, by index."""
    rng = np.random.default_rng(sum(map(len, known_of.values())))
    draft, draft_each = type(engine).draft, type(engine).draft_each

    def guess(lane: Lane, n_tokens: int) -> None:
        draft(engine, lane, n_tokens)
        improve(lane, n_tokens)

    def guess_each(drafts: Sequence[tuple[Lane, int]]) -> None:
        draft_each(engine, drafts)
        for lane, n_tokens in drafts:
            improve(lane, n_tokens)

    def improve(lane: Lane, n_tokens: int) -> None:
        known = known_of[lane.index]
        drafted = engine._read_io(lane, "drafted", n_tokens + 1)
        assert drafted[0] == known[lane.position]
        for i in range(1, n_tokens + 1):
            at = lane.position + i
            if at < len(known) and rng.random() < agree:
                drafted[i] = known[at]
        engine._write_io(lane, "drafted", drafted)

    engine.draft = guess  # type: ignore[method-assign]
    engine.draft_each = guess_each  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.draft, engine.draft_each


@contextmanager
def interrupting(engine: flashrt.Engine, after: int, is_done: bool) -> Iterator[None]:
    """KeyboardInterrupt at the replay that follows `after` others; afterwards if it `is_done`."""
    replay, left = engine.backend.replay, after

    def interrupted(graph: Graph, *table: Any) -> None:
        nonlocal left
        left -= 1
        if left == -1 and not is_done:
            raise KeyboardInterrupt
        replay(graph, *table)
        if left == -1:
            raise KeyboardInterrupt

    engine.backend.replay = interrupted  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.backend.replay = replay  # type: ignore[method-assign]
