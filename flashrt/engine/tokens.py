"""The engine: a model, its weights and a backend; planned, loaded, captured and sealed.

IS: the verbs on lanes (prefill, decode, sample, draft, verify, commit), a graph replay each. IS
NOT: sessions, policy or files of capsules; see session/. Called by: session.

Per step: write io -> replay(key) -> read io -> commit. After `seal` nothing allocates, compiles or
captures. An interrupt between replay and commit leaves the device ahead: see `recover`.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base import tracing
from flashrt.base.errors import PlanError
from flashrt.base.flags import flags
from flashrt.capsule.lineage import Lane
from flashrt.capsule.table import CapsuleTable
from flashrt.core.arena import Arena
from flashrt.core.backend import Backend, Bytes, Progress
from flashrt.core.graph import GraphKey, GraphTable
from flashrt.core.op import Op
from flashrt.core.planner import ArenaPlan, Band, plan_arena, plan_band
from flashrt.core.region import Region, Role
from flashrt.core.tape import Tape
from flashrt.models import Model
from flashrt.ops import OPS
from flashrt.ops.sample import SamplerParams
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.loader import LoadReport, fill_weights

PREFILL, DECODE, SAMPLE = "prefill", "decode", "sample"
DRAFT, DRAFT_NEXT, VERIFY, COMMIT = "draft", "draft_next", "verify", "commit"
_POSITION_WORD, _ROWS_WORD, _TOKEN_WORD = 0, 1, 2
DEFAULT_POOL_FIXED = 16  # capsules' fixed bands that a default pool has room for
DEFAULT_POOL_LANES = 2  # lanes' worth of rows that a default pool has room for, besides


@dataclass(slots=True)
class DraftCounters:
    """What drafting has come to since loading; each verify also yields one token undrafted."""

    verifies: int = 0
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Verbs on lanes. Built by `session.load.load`, which also chooses the backend."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        lanes: int,
        pool_bytes: int | None,
        progress: Progress | None = None,
    ) -> None:
        """Plan, allocate, load, capture, seal. Raises FlashrtError from any of these."""
        self.model = model
        self.backend = backend
        self.checkpoint = checkpoint
        self.max_positions = _max_positions(model)
        tapes = [model.record(phase, rows) for phase, rows in model.phases]
        backend.build(_with_own_ops(tapes))
        plan = self._plan(tapes, lanes, pool_bytes)
        weights = plan_band([r.region for r in model.weights], backend.storage)
        self.arena = Arena(backend, plan, weights)
        self.load_report = fill_weights(model.weights, checkpoint, self.arena, progress)
        self.fingerprint = _fingerprint(model, self.load_report, backend, plan, tapes)
        self.lanes = [
            Lane(i, np.zeros(self.max_positions, np.int32)) for i in range(len(plan.lanes))
        ]
        self.capsules = CapsuleTable(self.arena, self.lanes, self.fingerprint)
        self.graphs = GraphTable(backend, self.arena)
        self._tapes = {(t.phase, t.rows): t for t in tapes}
        self._capture(tapes, progress)
        self._rows: list[int] = [-1] * lanes  # rows word in each lane's cursor; -1 = unknown
        self._sampler: list[SamplerParams | None] = [None] * lanes
        self._in_flight: dict[int, NDArray[np.int32]] = {}  # by lane: what its replay commits
        self.draft_counters = DraftCounters()
        self._commit_rows = max(
            (rows for phase, rows in model.phases if phase == COMMIT), default=0
        )
        self.graphs.seal()
        backend.seal()
        tracing.trace(tracing.PLAN, f"{self.stats()}")

    @property
    def device(self) -> str:
        """Name of the backend."""
        return self.backend.name

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.model.vocab_size

    @property
    def max_draft(self) -> int:
        """The longest draft; 0 without a draft head."""
        return max((rows for phase, rows in self.model.phases if phase == VERIFY), default=1) - 1

    # -- verbs ----------------------------------------------------------------------------------

    def chunks(self, n_tokens: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of the launches that prefill n tokens: largest bucket first."""
        widest = self.model.buckets[-1]
        for start in range(0, n_tokens, widest):
            yield start, min(start + widest, n_tokens)

    def prefill(self, lane: Lane, tokens: NDArray[np.int32], bucket: int | None = None) -> None:
        """One replay over at most the largest bucket of rows, then commit.

        `bucket` asks for a larger bucket than needed: the bits do not depend on it.
        """
        n = len(tokens)
        rows = bucket or next(b for b in self.model.buckets if b >= n)
        self._write_io(lane, "tokens", tokens)
        self._replay_commit(PREFILL, rows, lane, tokens)

    def decode(self, lane: Lane, token: int) -> int:
        """Feed the token sampled last (it is on the device), commit it, sample the next."""
        self._replay_commit(DECODE, 1, lane, np.array([token], np.int32))
        return self._read_token(lane)

    def sample(self, lane: Lane, params: SamplerParams) -> int:
        """Logits of the present boundary, and a token sampled from them."""
        self.set_sampler(lane, params)
        self._set_rows(lane, 1)  # kernels take the rows of a launch from the cursor
        self._replay(SAMPLE, 1, lane)
        return self._read_token(lane)

    def draft(self, lane: Lane, n_tokens: int) -> None:
        """Guess what follows the token sampled last (it is on the device), n tokens ahead.

        Leaves nothing but guesses: the state is as before. n_tokens is in [1, max_draft], and
        position + n_tokens within max_positions.
        """
        for i in range(n_tokens):
            self._replay(DRAFT_NEXT if i else DRAFT, 1, lane)
            self._boundary()

    def verify(self, lane: Lane, rows: int) -> list[int]:
        """The token sampled last and rows - 1 drafted ones through the model; state as before.

        Returns the tokens that decoding would have sampled after each row, up to the first that
        differs from what was drafted, that one included: so at least one, and `commit` may take as
        many rows as there are tokens.
        """
        bucket = min(r for phase, r in self.model.phases if phase == VERIFY and r >= rows)
        self._set_rows(lane, rows)
        self._replay(VERIFY, bucket, lane)
        verdict = self._read_io(lane, "verdict", rows + 1)
        n = int(verdict[0])
        self.draft_counters.verifies += 1
        self.draft_counters.drafted += rows - 1
        self.draft_counters.accepted += n - 1
        self._boundary()
        return [int(token) for token in verdict[1 : n + 1]]

    def commit(self, lane: Lane, tokens: NDArray[np.int32]) -> None:
        """The first rows of the last verify, which were for `tokens`, become state."""
        self._replay_commit(COMMIT, self._commit_rows, lane, tokens)

    def recover(self, lane: Lane) -> None:
        """After an interrupt: if a replay was finished on the device but not committed by the host,
        commit it.
        """
        tokens = self._in_flight.pop(lane.index, None)
        if tokens is not None:
            self._rows[lane.index] = -1
            if self._read_cursor(lane, _POSITION_WORD) == lane.position + len(tokens):
                lane.commit(tokens)

    def set_sampler(self, lane: Lane, params: SamplerParams) -> None:
        """Write the sampler's parameters into the lane."""
        if self._sampler[lane.index] == params:
            return
        self._sampler[lane.index] = None  # until both are written
        for name, data in (("sampler", params.pack()), ("bias", params.pack_bias())):
            slot = self.arena.lane(lane.index).fixed.slot(name)
            address = self.arena.memory.address + slot.offset
            self.backend.write(address, np.frombuffer(data, np.uint8))
        self._sampler[lane.index] = params

    def logits(self, lane: Lane) -> NDArray[np.float32]:
        """The logits region, [vocab_size]: of the last decode or sample."""
        array = self.arena.read(self.arena.lane(lane.index).io.slot("logits"))
        return np.asarray(array, np.float32).reshape(-1)

    def verify_logits(self, lane: Lane, row: int) -> NDArray[np.float32]:
        """Logits after one row of the last verify, [vocab_size]."""
        array = self._read_io(lane, "verify_logits", self.vocab_size, row * self.vocab_size)
        return array.view(np.float32)

    def forget_host_view(self, lane: Lane) -> None:
        """After a restore, cursor and sampler are not what the host wrote last."""
        self._rows[lane.index] = -1
        self._sampler[lane.index] = None
        self._in_flight.pop(lane.index, None)

    # -- white box ------------------------------------------------------------------------------

    def lane_array(self, lane: Lane, name: str) -> NDArray[np.generic]:
        """A lane's region as a logical array (bfloat16 as uint16 bits)."""
        return self.arena.read(self.arena.lane(lane.index).slot(name))

    def poison_lane(self, lane: Lane) -> None:
        """0xFF over a lane: nothing of it may be used before a restore brings it all back."""
        self.arena.poison_lane(lane.index)
        lane.hold(None, 0)
        self.forget_host_view(lane)

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, in bytes."""
        plan, pool = self.arena.plan, self.capsules.pool
        return {
            **dataclasses.asdict(self.backend.counters),
            **dataclasses.asdict(self.draft_counters),
            "mean_accepted": self.draft_counters.accepted / max(1, self.draft_counters.verifies),
            "device": self.device,
            "graphs": len(self.graphs.graphs),
            "lanes": len(self.lanes),
            "arena_bytes": plan.nbytes,
            "weights_bytes": self.arena.weights.nbytes,
            "fixed_bytes": plan.lanes[0].fixed.nbytes,
            "rows_bytes": plan.lanes[0].rows.nbytes,
            "scratch_bytes": plan.scratch.nbytes,
            "pool_bytes": pool.nbytes,
            "pool_used_bytes": pool.used_nbytes,
            "capsules": len(self.capsules.capsules),
        }

    def close(self) -> None:
        """Give the device's memory back; sessions and capsules are dead."""
        self.backend.close()

    # -- inside ---------------------------------------------------------------------------------

    def _plan(self, tapes: Sequence[Tape], lanes: int, pool_bytes: int | None) -> ArenaPlan:
        if lanes < 1:
            raise PlanError(f"lanes={lanes}; at least 1 is needed")
        regions, storage = self.model.lane_regions, self.backend.storage
        if pool_bytes is None:
            fixed, rows = (
                plan_band([r for r in regions if r.role is role], storage).nbytes
                for role in (Role.FIXED, Role.ROWS)
            )
            pool_bytes = DEFAULT_POOL_FIXED * fixed + DEFAULT_POOL_LANES * rows
        return plan_arena(regions, tapes, storage, lanes=lanes, pool_nbytes=pool_bytes)

    def _capture(self, tapes: Sequence[Tape], progress: Progress | None) -> None:
        total = len(tapes) * len(self.lanes)
        for i, (lane, tape) in enumerate((lane, t) for lane in self.lanes for t in tapes):
            self.graphs.capture(tape, lane.index)
            if progress is not None:
                progress("graphs", i + 1, total)

    def _replay(self, phase: str, rows: int, lane: Lane) -> None:
        if tracing.is_on(tracing.LAUNCHES):
            self._replay_traced(phase, rows, lane)
        else:
            self.graphs.replay(GraphKey(phase, rows, lane.index))

    def _replay_traced(self, phase: str, rows: int, lane: Lane) -> None:
        """Launch by launch, with microseconds: where a replay spends its time."""
        for i, bound in enumerate(self.arena.bind(self._tapes[phase, rows], lane.index)):
            start = time.perf_counter()
            self.backend.eager([bound])
            self.backend.sync()
            spent_us = (time.perf_counter() - start) * 1e6
            op, dims = bound.launch.op.name, dict(bound.launch.dims)
            tracing.trace(
                tracing.LAUNCHES, f"{phase}/{rows} {i:4d} {op:14s} {spent_us:9.1f} us {dims}"
            )

    def _boundary(self) -> None:
        if flags().poison:
            self.arena.poison_scratch()

    def _replay_commit(self, phase: str, rows: int, lane: Lane, tokens: NDArray[np.int32]) -> None:
        """A replay after which the tokens are history, on the device and here."""
        self._in_flight[lane.index] = tokens
        self._set_rows(lane, len(tokens))
        self._replay(phase, rows, lane)
        lane.commit(tokens)
        self._in_flight.pop(lane.index, None)
        self._boundary()

    def _read_io(self, lane: Lane, name: str, words: int, first: int = 0) -> NDArray[np.int32]:
        slot = self.arena.lane(lane.index).io.slot(name)
        out = np.empty(words, np.int32)
        address = self.arena.memory.address + slot.offset + 4 * first
        self.backend.read(address, out.view(np.uint8))
        return out

    def _write_io(self, lane: Lane, name: str, array: NDArray[np.int32]) -> None:
        slot = self.arena.lane(lane.index).io.slot(name)
        data = np.ascontiguousarray(array).view(np.uint8)
        self.backend.write(self.arena.memory.address + slot.offset, data)

    def _cursor_address(self, lane: Lane, word: int) -> int:
        slot = self.arena.lane(lane.index).fixed.slot("cursor")
        return self.arena.memory.address + slot.offset + 4 * word

    def _set_rows(self, lane: Lane, rows: int) -> None:
        if self._rows[lane.index] != rows:
            self._rows[lane.index] = -1  # until it is written
            self.write_cursor(lane, _ROWS_WORD, rows)
            self._rows[lane.index] = rows

    def write_cursor(self, lane: Lane, word: int, value: int) -> None:
        """One word of a lane's cursor."""
        data = np.frombuffer(struct.pack("@i", value), np.uint8)
        self.backend.write(self._cursor_address(lane, word), data)

    def _read_token(self, lane: Lane) -> int:
        return self._read_cursor(lane, _TOKEN_WORD)

    def _read_cursor(self, lane: Lane, word: int) -> int:
        out: Bytes = np.empty(4, np.uint8)
        self.backend.read(self._cursor_address(lane, word), out)
        return int(out.view(np.int32)[0])


