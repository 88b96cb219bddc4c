"""The model of cost: bytes counted by hand, limits that move with the figures they rest on.

IS: arithmetic on recorded tapes, and one kernel's counts against its disassembly. IS NOT: a check
of the figures by a GPU; docs/cuda-cost.md says what is assumed.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashrt.backends.cuda import sass
from flashrt.backends.cuda.device import ACTS
from flashrt.backends.cuda.kernels import K_SLICE, KernelLaunch, expand
from flashrt.base.errors import BackendError, CheckpointError, FlashrtError
from flashrt.cli import build_parser, main
from flashrt.commands.bench.gpu.cost.code import Code, Codes, code_of
from flashrt.commands.bench.gpu.cost.devices import GPUS, Gpu
from flashrt.commands.bench.gpu.cost.effort import MMA_FLOP, Task, effort_of, moved_by
from flashrt.commands.bench.gpu.cost.formats import FORMATS, model_of
from flashrt.commands.bench.gpu.cost.graph import CostModel, GraphCost
from flashrt.commands.bench.gpu.cost.launch import Limit
from flashrt.commands.bench.gpu.cost.measured import measured
from flashrt.commands.bench.gpu.cost.paper import PaperEngine
from flashrt.commands.bench.gpu.cost.report import show
from flashrt.commands.bench.gpu.cost.run import GpuModelOptions, document_of
from flashrt.core.op import Launch
from flashrt.load import Precision
from flashrt.models.model import DECODE, PREFILL
from flashrt.ops.work import work_of
from flashrt.weights.random_checkpoint import SHAPES
from tests.unit.test_sass import TEXT

BFLOAT16 = ACTS["bfloat16"]
RTX_5090, H200 = GPUS["rtx-5090"], GPUS["h200"]
POSITIONS = 4096
ROOT = Path(__file__).parents[2]


@functools.cache
def engine(shape: str, form: str, precision: Precision = "bfloat16") -> PaperEngine:
    return PaperEngine(model_of(shape, form, POSITIONS), ACTS[precision])


def model(shape: str, form: str, gpu: Gpu, precision: Precision = "bfloat16") -> CostModel:
    return CostModel(engine(shape, form, precision), gpu)


# ---- bytes


def test_bytes_of_a_decoded_token_are_weights_and_state() -> None:
    """Red: an operand left out or counted twice; scratch that goes to DRAM; the whole table for the
    row that is gathered from it.
    """
    s, position = SHAPES["0.8b"], 2047
    (queries, kv_heads, size), (key_heads, value_heads, width) = s.heads, s.linear_heads
    n_full, n_linear = s.n_layers // 4, s.n_layers - s.n_layers // 4
    inner, channels = value_heads * width, (2 * key_heads + value_heads) * width
    mlp = 2 * 3 * s.hidden * s.intermediate + 4 * 2 * s.hidden  # three matrices, two norms
    attention = 2 * s.hidden * (2 * queries + 2 * kv_heads + queries) * size
    attention += 4 * (2 * size + size // 8)  # norms of queries and keys, 32 pairs of angles
    delta = 2 * s.hidden * (channels + 2 * inner + 2 * value_heads)
    delta += 4 * (4 * channels + 2 * value_heads + width)  # taps, a_log and dt_bias, gated norm
    weights = s.n_layers * mlp + n_full * attention + n_linear * delta
    weights += 2 * s.vocab_size * s.hidden + 4 * s.hidden  # the head, which is the table
    state = 4 * 2 * n_linear * (value_heads * width * width + 3 * channels)  # read and written
    row = 2 * kv_heads * size * 2  # a row of keys and of values of one layer
    rows = n_full * row * (position + 1)  # seen
    # of one row each: the table; written or rewritten by rope (keys and values: read and written)
    single = 2 * s.hidden + n_full * row
    found = model("0.8b", "bfloat16", H200).decode(position).dram_bytes
    sampler = 4 * 16 + 8 * 512 + s.vocab_size // 8  # parameters, biases, mask
    last_hidden, journal_and_token = 2 * 2 * s.hidden, 3 * 4
    small = sampler + last_hidden + journal_and_token
    assert found == weights + state + rows + single + small


def test_bytes_of_formats() -> None:
    """Red: scales left out; head and table in another format than loading gives them."""
    s = SHAPES["9b"]
    tables = 2 * s.vocab_size * s.hidden
    of_layers = {
        form: model("9b", form, H200).engine.weights_bytes - tables * bits // 8
        for form, bits in (("bfloat16", 16), ("int4", 8.5), ("nvfp4", 16), ("fp8", 16))
    }
    per_weight = {form: 16 * n / of_layers["bfloat16"] for form, n in of_layers.items()}
    # gates' projections, a fiftieth of a percent, stay in bfloat16
    assert per_weight["int4"] == pytest.approx(4.5, rel=0.02)
    assert per_weight["nvfp4"] == pytest.approx(4.5, rel=0.02)
    assert per_weight["fp8"] == pytest.approx(8 + 32 / 128, rel=0.02)


def test_what_fits_into_the_cache_does_not_come_from_memory() -> None:
    assert model("tiny", "bfloat16", H200).decode(100).dram_bytes == 0
    assert not model("27b", "bfloat16", RTX_5090).fits
    assert model("27b", "nvfp4", RTX_5090).fits


# ---- limits


def time_of(graph: GraphCost) -> dict[object, float]:
    return {(op.op, *op.dims.items(), op.weights): op.us for op in graph.ops}


def check_moved(limit: Limit, before: GraphCost, after: GraphCost) -> None:
    """All ops that one limit alone is for take less time, those of another alone take the same."""
    times = time_of(after)
    seen = set[Limit]()
    for op in before.ops:
        needs = {need for need in op.by_limit if need is not Limit.LAUNCH}
        after_us = times[op.op, *op.dims.items(), op.weights]
        if needs == {limit}:
            assert after_us < op.us, op
        elif limit not in needs:
            assert after_us == op.us, op
        seen |= needs
    assert seen > {limit}


def test_decode_of_27b_is_bound_by_memory() -> None:
    """Red: a need that hides the bytes of weights; launches that cost nothing."""
    graph = model("27b", "nvfp4", RTX_5090).decode(2048)
    floor_us = 1e6 * graph.dram_bytes / (RTX_5090.memory_bytes_per_s * RTX_5090.dram_reach)
    assert floor_us < graph.us < 1.25 * floor_us
    assert graph.by_limit[Limit.MEMORY] / graph.us > 0.8
    assert graph.by_limit[Limit.LAUNCH] > graph.kernels  # over a microsecond each


def test_more_bandwidth_moves_what_memory_limits_and_nothing_else() -> None:
    """Red: a need that depends on a figure it should not."""
    wider = replace(RTX_5090, memory_bytes_per_s=1.5 * RTX_5090.memory_bytes_per_s)
    before, after = (model("27b", "nvfp4", gpu).decode(2048) for gpu in (RTX_5090, wider))
    check_moved(Limit.MEMORY, before, after)
    gained = before.us - after.us
    assert gained == pytest.approx(before.by_limit[Limit.MEMORY] / 3, rel=0.01)


def test_faster_tensor_cores_move_what_they_limit_and_nothing_else() -> None:
    faster = replace(RTX_5090, tensor_flops=1.5 * RTX_5090.tensor_flops)
    before, after = (model("27b", "nvfp4", gpu).prefill(256) for gpu in (RTX_5090, faster))
    check_moved(Limit.TENSOR, before, after)


def test_parts_of_x_cost_tensor_time() -> None:
    """One part throughout, two for most products, three for these and two for the rest."""
    precisions: tuple[Precision, ...] = ("fast", "bfloat16", "high")
    fast, usual, high = (
        model("0.8b", "bfloat16", RTX_5090, precision).prefill(1024).by_limit[Limit.TENSOR]
        for precision in precisions
    )
    assert 1.8 < usual / fast < 2.1
    assert 1.4 < high / usual < 1.7


# ---- launches


@pytest.mark.parametrize("phase", [DECODE, PREFILL])
def test_launches_are_those_of_the_graph(phase: str) -> None:
    """Red: launches of equal cost that are not equal; one lost or counted twice."""
    cost = model("0.8b", "int4", RTX_5090)
    rows = 1 if phase == DECODE else cost.engine.model.buckets[-1]
    captured = cost.engine.graphs[phase, rows]
    wanted = [k for bound in captured for k in expand(bound.launch, BFLOAT16, 170, "sm_120")]
    assert Counter(cost.launches(phase, rows)) == Counter(wanted)
    graph = cost.decode(0) if phase == DECODE else cost.prefill(rows)
    assert graph.kernels == len(wanted)
    assert sum(op.launches for op in graph.ops) == len(captured)


def test_a_prompt_is_divided_as_the_engine_does() -> None:
    cost = model("0.8b", "bfloat16", H200)
    widest, small = cost.engine.model.buckets[-1], cost.engine.model.buckets[1]
    graph = cost.prefill(2 * widest + small)
    assert (graph.replays, graph.rows) == (3, widest)
    several, one = cost.prefill(2 * widest), cost.prefill(widest)
    assert several.kernels == 2 * one.kernels
    assert several.us > 2 * one.us  # later ones see more keys


# ---- kernels


def linear_of(cost: CostModel, rows: int) -> tuple[Launch, KernelLaunch]:
    """The widest product of a prefill or decode, and its kernel."""
    phase = DECODE if rows == 1 else PREFILL
    tape = cost.engine.model.record(phase, rows)
    linear = [one for one in tape.launches if one.op.name == "linear"]
    launch = next(one for one in linear if one.dims["T"] == rows)
    (kernel,) = expand(launch, BFLOAT16, cost.gpu.multiprocessors, cost.gpu.arch)
    return launch, kernel


@pytest.mark.parametrize("rows", [1, 256])
def test_counts_are_those_of_the_disassembly(rows: int) -> None:
    """Red: tiles, parts or slices that the model counts and the machine code does not have."""
    cost = model("27b", "nvfp4", RTX_5090)
    launch, kernel = linear_of(cost, rows)
    moved = moved_by(launch, BFLOAT16, 0)
    task = Task(kernel, launch, BFLOAT16, rows, 0, moved, is_first=True)
    effort = effort_of(task, lambda _: 1000)
    code = Codes("sm_120").of(kernel)
    k_of_turn = K_SLICE if kernel.kernel == "linear_few" else 32
    inner_turns = launch.dims["K"] / k_of_turn
    splits = task.warps if kernel.kernel == "linear_few" else 1
    assert launch.dims["K"] % (k_of_turn * splits) == 0
    executed = effort.blocks * task.warps * inner_turns / splits * code.tensor
    assert effort.tensor == executed
    assert code.innermost(code.tensor) == code.inner > code.tensor > 0


def test_instructions_by_loop() -> None:
    """Red: the loop around the tensor loop counted with it, or not at all."""
    first, second = sass.functions(TEXT)
    assert code_of(first, 40, 0) == Code(4, 4, 14, 1, 40, 0)
    assert code_of(second, 40, 0) == Code(4, 4, 0, 0, 40, 0)


def test_a_kernel_that_the_model_does_not_know_has_a_cost() -> None:
    """Red: a table of kernels that must be kept in step with `kernels.py`."""
    cost = model("27b", "nvfp4", RTX_5090)
    launch, kernel = linear_of(cost, 1)
    moved = moved_by(launch, BFLOAT16, 0)
    known = Task(kernel, launch, BFLOAT16, 1, 0, moved, is_first=True)
    new = replace(known, kernel=replace(kernel, kernel="linear_of_tomorrow"))
    effort = effort_of(new, lambda _: 1)
    assert effort.blocks == kernel.grid[0]
    assert effort.loaded == moved.lasting + moved.passing
    assert effort.tensor == pytest.approx(effort_of(known, lambda _: 1).tensor)


def test_attention_works_on_whole_blocks_of_keys() -> None:
    """Red: blocks of keys that no row sees; query heads of a group that are counted one by one."""
    cost = model("0.8b", "bfloat16", H200)
    for phase, rows, position, padding in (
        (DECODE, 1, 2047, 2.0),  # 4 of 8 columns
        (PREFILL, 256, 3840, 4096 / (3840 + 128.5)),  # the last block of keys is whole for all rows
    ):
        launches = cost.engine.model.record(phase, rows).launches
        launch = next(one for one in launches if one.op.name == "attention")
        kernel = expand(launch, BFLOAT16, H200.multiprocessors, H200.arch)[0]
        moved = moved_by(launch, BFLOAT16, position)
        task = Task(kernel, launch, BFLOAT16, rows, position, moved, is_first=True)
        flop = work_of(launch, BFLOAT16, position).flop
        effort = effort_of(task, lambda _: 1)
        assert effort.tensor * MMA_FLOP == pytest.approx(padding * flop)
        assert effort.blocks <= task.grid


# ---- beside measured times


def report_of(device: str, **changes: Any) -> dict[str, Any]:
    """A report with one kernel and one length, as the GPU bench writes it."""
    dims = {"T": 1, "K": 1024, "N": 248320}  # the head
    return {
        "is_verification_only": False, "device": device, "date": "2026-12-01T10:00:00+00:00",
        "shape": "0.8b", "precision": "bfloat16", "kernels_at": 2048,
        "limits": {"read_bytes_per_s": 4.1e12, "mma_flops": 601e12},
        "kernels": [
            {"phase": DECODE, "rows": 1, "op": "linear", "dims": dims, "launches": 1, "us": 117.5}
        ],
        "rows": [
            {"tokens": 2048, "device": {"decode_us": 800.0}, "figures": {"ttft_cold_s": 0.04}}
        ],
        **changes,
    }  # fmt: skip


def test_measured_times_stand_beside(tmp_path: Path) -> None:
    """Red: another GPU's, precision's or format's report; a time at another op."""
    older = report_of("NVIDIA H200", date="2026-11-30T10:00:00+00:00", rows=[])
    others = [report_of("NVIDIA GeForce RTX 5090"), report_of("NVIDIA H200", precision="high")]
    others += [report_of("NVIDIA H200", is_verification_only=True, date="2027-01-01T00:00:00")]
    (tmp_path / "several.json").write_text(json.dumps([older, *others]))
    (tmp_path / "one.json").write_text(json.dumps(report_of("NVIDIA H200")))
    (tmp_path / "cpu.json").write_text('{"model": "of another bench"}')
    options = GpuModelOptions(("h200",), "0.8b", lengths=(2048,), measured=tmp_path)
    (gpu,) = document_of(options, {"sm_90": None})["gpus"]
    (row,) = gpu["rows"]
    assert (gpu["measured"], row["ttft_measured_us"]) == ("NVIDIA H200, 2026-12-01", 40e3)
    assert row["decode"]["measured_us"] == 800.0
    beside = {
        (op["op"], op["dims"].get("N")): op["measured_us"]
        for graph in (row["decode"], row["prefill"])
        for op in graph["ops"]
        if op["measured_us"] is not None
    }
    assert beside == {("linear", 248320): 117.5}
    assert gpu["assumed_and_measured"]["mma_flops"] == (H200.tensor_flops * 0.62, 601e12)
    assert not measured(tmp_path, H200, "0.8b", "int4", "bfloat16").source


