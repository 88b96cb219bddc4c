"""`flashrt bench --gpu-model`: expected times of a shape on GPUs that need not be there.

IS: the options, and the document: per GPU, decode and prefill at each length, op by op, with what
limits them, beside measured times where a report of that GPU is at hand. IS NOT: the model (graph,
launch), nor how the document looks (report).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from flashrt.backends.cuda.device import ACTS
from flashrt.base.errors import BackendError, FlashrtError
from flashrt.commands import console
from flashrt.commands.bench.document import check_outputs, deliver, provenance
from flashrt.commands.bench.gpu.cost import launch
from flashrt.commands.bench.gpu.cost.code import Codes
from flashrt.commands.bench.gpu.cost.devices import GPUS, gpu_named
from flashrt.commands.bench.gpu.cost.graph import REPLAY_US, CostModel, GraphCost
from flashrt.commands.bench.gpu.cost.measured import Measured, measured
from flashrt.commands.bench.gpu.cost.paper import PaperEngine
from flashrt.commands.bench.gpu.cost.report import show
from flashrt.commands.bench.gpu.run import MEASURED
from flashrt.core.backend import Progress
from flashrt.load import Precision
from flashrt.models.model import PREFILL

ALL: Final = "all"
LENGTHS: Final = (2048, 16384)
_ROOM: Final = 512  # positions beyond the longest prompt


@dataclass(frozen=True, slots=True)
class GpuModelOptions:
    """What to compute. `gpus`: names, or "all"; `measured`: a report of a GPU, or a folder with
    such; None = docs/measured, if there is such a folder.
    """

    gpus: tuple[str, ...]
    shape: str = "mini"
    form: str = "bfloat16"
    precision: Precision = "bfloat16"
    lengths: tuple[int, ...] = LENGTHS
    measured: Path | None = None


def gpu_model(options: GpuModelOptions, json_path: Path | None) -> int:
    """The command. Raises BackendError for an unknown GPU, CheckpointError for an unknown shape or
    format, FlashrtError for an output or a report that cannot be.
    """
    check_outputs(json_path)
    with console.progress_bars() as progress:
        document = document_of(options, {}, progress)
    deliver(document, json_path, show)
    return 0


def document_of(
    options: GpuModelOptions,
    codes: dict[str, Codes | None],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All figures. `codes` keeps what was disassembled, by architecture, from call to call."""
    names = tuple(GPUS) if ALL in options.gpus else options.gpus
    gpus = {name: gpu_named(name) for name in names}
    lengths = tuple(sorted(options.lengths))
    if not lengths:
        raise FlashrtError("no lengths; give --lengths N,N")
    max_positions, acts = lengths[-1] + _ROOM, ACTS[options.precision]
    engine = PaperEngine(options.shape, options.form, max_positions, acts)
    place = options.measured or (MEASURED if MEASURED.is_dir() else None)
    notes: list[str] = []
    found = []
    for name, gpu in gpus.items():
        cost = CostModel(engine, gpu, _codes(gpu.arch, codes, notes), progress)
        beside = Measured()
        if place is not None:
            beside = measured(place, gpu, options.shape, options.form, options.precision)
        found.append(_of_gpu(name, cost, lengths, beside))
    return {
        **provenance(),
        "is_model": True,
        "shape": options.shape,
        "weights": options.form,
        "precision": options.precision,
        "assumptions": _assumptions(),
        "notes": list(dict.fromkeys(notes)),
        "gpus": found,
    }


def _codes(arch: str, codes: dict[str, Codes | None], notes: list[str]) -> Codes | None:
    """What kernels execute, where it can be known here."""
    if arch not in codes:
        try:
            codes[arch] = Codes(arch)
        except BackendError as error:
            codes[arch] = None
            notes.append(
                f"Instructions are not counted, so issue and latency limit nothing: {error}"
            )
    return codes[arch]


def _assumptions() -> dict[str, float]:
    """What nobody publishes, by name."""
    names = (
        "GAP_US", "EARLY_GAP_US", "L2_TRIPS", "L2_TRIP_CYCLES", "DRAM_TRIP_US", "BUS_TRIP_US",
        "CYCLES_PER_SLOT", "CYCLES_PER_TENSOR_SLOT", "EMPTY_BLOCK_CYCLES", "SM_BYTES_PER_CYCLE",
    )  # fmt: skip
    return {"REPLAY_US": REPLAY_US, **{name: getattr(launch, name) for name in names}}


def _of_gpu(
    name: str, cost: CostModel, lengths: tuple[int, ...], beside: Measured
) -> dict[str, Any]:
    gpu, first = cost.gpu, cost.first_token()
    rows = []
    for n in lengths:
        prompt = cost.prefill(n)
        rows.append({
            "tokens": n,
            "decode": _graph(cost.decode(n), n, beside, beside.decode.get(n)),
            "prefill": _graph(prompt, n, beside, None),
            "ttft_us": prompt.us + first.us,
            "ttft_measured_us": beside.first_token.get(n),
        })  # fmt: skip
    return {
        "gpu": name,
        "figures": asdict(cost.gpu),
        "weights_bytes": cost.engine.weights_bytes,
        "arena_bytes": cost.engine.arena_bytes,
        "fits": cost.fits,
        "counts_instructions": cost.codes is not None,
        "measured": beside.source,
        "assumed_and_measured": {
            "read_bytes_per_s": (gpu.memory_bytes_per_s * gpu.dram_reach, beside.read_bytes_per_s),
            "mma_flops": (gpu.tensor_flops * gpu.mma_reach, beside.mma_flops),
        },
        "rows": rows,
    }


def _graph(
    graph: GraphCost, tokens: int, beside: Measured, measured_us: float | None
) -> dict[str, Any]:
    # prefill runs from position 0 on, and no report has attention's mean over that
    position = -1 if graph.phase == PREFILL else tokens
    return {
        "phase": graph.phase,
        "rows": graph.rows,
        "replays": graph.replays,
        "launches": graph.kernels,
        "us": graph.us,
        "measured_us": measured_us,
        "dram_bytes": graph.dram_bytes,
        "by_limit": {str(limit): us for limit, us in graph.by_limit.items()},
        "ops": [
            {
                "op": op.op,
                "dims": op.dims,
                "weights": op.weights,
                "kernels": op.kernels,
                "launches": op.launches,
                "us": op.us,
                "share": op.us / graph.us,
                "limit": op.limit,
                "dram_bytes": op.dram_bytes,
                "measured_us": beside.op(graph.phase, op.op, op.dims, position),
            }
            for op in graph.ops
        ],
    }
