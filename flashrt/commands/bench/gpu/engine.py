"""An engine of a named shape whose weights are drawn on the device, with graphs of single kernels.

IS: the loader's path for vectors and odd matrices, a fill kernel over the storage of all other
matrices (tens of gigabytes in milliseconds), and, captured before the seal, a graph per kernel of
the tapes, to time it. IS NOT: a way to load a model: weights have the spread of a random
checkpoint's, not its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from flashrt.backends.cuda.device import CudaDevice
from flashrt.backends.cuda.extra_ops import add_kernels, random_fill
from flashrt.backends.cuda.layouts import K_CHUNK, ROW_TILE
from flashrt.core.arena import Arena
from flashrt.core.backend import BoundLaunch, Graph, Memory, Progress
from flashrt.core.region import DType
from flashrt.core.runs import Run
from flashrt.core.tape import Tape
from flashrt.models import model_for
from flashrt.models.model import DECODE, PREFILL
from flashrt.ops.work import Work, work_of
from flashrt.session.engine import SessionEngine
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.loader import LoadReport, fill_weights
from flashrt.weights.random_checkpoint import Shape as Sizes
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


@dataclass(frozen=True, slots=True)
class SyntheticEngine:
    """An engine, its device, and what was made beside the model before the seal."""

    engine: SessionEngine
    gpu: CudaDevice
    probes: list[Probe]
    buffers: Memory  # of the benchmark's own: two halves, each with room for what a capsule moves

    @property
    def buffer_bytes(self) -> int:
        """Bytes of each half of `buffers`."""
        return self.buffers.nbytes // 2

    def work(self, probe: Probe, position: int) -> Work:
        """What one launch of a probe asks for."""
        return work_of(probe.launch.launch, self.gpu.acts, position)


def load_synthetic(
    open_device: Callable[[], CudaDevice],
    shape: str | Sizes,
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
    gpu = open_device()
    add_kernels(gpu)
    probes: list[Probe] = []
    buffers: list[Memory] = []

    def before_seal(arena: Arena, tapes: Sequence[Tape]) -> None:
        lane = arena.plan.lanes[0]
        nbytes = max(least_buffer_bytes, lane.fixed.nbytes + lane.rows.nbytes)
        buffers.append(gpu.allocate("benchmark buffers", 2 * nbytes))
        for tape in tapes:
            if (tape.phase, tape.rows) in ((DECODE, 1), (PREFILL, model.buckets[-1])):
                probes.extend(_probes_of(gpu, arena, tape))

    engine = SessionEngine(
        model, checkpoint, gpu, lanes=lanes, pool_bytes=pool_bytes,
        fill=fill_on_device, before_seal=before_seal, progress=progress,
    )  # fmt: skip
    return SyntheticEngine(engine, gpu, probes, *buffers)


def fill_on_device(
    rules: Sequence[WeightRule],
    checkpoint: Checkpoint,
    arena: Arena,
    progress: Progress | None = None,
) -> LoadReport:
    """In place of `fill_weights`: a kernel draws matrices of whole tiles where they lie; the loader
    takes the rest. Only for a SyntheticCheckpoint on a device that has `random_fill`.
    """
    gpu = arena.backend
    assert isinstance(checkpoint, SyntheticCheckpoint) and isinstance(gpu, CudaDevice)
    slots = {slot.region: slot for slot in arena.weights.slots}
    digest = xxhash.xxh3_128(b"filled on the device")
    rest: list[WeightRule] = []
    n_bytes = 0
    for i, rule in enumerate(rules):
        if not _is_fillable(rule):
            rest.append(rule)
            continue
        slot = slots[rule.region]
        address = arena.weight_memory.address + slot.offset
        for source in rule.sources:  # of a stacked matrix, each with its own spread
            nbytes = source.shape[0] * slot.storage.lead_nbytes
            name_seed = xxhash.xxh32(source.name.encode(), checkpoint.draw.seed).intdigest() >> 1
            deviation = checkpoint.deviation(source.name)
            gpu.eager([random_fill(address, nbytes, name_seed, deviation)])
            address += nbytes
        digest.update(f"{rule}".encode())
        n_bytes += slot.storage.nbytes
        if progress is not None:
            progress("random weights", i + 1, len(rules))
    names = {source.name for rule in rest for source in rule.sources}
    report = fill_weights(rest, checkpoint.only(names), arena, progress)
    digest.update(report.digest.encode())
    return LoadReport(digest.hexdigest(), report.source_nbytes + n_bytes)


def _probes_of(gpu: CudaDevice, arena: Arena, tape: Tape) -> list[Probe]:
    groups: dict[str, list[BoundLaunch]] = {}
    arena.write_runs((Run(0, tape.rows),))
    for bound in arena.bind(tape):
        launch = bound.launch
        groups.setdefault(f"{launch.op.name} {launch.dims} {launch.attrs}", []).append(bound)
    probes = []
    for bounds in groups.values():
        first, repeats = bounds[0], -(-_LEAST_LAUNCHES // len(bounds))
        graph = gpu.capture(bounds * repeats)
        op, dims = first.launch.op.name, dict(first.launch.dims)
        probes.append(Probe(tape.phase, tape.rows, op, dims, len(bounds), repeats, graph, first))
    return probes


def _is_fillable(rule: WeightRule) -> bool:
    """Whether each source is a run of whole storage tiles of bfloat16: what the kernel draws."""
    region = rule.region
    if not rule.is_matrix or region.dtype is not DType.BF16 or region.shape[1] % K_CHUNK:
        return False
    return all(source.shape[0] % ROW_TILE == 0 for source in rule.sources)
