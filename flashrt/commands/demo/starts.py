"""Time to first token of a turn after prompts of several lengths, cold and warm.

IS: the measurement, with the states compared. IS NOT: a benchmark (bench).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flashrt.capsule.capsule import Capsule
from flashrt.commands.demo.findings import Start
from flashrt.commands.timing import Tokens, prefill, timed
from flashrt.core.backend import Progress
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session

REPEATS = 3  # of a warm start; the median counts


@dataclass(frozen=True, slots=True)
class State:
    """What two sessions are compared by: the bits of the next logits, and the digest."""

    position: int
    logits: bytes
    digest: str


def state_of(session: Session) -> State:
    """The state of a session at its boundary."""
    return State(session.position, session.logits().tobytes(), session.digest())


def measure_starts(
    engine: SessionEngine, prompt: Tokens, lengths: Sequence[int], turn: Tokens, progress: Progress
) -> list[Start]:
    """One Start per length, ascending; needs two free lanes. The prompt is cut at each length."""
    starts = []
    with engine.session() as main:
        for length in sorted(lengths):
            main.prefill(prompt[main.position : length])
            capsule = main.snapshot()
            starts.append(_start(engine, capsule, turn, progress))
            capsule.drop()
    return starts


def _start(engine: SessionEngine, capsule: Capsule, turn: Tokens, progress: Progress) -> Start:
    tokens = capsule.tokens
    with engine.session() as cold:
        started = time.perf_counter()
        prefill(engine, cold, tokens, progress, f"cold start at {len(tokens):,}")
        cold.prefill(turn)
        next(cold.generate(1))
        cold_s = time.perf_counter() - started
        truth = state_of(cold)
    runs = [_warm(engine, capsule, turn) for _ in range(REPEATS)]
    return Start(
        tokens=len(tokens),
        cold_s=cold_s,
        restore_s=statistics.median(restore_s for restore_s, _, _, _ in runs),
        restore_bytes=runs[0][2],
        warm_s=statistics.median(warm_s for _, warm_s, _, _ in runs),
        is_equal=all(state == truth for _, _, _, state in runs),
    )


def _warm(engine: SessionEngine, capsule: Capsule, turn: Tokens) -> tuple[float, float, int, State]:
    """A restore into a lane that holds something else: all bytes move. Then turn and token."""
    with engine.session() as other:
        other.prefill(turn[::-1])
        started = time.perf_counter()
        _, restore_s, moved = timed(engine, lambda: other.restore(capsule))
        other.prefill(turn)
        next(other.generate(1))
        warm_s = time.perf_counter() - started
        return restore_s, warm_s, moved, state_of(other)
