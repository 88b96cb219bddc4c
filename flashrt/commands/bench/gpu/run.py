"""`flashrt bench --device cuda`: a shape's speed as fractions of what the GPU can do in this run.

IS: the stages in order, each written to disk as soon as it is done, so that a stage that hangs or
fails takes nothing with it. IS NOT: the measurements (limits, device, bench.measure) or the pages
(report). On `simt` the same code runs as a check, and its times mean nothing.
"""

from __future__ import annotations

import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flashrt.backends.cuda.clock import DeviceClock
from flashrt.backends.cuda.device import CudaDevice, open_device
from flashrt.backends.cuda.limits import DeviceLimits, LimitSizes, measure_limits
from flashrt.backends.cuda.nvrtc import Nvrtc
from flashrt.backends.simt.build import ShimCompiler
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError, FlashrtError
from flashrt.commands.bench.document import provenance
from flashrt.commands.bench.gpu.device import DECODE_REPLAYS, DeviceBench
from flashrt.commands.bench.gpu.engine import SyntheticEngine, load_synthetic
from flashrt.commands.bench.gpu.machine import clocks
from flashrt.commands.bench.gpu.report import fold_lengths, stem, write
from flashrt.commands.bench.measure import REPLY, SHORT_TURN, TURN, Bench
from flashrt.load import Precision
from flashrt.models.model import DECODE, PREFILL
from flashrt.ops.work import flop_of, streamed_bytes

LENGTHS = (2048, 4096, 8192, 16384)
MEASURED = Path("docs/measured")
SIMT_NOTE = "simt: verification, not speed"
_ROOM = 512  # positions beyond the longest prompt: turns, decoding, one widest prefill launch
_SIMT_LENGTHS, _SIMT_SIZES = (40,), LimitSizes(buffer_bytes=1 << 16, mma_steps=2, repeats=1)


@dataclass(frozen=True, slots=True)
class GpuBenchOptions:
    """What to measure. `out`: folder of the report; None = docs/measured on cuda, none on simt."""

    shape: str = "0.8b"
    device: str = "cuda"
    precision: Precision = "bfloat16"
    lengths: tuple[int, ...] = ()
    repeats: int = 3
    out: Path | None = None
    limit_sizes: LimitSizes = field(default_factory=LimitSizes)


def gpu_bench(options: GpuBenchOptions) -> int:
    """The command. Returns 1 if a stage failed or a restored state was not the one saved.

    Raises BackendError where the device cannot be opened, FlashrtError for a simt report that
    would go among measurements.
    """
    options = _completed(options)
    run = _Run(options)
    run.stage("limits", run.limits)
    if run.stage("load", run.load):
        run.stage("device", run.device)
        run.stage("kernels", run.kernels)
        run.stage("session", run.session)
        run.stage("close", run.close)
    run.finish()
    return 0 if run.document["is_exact"] and not run.document["failed"] else 1


def _completed(options: GpuBenchOptions) -> GpuBenchOptions:
    """Options with every default filled in."""
    is_simt = options.device == "simt"
    if is_simt and options.out is not None and _is_measured(options.out):
        raise FlashrtError(
            f"{SIMT_NOTE}: its figures do not go into {options.out}; give another --out"
        )
    lengths = options.lengths or (_SIMT_LENGTHS if is_simt else LENGTHS)
    out = options.out if is_simt or options.out is not None else MEASURED
    sizes = _SIMT_SIZES if is_simt else options.limit_sizes
    repeats = 1 if is_simt else options.repeats
    return GpuBenchOptions(
        options.shape, options.device, options.precision, tuple(sorted(lengths)), repeats, out,
        sizes,
    )  # fmt: skip


def _is_measured(folder: Path) -> bool:
    return folder.absolute().parts[-2:] == MEASURED.parts


