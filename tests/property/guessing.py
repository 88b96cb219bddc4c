"""Drafts that agree as often as a test wants: the head of a random model guesses right by chance.

IS: `guessing`, which lets the engine draft and then writes true tokens over some of its guesses.
IS NOT: a change of what a verify does: any token may stand among the drafted ones. Called by:
test_machine, test_drafting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import flashrt
from flashrt.core.backend import Graph
from flashrt.core.lineage import Lane


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
    known, rng = [*history, *following], np.random.default_rng(len(history))
    draft = type(engine).draft

    def guess(lane: Lane, n_tokens: int) -> None:
        draft(engine, lane, n_tokens)
        drafted = engine._read_io(lane, "drafted", n_tokens + 1)
        assert drafted[0] == known[lane.position]
        for i in range(1, n_tokens + 1):
            at = lane.position + i
            if at < len(known) and rng.random() < agree:
                drafted[i] = known[at]
        engine._write_io(lane, "drafted", drafted)

    engine.draft = guess  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.draft


@contextmanager
def interrupting(engine: flashrt.Engine, after: int, is_done: bool) -> Iterator[None]:
    """KeyboardInterrupt at the replay that follows `after` others; afterwards if it `is_done`."""
    replay, left = engine.backend.replay, after

    def interrupted(graph: Graph) -> None:
        nonlocal left
        left -= 1
        if left == -1 and not is_done:
            raise KeyboardInterrupt
        replay(graph)
        if left == -1:
            raise KeyboardInterrupt

    engine.backend.replay = interrupted  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.backend.replay = replay  # type: ignore[method-assign]
