"""The measurements of `flashrt bench`: one pass over growing lengths, and what is done at each.

IS: clocks around public session calls, limits measured in between. IS NOT: statistics or tables
(report).

A prefill to length n is timed as the sum of its pieces on the way to longer ones: the work and the
bits are the same, and nothing is prefilled twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from flashrt.backends.cpu.limits import MemcpyLimit
from flashrt.capsule.capsule import Capsule
from flashrt.commands.timing import Tokens, prefill, synthetic_tokens, timed
from flashrt.core.backend import Progress
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session

TURN = 32  # tokens of the turn of a warm start
REPLY, SHORT_TURN = 8, 16  # tokens of a reply, and of the user's turn after it
AHEAD, BACK = 96, 59  # a rollback goes this far back of that many tokens
DECODE_TOKENS, DECODE_S, DECODE_MIN = 128, 6.0, 24  # at each position: as many, at most so long


@dataclass(slots=True)
class AtLength:
    """Samples at one context length. Lists of seconds; bytes moved by one of the operation."""

    tokens: int
    prefill_s: list[float] = field(default_factory=list)
    ttft_cold_s: list[float] = field(default_factory=list)
    ttft_warm_s: list[float] = field(default_factory=list)
    ttft_turn_s: list[float] = field(default_factory=list)  # of a turn after a reply
    inter_token_s: list[float] = field(default_factory=list)
    snapshot_s: list[float] = field(default_factory=list)
    snapshot_bytes: int = 0
    snapshot_turn_s: list[float] = field(default_factory=list)
    snapshot_turn_bytes: int = 0
    restore_s: list[float] = field(default_factory=list)
    restore_bytes: int = 0
    memcpy_s: list[float] = field(default_factory=list)  # of restore_bytes; empty without a limit
    restore_ancestor_s: list[float] = field(default_factory=list)
    restore_ancestor_bytes: int = 0
    rollback_s: list[float] = field(default_factory=list)
    is_exact: bool = True  # digest after each kind of return, against the one before


class Bench:
    """Two lanes: `main` grows; the other holds something else and receives full restores."""

    def __init__(
        self,
        engine: SessionEngine,
        repeats: int,
        progress: Progress,
        memcpy: Callable[[int], MemcpyLimit | None],
    ) -> None:
        self.engine = engine
        self.memcpy = memcpy
        self.repeats = repeats
        self.progress = progress
        self.random = np.random.default_rng(0)
        self.main = engine.session()
        self.turn = self._tokens(TURN)

    def run(self, lengths: list[int], between: Callable[[Tokens], None]) -> list[AtLength]:
        """All measurements; `between` is called with the prompt after each length of
        each repeat."""
        prompt = self._tokens(max(lengths))
        found = [AtLength(n) for n in sorted(lengths)]
        self._warm_up()
        for repeat in range(self.repeats):
            self.main.rollback(0)
            elapsed = 0.0
            for at in found:
                what = f"prefill to {at.tokens:,}, run {repeat + 1} of {self.repeats}"
                piece = prompt[self.main.position : at.tokens]
                elapsed += prefill(self.engine, self.main, piece, self.progress, what)
                at.prefill_s.append(elapsed)
                capsule = self._snapshot(at) if repeat == 0 else self.main.snapshot()
                at.ttft_cold_s.append(elapsed + first_token_s(self.main, self.turn))
                if repeat == 0:
                    self._measure_at(at, capsule)
                between(prompt[: at.tokens])
                self.main.restore(capsule)
                capsule.drop()
        return found

    def _measure_at(self, at: AtLength, capsule: Capsule) -> None:
        digest = capsule.digest
        parts = (
            ("decode", self._decode),
            ("a turn after a reply", self._turn_after_reply),
            ("restore an ancestor", self._ancestor),
            ("snapshot of a turn", self._snapshot_turn),
            ("roll back", self._rollback),
            ("restore", self._restore),
        )
        for i, (what, part) in enumerate(parts):
            self.progress(f"{what} at {at.tokens:,}", i, len(parts))
            self.main.restore(capsule)
            at.is_exact &= self.main.digest() == digest
            part(at, capsule)
            self.progress(f"{what} at {at.tokens:,}", len(parts), len(parts))

    # -- at one length --------------------------------------------------------------------------

    def _snapshot(self, at: AtLength) -> Capsule:
        """Full ones: nothing below is stored, since each is dropped before the next."""
        for _ in range(self.repeats + 2):
            capsule, seconds, moved = timed(self.engine, self.main.snapshot)
            at.snapshot_s.append(seconds)
            at.snapshot_bytes = moved
            capsule.drop()
        return self.main.snapshot()

    def _decode(self, at: AtLength, _: Capsule) -> None:
        tokens = self.main.generate(DECODE_TOKENS + 1)
        next(tokens)  # samples from the restored state: no decode
        begun = before = time.perf_counter()
        for _token in tokens:
            now = time.perf_counter()
            at.inter_token_s.append(now - before)
            before = now
            if now - begun > DECODE_S and len(at.inter_token_s) >= DECODE_MIN:
                break

    def _turn_after_reply(self, at: AtLength, capsule: Capsule) -> None:
        """The last token of a reply is sampled and not yet fed: the turn has to carry it too."""
        for _ in range(2 * self.repeats + 1):
            self.main.restore(capsule)
            for _token in self.main.generate(REPLY):
                pass
            self.engine.backend.sync()
            at.ttft_turn_s.append(first_token_s(self.main, self.turn[:SHORT_TURN]))

    def _ancestor(self, at: AtLength, capsule: Capsule) -> None:
        for _ in range(3 * self.repeats):
            self.main.prefill(self.turn)
            _, seconds, moved = timed(self.engine, lambda: self.main.restore(capsule))
            at.restore_ancestor_s.append(seconds)
            at.restore_ancestor_bytes = moved

    def _snapshot_turn(self, at: AtLength, capsule: Capsule) -> None:
        for _ in range(self.repeats):
            self.main.restore(capsule)
            self.main.prefill(self.turn)
            child, seconds, moved = timed(self.engine, self.main.snapshot)
            at.snapshot_turn_s.append(seconds)
            at.snapshot_turn_bytes = moved
            child.drop()

    def _rollback(self, at: AtLength, capsule: Capsule) -> None:
        ahead = self._tokens(AHEAD)
        for _ in range(self.repeats):
            self.main.restore(capsule)
            self.main.prefill(ahead)
            target = self.main.position - BACK
            _, seconds, _ = timed(self.engine, partial(self.main.rollback, target))
            at.rollback_s.append(seconds)

    def _restore(self, at: AtLength, capsule: Capsule) -> None:
        """Into a lane that holds something else: all bytes move. Then turn and first token."""
        with self.engine.session() as other:
            memcpy: MemcpyLimit | None = None
            for _ in range(2 * self.repeats + 1):
                other.rollback(0)
                other.prefill(self.turn[::-1])
                started = time.perf_counter()
                _, seconds, moved = timed(self.engine, lambda: other.restore(capsule))
                at.restore_s.append(seconds)
                first_token_s(other, self.turn)
                at.ttft_warm_s.append(time.perf_counter() - started)
                at.restore_bytes = moved
                memcpy = memcpy or self.memcpy(moved)
                if memcpy is not None:
                    other.prefill(self.turn)  # something between, as before a restore
                    at.memcpy_s.append(memcpy.seconds())
            if memcpy is not None:
                memcpy.close()
            other.restore(capsule)
            at.is_exact &= other.digest() == capsule.digest

    # -- tools ----------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        self.main.prefill(self._tokens(256))
        list(self.main.generate(4))

    def _tokens(self, count: int) -> Tokens:
        return synthetic_tokens(self.random, self.engine.vocab_size, count)


def first_token_s(session: Session, turn: Tokens) -> float:
    """Time to first token: seconds of a turn's prefill, and of the first token after it."""
    started = time.perf_counter()
    session.prefill(turn)
    next(session.generate(1))
    return time.perf_counter() - started
