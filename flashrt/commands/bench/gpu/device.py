"""Device times at growing positions: a decoded token, a prefill launch, each way to move a capsule.

IS: one sweep over the lengths, all by events on the device's stream with cold caches, each move
beside a plain device copy of the bytes that it moved. IS NOT: what a user of the session waits for;
measure takes that by the host's clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from flashrt.backends.cuda.clock import DeviceClock
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import Lane
from flashrt.commands.bench.gpu.engine import Probe, SyntheticEngine
from flashrt.commands.bench.measure import TURN
from flashrt.commands.timing import Tokens, synthetic_tokens
from flashrt.core.graph import GraphKey
from flashrt.core.runs import Run
from flashrt.models.model import DECODE, PREFILL
from flashrt.ops.cursor import CursorWord
from flashrt.session.session import Session

DECODE_REPLAYS = 8  # back to back, between two events
AHEAD = 96  # a rollback to a boundary comes back from so many tokens later


@dataclass(frozen=True, slots=True)
class Move:
    """Medians of one kind of copy; `plain_us` is a device copy of the same bytes in one piece."""

    nbytes: int
    us: float
    plain_us: float


@dataclass(frozen=True, slots=True)
class DeviceAtLength:
    """Device times at one position."""

    tokens: int
    decode_us: float  # per token, of DECODE_REPLAYS in a row
    prefill_us: float  # of one launch of `prefill_rows` rows that begins here
    prefill_rows: int
    snapshot: Move
    restore: Move
    restore_ancestor: Move
    rollback: Move  # to a boundary, AHEAD tokens back
    is_exact: bool


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One row of the per-kernel table: per launch of the op, of all its kernels."""

    phase: str
    rows: int
    op: str
    dims: dict[str, int]
    launches: int  # in a replay of the phase
    us: float
    nbytes: int
    flop: int
    is_warm: bool  # it ran on what it had just run on


