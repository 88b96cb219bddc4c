"""`flashrt bench`: speed beside this machine's own limits, all measured in one run.

IS: which lengths; measurements to one document, shown as tables, JSON and a plot. IS NOT: the
measurements (measure), the tables (report), or which model and what every bench says about a run
(document).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.cpu.limits import CpuLimits, MemcpyLimit
from flashrt.base.errors import FlashrtError
from flashrt.base.flags import thread_count
from flashrt.commands import console
from flashrt.commands.bench.document import (
    BenchOptions,
    check_outputs,
    checkpoint_of,
    deliver,
    of_engine,
    opening,
)
from flashrt.commands.bench.measure import (
    AHEAD,
    BACK,
    REPLY,
    SHORT_TURN,
    TURN,
    AtLength,
    Bench,
)
from flashrt.commands.bench.peer import LlamaCpp, peer_of, turn_of
from flashrt.commands.bench.report import show_session
from flashrt.commands.checkpoints import open_engine
from flashrt.commands.timing import Tokens
from flashrt.models.model import DECODE, PREFILL
from flashrt.ops.work import flop_of, streamed_bytes
from flashrt.session.engine import SessionEngine
from flashrt.view.bench_plot import plot

LENGTHS = {"tiny": [256, 1024], "mini": [512, 2048, 8192, 16384], "0.8b": [512, 2048]}
CHECKPOINT_LENGTHS = [512, 2048]
_ROOM = 256  # positions beyond the longest prompt, for turns and decoding
_BIG_COPY_NBYTES = 128 << 20  # far beyond any cache


def bench(options: BenchOptions, json_path: Path | None, plot_path: Path | None) -> int:
    """The command. Returns 1 if a restored state was not the one that was saved."""
    check_outputs(json_path, plot_path)
    started = time.perf_counter()
    facts = opening(options)
    path = checkpoint_of(options)
    lengths = options.lengths or options.by_shape(LENGTHS, CHECKPOINT_LENGTHS)
    room = replace(options.engine, max_positions=max(lengths) + _ROOM, lanes=2)
    engine = open_engine(path, room)
    limits, peer = _Limits(engine), _peer(path, room.max_positions)

    def between(prompt: Tokens) -> None:
        limits.measure()
        if peer is not None:
            progress(f"llama.cpp at {len(prompt):,}", 0, 1)
            peer.measure(prompt, turn_of(prompt, TURN))
            progress(f"llama.cpp at {len(prompt):,}", 1, 1)

    with console.progress_bars() as progress:
        limits.measure()
        rows = Bench(engine, options.repeats, progress, limits.memcpy).run(lengths, between)
    document = _document(facts, engine, limits, rows)
    document["peer"] = None if peer is None else peer.close()
    document["seconds"] = time.perf_counter() - started
    engine.close()
    deliver(document, json_path, show_session, plot_path, plot)
    return 0 if all(row.is_exact for row in rows) else 1


def _peer(model: Path, positions: int) -> LlamaCpp | None:
    """One that does not come up is said, and left out."""
    try:
        return peer_of(model, positions, thread_count())
    except FlashrtError as error:
        console.complain(f"note: {error}")
        return None


class _Limits:
    """Samples of what the machine can do, taken in between; none on a device without measures."""

    def __init__(self, engine: SessionEngine) -> None:
        backend = engine.backend
        self.engine = engine
        self.cpu: CpuLimits | None = backend.limits() if isinstance(backend, CpuDevice) else None
        self.streamed_bytes = streamed_bytes(engine.model.record(DECODE, 1), backend)
        self.fma_flops: list[float] = []
        self.stream_s: list[float] = []
        self.copy_s: list[float] = []

    def measure(self) -> None:
        """One sample of each."""
        if self.cpu is None:
            return
        self.fma_flops.append(self.cpu.fma_flops())
        weights = self.engine.arena.weight_memory.address
        for _ in range(5):
            self.stream_s.append(self.cpu.read_seconds(weights, self.streamed_bytes))
        if not self.copy_s:  # for orientation only: a restore is compared with copies of its size
            copy = MemcpyLimit(_BIG_COPY_NBYTES, thread_count())
            self.copy_s += [copy.seconds() for _ in range(3)]
            copy.close()

    def memcpy(self, nbytes: int) -> MemcpyLimit | None:
        """What a restore of so many bytes is compared with: host memory only."""
        return None if self.cpu is None else MemcpyLimit(nbytes, thread_count())

    def summary(self) -> dict[str, float | None]:
        """Medians; the memory rates count bytes read (stream) and bytes copied (memcpy) once."""
        if self.cpu is None:
            unknown = ("fma_flops", "stream_s", "read_bytes_per_s", "memcpy_bytes_per_s")
            return {"streamed_bytes": self.streamed_bytes, **dict.fromkeys(unknown)}
        stream_s = statistics.median(self.stream_s)
        return {
            "fma_flops": statistics.median(self.fma_flops),
            "streamed_bytes": self.streamed_bytes,
            "stream_s": stream_s,
            "read_bytes_per_s": self.streamed_bytes / stream_s,
            "memcpy_bytes_per_s": _BIG_COPY_NBYTES / statistics.median(self.copy_s),
        }


def _document(
    facts: dict[str, Any],
    engine: SessionEngine,
    limits: _Limits,
    rows: list[AtLength],
) -> dict[str, Any]:
    summary = limits.summary()
    return {
        **facts,
        **of_engine(engine),
        "turn_tokens": TURN,
        "reply_tokens": REPLY,
        "short_turn_tokens": SHORT_TURN,
        "rollback_tokens": [AHEAD, BACK],
        "limits": summary,
        "rows": [_row(engine, summary, row) for row in rows],
    }


def _row(engine: SessionEngine, limits: dict[str, float | None], at: AtLength) -> dict[str, Any]:
    """Medians and ratios at one length, with all samples."""
    samples = asdict(at)
    medians = {k: statistics.median(v) for k, v in samples.items() if isinstance(v, list) and v}
    memcpy_s = medians.get("memcpy_s")
    flop = flop_of(engine.model.record(PREFILL, 1), at.tokens)
    peak, stream_s = limits["fma_flops"], limits["stream_s"]
    decode_s = statistics.fmean(at.inter_token_s)  # every token counts, slow ones too
    restore_rate = at.restore_bytes / medians["restore_s"]
    return {
        "tokens": at.tokens,
        "is_exact": at.is_exact,
        "prefill_tokens_per_s": at.tokens / medians["prefill_s"],
        "prefill_of_fma_peak": None if peak is None else flop / medians["prefill_s"] / peak,
        "decode_tokens_per_s": 1 / decode_s,
        "decode_of_streaming": None if stream_s is None else stream_s / decode_s,
        "inter_token_p50_s": medians["inter_token_s"],
        "inter_token_p99_s": _percentile(at.inter_token_s, 0.99),
        "decoded_tokens": len(at.inter_token_s),
        "decode_bytes_per_token": limits["streamed_bytes"],
        "restore_bytes_per_s": restore_rate,
        "restore_of_memcpy": None if memcpy_s is None else memcpy_s / medians["restore_s"],
        "ttft_ratio": medians["ttft_cold_s"] / medians["ttft_warm_s"],
        "ttft_turn_of_itl": medians["ttft_turn_s"] / medians["inter_token_s"],
        **{k: v for k, v in medians.items() if k != "inter_token_s"},
        **{k: v for k, v in samples.items() if k.endswith("_bytes")},
        "samples": {k: v for k, v in samples.items() if isinstance(v, list)},
    }


def _percentile(samples: list[float], fraction: float) -> float:
    """The smallest sample that is no smaller than `fraction` of all."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]
