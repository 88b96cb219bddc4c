"""An engine of a named shape whose weights are drawn on the device, with graphs of single kernels.

IS: the loader's path for vectors and odd matrices, a fill kernel over the storage of all other
matrices (tens of gigabytes in milliseconds), and, captured before the seal, a graph per kernel of
the tapes, to time it. IS NOT: a way to load a model: weights have the spread of a random
checkpoint's, not its values. Called by: gpu_bench, tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.backends.cuda.device import CudaDevice
from flashrt.backends.cuda.layouts import K_CHUNK, ROW_TILE
from flashrt.commands.bench.gpu.kernels import add_kernels, random_fill
from flashrt.commands.bench.work import Work, work_of
from flashrt.core.backend import BoundLaunch, Bytes, Graph, Memory, Progress
from flashrt.core.planner import Slot
from flashrt.core.region import Region
from flashrt.core.tape import Tape
from flashrt.engine.tokens import DECODE, PREFILL
from flashrt.load import SessionEngine
from flashrt.models import Model, model_for
from flashrt.weights.loader import LoadReport, load
from flashrt.weights.random_checkpoint import Shape
from flashrt.weights.rules import WeightRule
from flashrt.weights.synthetic import SyntheticCheckpoint, synthetic_checkpoint

_LEAST_LAUNCHES = 8  # of a probe, so that the start of a graph does not show


@dataclass(frozen=True, slots=True)
class Probe:
    """A graph of all launches of one op and size in a tape, one layer's after another's.

    `repeats`: how often the graph runs through them; beyond 1, later ones find warm caches.
    """

    phase: str
    rows: int
    op: str
    dims: dict[str, int]
    n_in_tape: int
    repeats: int
    graph: Graph
    launch: BoundLaunch  # the first


class SyntheticEngine(SessionEngine):
    """See `load_synthetic`. `gpu` is its device, `buffers` memory of the benchmark's own."""

    def __init__(
        self,
        model: Model,
        checkpoint: SyntheticCheckpoint,
        gpu: CudaDevice,
        *,
        lanes: int,
        pool_bytes: int | None,
        least_buffer_bytes: int,
        progress: Progress | None,
    ) -> None:
        """See Engine; `buffers` are two halves, each of at least so many bytes."""
        self.gpu = gpu
        self.source = checkpoint
        self.probes: list[Probe] = []
        self.buffers: Memory
        self._least_buffer_bytes = least_buffer_bytes
        add_kernels(gpu)
        super().__init__(
            model, checkpoint, gpu, lanes=lanes, pool_bytes=pool_bytes, progress=progress,
            tokenizer=None,
        )  # fmt: skip

    @property
    def buffer_bytes(self) -> int:
        """Bytes of each half of `buffers`: room for whatever a capsule moves."""
        lane = self.arena.plan.lanes[0]
        return max(self._least_buffer_bytes, lane.fixed.nbytes + lane.rows.nbytes)

    def work(self, probe: Probe, position: int) -> Work:
        """What one launch of a probe asks for."""
        return work_of(probe.launch.launch, self.gpu.act, position)

    # -- weights --------------------------------------------------------------------------------

    def _load(self, progress: Progress | None) -> LoadReport:
        slots = {s.region: s for s in self.arena.weights.slots}
        base = self.arena.weight_memory.address
        rest: list[WeightRule] = []
        digest = xxhash.xxh3_128(b"filled on the device")
        filled_bytes = 0
        for i, rule in enumerate(self.model.weights):
            if not _is_fillable(rule):
                rest.append(rule)
                continue
            filled_bytes += self._fill(rule, slots[rule.region], base)
            digest.update(f"{rule}".encode())
            if progress is not None:
                progress("random weights", i + 1, len(self.model.weights))

        def sink(region: Region, first_row: int, rows: NDArray[np.generic]) -> None:
            slot, part = slots[region], Region(region.name, rows.shape, region.dtype, region.role,
                                               region.layout)  # fmt: skip
            stored: Bytes = np.empty(self.gpu.storage(part).nbytes, np.uint8)
            self.gpu.pack(part, rows, stored)
            self.gpu.write(base + slot.offset + first_row * slot.storage.lead_nbytes, stored)

        names = {s.name for rule in rest for s in rule.sources}
        report = load(rest, self.source.only(names), sink, progress)
        digest.update(report.digest.encode())
        return LoadReport(digest.hexdigest(), report.source_nbytes + filled_bytes, report.notes)

    def _fill(self, rule: WeightRule, slot: Slot, base: int) -> int:
        """Each source of a stacked matrix with its own spread; returns bytes."""
        address = base + slot.offset
        for source in rule.sources:
            nbytes = source.shape[0] * slot.storage.lead_nbytes
            seed = xxhash.xxh32(source.name.encode(), self.source.draw.seed).intdigest() >> 1
            deviation = self.source.deviation(source.name)
            self.gpu.eager([random_fill(address, nbytes, seed, deviation)])
            address += nbytes
        return slot.storage.nbytes

    # -- probes ---------------------------------------------------------------------------------

    def _capture(self, tapes: Sequence[Tape], progress: Progress | None) -> None:
        super()._capture(tapes, progress)
        self.buffers = self.gpu.allocate("benchmark buffers", 2 * self.buffer_bytes)
        widest = self.model.buckets[-1]
        for tape in tapes:
            if (tape.phase, tape.rows) in ((DECODE, 1), (PREFILL, widest)):
                self.probes += self._probes_of(tape)

    def _probes_of(self, tape: Tape) -> list[Probe]:
        groups: dict[str, list[BoundLaunch]] = {}
        for bound in self.arena.bind(tape, 0):
            launch = bound.launch
            groups.setdefault(f"{launch.op.name} {launch.dims} {launch.attrs}", []).append(bound)
        probes = []
        for bounds in groups.values():
            first, repeats = bounds[0], -(-_LEAST_LAUNCHES // len(bounds))
            graph = self.gpu.capture(bounds * repeats)
            op, dims = first.launch.op.name, dict(first.launch.dims)
            probes.append(
                Probe(tape.phase, tape.rows, op, dims, len(bounds), repeats, graph, first)
            )
        return probes


def _is_fillable(rule: WeightRule) -> bool:
    """Whether each source is a run of whole storage tiles, so that any bits are weights of it."""
    if not rule.is_matrix or rule.region.shape[1] % K_CHUNK:
        return False
    return all(source.shape[0] % ROW_TILE == 0 for source in rule.sources)


def load_synthetic(
    open_device: Callable[[], CudaDevice],
    shape: str | Shape,
    *,
    max_positions: int = 4096,
    lanes: int = 2,
    pool_bytes: int | None = None,
    least_buffer_bytes: int = 1 << 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> SyntheticEngine:
    """An engine of a shape with random weights. Raises CheckpointError, BackendError, PlanError."""
    checkpoint = synthetic_checkpoint(shape, seed=seed)
    model = model_for(checkpoint.config, max_positions=max_positions)
    return SyntheticEngine(
        model, checkpoint, open_device(), lanes=lanes, pool_bytes=pool_bytes,
        least_buffer_bytes=least_buffer_bytes, progress=progress,
    )  # fmt: skip