class _Run:
    """One run: its document, and the engine while there is one."""

    def __init__(self, options: GpuBenchOptions) -> None:
        self.options = options
        self.started = time.perf_counter()
        self.made: SyntheticEngine | None = None
        self.bench: DeviceBench | None = None
        self.found_limits: DeviceLimits | None = None
        self.document: dict[str, Any] = self._head()
        self.say(f"{self.document['device']}, {options.shape}, {options.precision}")
        if options.device == "simt":
            self.say(SIMT_NOTE)

    def open(self) -> CudaDevice:
        """The device, again and again the same."""
        if self.options.device == "simt":
            return SimtDevice(self.options.precision)
        if self.options.device == "cuda":
            return open_device(self.options.precision)
        raise BackendError(f"device {self.options.device!r}: this bench knows cuda and simt")

    # -- stages ---------------------------------------------------------------------------------

    def limits(self) -> None:
        """Bare rates, before the model takes the memory."""
        found = measure_limits(self.open, self.options.limit_sizes)
        self.found_limits = found
        rates = {**asdict(found), "copy_bytes_per_s": found.copy_bytes_per_s}
        self.document["limits"] = rates
        self.say(
            f"copy {found.copy_bytes_per_s / 1e9:,.0f} GB/s (read + write), read "
            f"{found.read_bytes_per_s / 1e9:,.0f} GB/s, mma {found.mma_flops / 1e12:,.1f} TFLOP/s"
        )

    def load(self) -> None:
        """The engine, its weights drawn in place."""
        started = time.perf_counter()
        made = load_synthetic(
            self.open, self.options.shape, max_positions=self.options.lengths[-1] + _ROOM,
            least_buffer_bytes=self.options.limit_sizes.buffer_bytes // 2,
        )  # fmt: skip
        made.gpu.sync()
        self.made, engine = made, made.engine
        stats = engine.stats()
        self.document |= {
            "load_s": time.perf_counter() - started,
            "weights_bytes": stats["weights_bytes"],
            "arena_bytes": stats["arena_bytes"],
            "streamed_bytes": streamed_bytes(engine.model.record(DECODE, 1), engine.backend),
            "fingerprint": engine.fingerprint,
            "launches_per_token": sum(p.n_in_tape for p in made.probes if p.phase == DECODE),
        }
        clock = DeviceClock(made.gpu, made.buffers.address, made.buffer_bytes)
        self.bench = DeviceBench(made, clock, self.options.repeats)

    def device(self) -> None:
        """Device times at each length."""
        assert self.bench is not None
        for n_tokens in self.options.lengths:
            found = self.bench.at_length(n_tokens)
            row = self._row(n_tokens)
            row["device"] = asdict(found)
            row |= {
                "decode_bytes": self._tape_bytes(n_tokens),
                "prefill_launch_flop": self._launch_flop(n_tokens),
            }
            self.document["is_exact"] &= found.is_exact
            self.say(f"{n_tokens:,}: {found.decode_us:,.0f} us per token on the device")
            self.save()

    def kernels(self) -> None:
        """Each op at the first length."""
        assert self.bench is not None
        position = self.options.lengths[0]
        self.document["kernels_at"] = position
        self.document["kernels"] = [asdict(row) for row in self.bench.kernels(position)]

    def session(self) -> None:
        """What a user of the session waits for, by the host's clock."""
        assert self.bench is not None
        engine = self.bench.engine
        self.bench.main.close()
        wall = Bench(engine, self.options.repeats, _no_progress, lambda nbytes: None)
        for found in wall.run(list(self.options.lengths), lambda prompt: None):
            row = self._row(found.tokens)
            row["session"] = asdict(found)
            row["prefill_flop"] = flop_of(engine.model.record(PREFILL, 1), found.tokens)
            self.document["is_exact"] &= found.is_exact

    # -- the document ---------------------------------------------------------------------------

    def stage(self, name: str, act: Callable[[], None]) -> bool:
        """Run a stage; what it raises is written down, and the next one has its chance."""
        started = time.perf_counter()
        try:
            act()
        except Exception as error:  # a bug in one stage must not cost the others their turn
            self.document["failed"][name] = f"{type(error).__name__}: {error}"
            self.say(f"{name} FAILED: {traceback.format_exc()}")
        seconds = time.perf_counter() - started
        self.document["stage_s"][name] = seconds
        self.say(f"{name}: {seconds:.1f} s")
        self.save()
        return name not in self.document["failed"]

    def save(self, *, has_picture: bool = False) -> None:
        """Write what there is; the picture takes longest, and comes last."""
        self.document["seconds"] = time.perf_counter() - self.started
        fold_lengths(self.document)
        if self.options.out is not None:
            name = stem(self.document)
            write([self.document], self.options.out, name, has_picture=has_picture)

    def finish(self) -> None:
        """The last page, with clocks as they are now."""
        self.document["clocks_after"] = clocks()
        self.save(has_picture=True)
        if self.options.out is not None:
            self.say(f"written: {self.options.out / stem(self.document)}.json, .md, .png")

    def close(self) -> None:
        """Give the device back."""
        if self.made is not None:
            self.made.engine.close()

    def say(self, line: str) -> None:
        """A line of progress, with the seconds since the start."""
        sys.stderr.write(f"[{time.perf_counter() - self.started:6.1f} s] {line}\n")
        sys.stderr.flush()

    def _row(self, n_tokens: int) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self.document["rows"]
        for row in rows:
            if row["tokens"] == n_tokens:
                return row
        rows.append({"tokens": n_tokens})
        return rows[-1]

    def _tape_bytes(self, position: int) -> int:
        """Bytes that one decoded token at a position must move: weights, state, rows, scratch."""
        assert self.made is not None
        decode = [p for p in self.made.probes if p.phase == DECODE]
        return sum(p.n_in_tape * self.made.work(p, position).nbytes for p in decode)

    def _launch_flop(self, position: int) -> int:
        """FLOP of one widest prefill launch that begins at a position."""
        assert self.made is not None
        prefill = [p for p in self.made.probes if p.phase != DECODE]
        return sum(p.n_in_tape * self.made.work(p, position).flop for p in prefill)

    def _head(self) -> dict[str, Any]:
        gpu = self.open()
        info = gpu.driver.info
        gpu.close()
        is_simt = self.options.device == "simt"
        compiler = ShimCompiler() if is_simt else Nvrtc(info.arch)
        return {
            **provenance("cuda-bindings"),
            "is_verification_only": is_simt,
            "backend": self.options.device,
            "device": info.name,
            "arch": info.arch,
            "multiprocessors": info.multiprocessors,
            "memory_bytes": info.memory_bytes,
            "driver_for_cuda": ".".join(map(str, info.driver_version)),
            "compiler": compiler.identity,
            "clocks_before": clocks(),
            "system": platform.platform(),
            "shape": self.options.shape,
            "precision": self.options.precision,
            "repeats": self.options.repeats,
            "turn_tokens": TURN,
            "reply_tokens": REPLY,
            "short_turn_tokens": SHORT_TURN,
            "decode_replays": DECODE_REPLAYS,
            "is_exact": True,
            "failed": {},
            "stage_s": {},
            "rows": [],
            "kernels": [],
        }


def _no_progress(what: str, done: int, total: int) -> None:
    """Stages are short; a line at the end of each is enough."""