class DeviceBench:
    """Lane 0 grows; lane 1 receives whole restores."""

    def __init__(self, made: SyntheticEngine, clock: DeviceClock, repeats: int) -> None:
        """The engine must have no sessions yet."""
        self.made, self.clock, self.repeats = made, clock, repeats
        self.engine = made.engine
        self.main = self.engine.session()
        self.lane: Lane = self.engine.lanes[0]
        self.random = np.random.default_rng(1)
        self.turn = self._tokens(TURN)
        self._seed(8)  # wakes clocks, loads what is loaded at first use
        for _ in range(3):
            self._replay(DECODE, 1, 8, 4)
        self.main.rollback(0)

    # -- positions ------------------------------------------------------------------------------

    def at_length(self, n_tokens: int) -> DeviceAtLength:
        """Go on to a length, measure there, leave the session there."""
        self._seed(n_tokens)
        capsule, snapshot = self._snapshot()
        digest = capsule.digest
        ancestor, ancestor_bytes = self._moves(
            self.main, lambda: self.main.prefill(self.turn), lambda: self.main.restore(capsule)
        )
        ahead = self._tokens(AHEAD)
        back, back_bytes = self._moves(
            self.main, lambda: self.main.prefill(ahead), lambda: self.main.rollback(n_tokens)
        )
        is_exact = self.main.digest() == digest
        whole, whole_bytes, is_same = self._restore_elsewhere(capsule)
        decode_us = self._replay(DECODE, 1, n_tokens, DECODE_REPLAYS) / DECODE_REPLAYS
        rows = self.engine.model.buckets[-1]
        prefill_us = self._replay(PREFILL, rows, n_tokens, 1)
        self.main.restore(capsule)
        capsule.drop()
        return DeviceAtLength(
            n_tokens, decode_us, prefill_us, rows, snapshot, self._move(whole_bytes, whole),
            self._move(ancestor_bytes, ancestor), self._move(back_bytes, back),
            is_exact and is_same,
        )  # fmt: skip

    def _seed(self, n_tokens: int) -> None:
        self.main.prefill(self._tokens(n_tokens - self.main.position))
        next(self.main.generate(1))  # a token for decode to begin with
        self.main.rollback(n_tokens)

    def _snapshot(self) -> tuple[Capsule, Move]:
        """Whole ones: each is dropped before the next."""
        made: list[Capsule] = []
        samples, moved = [], 0
        for _ in range(self.repeats):
            before = self._copied_bytes()
            samples.append(self.clock.time_us(partial(self._keep, made)))
            moved = self._copied_bytes() - before
            made.pop().drop()
        return self.main.snapshot(), self._move(moved, statistics.median(samples))

    def _keep(self, made: list[Capsule]) -> None:
        made.append(self.main.snapshot())

    def _restore_elsewhere(self, capsule: Capsule) -> tuple[float, int, bool]:
        with self.engine.session() as other:

            def leave() -> None:
                other.rollback(0)
                other.prefill(self.turn)

            us, moved = self._moves(other, leave, lambda: other.restore(capsule))
            return us, moved, other.digest() == capsule.digest

    def _moves(
        self, session: Session, leave: Callable[[], object], come_back: Callable[[], object]
    ) -> tuple[float, int]:
        """Median us and bytes of `come_back`, from where `leave` went."""
        samples, moved = [], 0
        for _ in range(self.repeats):
            leave()
            self.engine.backend.sync()
            before = self._copied_bytes()
            samples.append(self.clock.time_us(come_back))
            moved = self._copied_bytes() - before
        return statistics.median(samples), moved

    def _move(self, nbytes: int, us: float) -> Move:
        gpu, base = self.made.gpu, self.made.buffers.address
        copy = partial(
            gpu.driver.copy_on_device, base + self.made.buffer_bytes, base, nbytes, gpu.stream
        )
        return Move(nbytes, us, self.clock.median_us(copy, self.repeats))

    # -- graphs ---------------------------------------------------------------------------------

    def _replay(self, phase: str, rows: int, position: int, times: int) -> float:
        """Median us of `times` replays in a row that begin at a position; the state is lost."""
        key, runs = GraphKey(phase, rows), (Run(self.lane.index, rows),)

        def replays() -> None:
            for _ in range(times):
                self.engine.graphs.replay(key, runs)

        samples = []
        for _ in range(self.repeats):
            self._place(position, rows)
            samples.append(self.clock.time_us(replays))
        self.engine.forget_host_view(self.lane)
        return statistics.median(samples)

    def kernels(self, position: int) -> list[KernelTime]:
        """Each op of a decode and of the widest prefill, at a position; the state is lost."""
        rows = []
        for probe in self.made.probes:
            samples = []
            for _ in range(self.repeats):
                self._place(position, probe.rows)
                samples.append(self.clock.time_us(partial(self.made.gpu.replay, probe.graph)))
            rows.append(self._kernel_time(probe, position, statistics.median(samples)))
        self.engine.forget_host_view(self.lane)
        self.main.rollback(0)
        return rows

    def _kernel_time(self, probe: Probe, position: int, graph_us: float) -> KernelTime:
        work = self.made.work(probe, position)
        return KernelTime(
            probe.phase, probe.rows, probe.op, probe.dims, probe.n_in_tape,
            graph_us / (probe.n_in_tape * probe.repeats), work.nbytes, work.flop, probe.repeats > 1,
        )  # fmt: skip

    def _place(self, position: int, rows: int) -> None:
        words = {CursorWord.POSITION: position, CursorWord.ROWS: rows, CursorWord.TOKEN: 1}
        for word, value in words.items():
            self.engine.write_cursor(self.lane, word, value)

    # -- tools ----------------------------------------------------------------------------------

    def _copied_bytes(self) -> int:
        return self.engine.backend.counters.copied_bytes

    def _tokens(self, count: int) -> Tokens:
        return synthetic_tokens(self.random, self.engine.vocab_size, count)