def test_the_command_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Red: a column or a note that a report does not reach."""
    path = tmp_path / "one.json"
    path.write_text(json.dumps(report_of("NVIDIA H200")))
    document = document_of(
        GpuModelOptions(("h200",), "0.8b", lengths=(2048,), measured=path), {"sm_90": None}
    )
    show(document)
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("(measured 800 µs)", "(measured 40.0 ms)", "118 µs", "601 TFLOP/s"):
        assert text in shown


def test_wrong_reports_are_refused(tmp_path: Path) -> None:
    for name, text in (("no.json", "{"), ("cpu.json", "{}")):
        (tmp_path / name).write_text(text)
    for name in ("no.json", "cpu.json", "missing.json"):
        with pytest.raises(FlashrtError, match=name):
            measured(tmp_path / name, H200, "0.8b", "bfloat16", "bfloat16")


# ---- the command


def test_unknown_names_are_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--gpu-model", "rtx-9999", "--shape", "tiny"]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in ("rtx-9999", *GPUS))
    with pytest.raises(CheckpointError, match="nvfp4"):
        model_of("tiny", "int3", POSITIONS)
    with pytest.raises(CheckpointError, match="27b"):
        model_of("28b", FORMATS[0], POSITIONS)
    with pytest.raises(SystemExit):
        main(["bench", "--gpu-model", "h200", "--format", "int3"])
    assert "nvfp4" in capsys.readouterr().err


def test_the_command_without_a_disassembler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what is not counted, and what to install."""

    def missing() -> Path:
        raise BackendError("pip install 'flashrt[sass]'")

    monkeypatch.setattr(sass, "disassembler", missing)
    assert main(["bench", "--gpu-model", "h200,thor", "--shape", "0.8b", "--lengths", "64"]) == 0
    shown = capsys.readouterr().out
    assert "flashrt[sass]" in shown
    assert "H200" in shown
    assert "Thor" in shown


# ---- the page


def test_the_page_has_what_its_tool_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red: a section or a case that was added to one of them alone; a command that is refused."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import cost_page

    page = cost_page.PAGE.read_text()
    for name in cost_page.SECTIONS:
        assert cost_page.with_section(page, name, "new") != page
    tables = page.split("<!-- computed: tables -->")[1].split("<!-- end -->")[0]
    commands = [line for line in tables.splitlines() if line.startswith("flashrt bench")]
    assert commands == [cost_page.command(*case) for case in cost_page.CASES]
    for line in commands:
        build_parser().parse_args(line.split()[1:])
    assert cost_page.figures() in page