def _with_own_ops(tapes: Sequence[Tape]) -> tuple[Op, ...]:
    """The table of ops, and ops outside it that a model records: kernels of the user's own."""
    recorded = dict.fromkeys(launch.op for tape in tapes for launch in tape.launches)
    return (*OPS, *(op for op in recorded if op not in OPS))


def _max_positions(model: Model) -> int:
    return next(r.shape[1] for r in model.lane_regions if r.role is Role.ROWS)


def _fingerprint(
    model: Model, report: LoadReport, backend: Backend, plan: ArenaPlan, tapes: Sequence[Tape]
) -> str:
    """Identity of weights + config + kernels + what capsules look like; 32 hex digits.

    Context length and lane count are not part of it: a capsule fits wherever its position does.
    """
    rows = plan.lanes[0].rows.slots
    described: Mapping[str, object] = {
        "format": 1,
        "model": model.name,
        "weights": report.digest,
        "constants": [r.constant for r in model.weights if r.constant],
        "launches": [
            (la.op.name, la.attrs) for t in tapes if t.phase == DECODE for la in t.launches
        ],
        "kernels": backend.kernel_digest,
        "device": backend.name,
        "act": backend.act,
        "fixed": [_describe(s.region) for s in plan.lanes[0].fixed.slots],
        "rows": [(_describe(s.region)[0::2], s.storage.row_nbytes) for s in rows],
    }
    return xxhash.xxh3_128(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _describe(region: Region) -> tuple[str, tuple[int, ...], str, str]:
    return region.name, region.shape, str(region.dtype), str(region.layout)


__all__ = ["DECODE", "PREFILL", "SAMPLE", "Band", "Engine", "SamplerParams"]
