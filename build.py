"""Ahead of time: `python build.py cpu`, `python build.py cuda --arch sm_90,sm_120 --out DIR`.

IS: what would be compiled at load, compiled now, and for CUDA what each kernel takes: registers,
shared memory, spills; with --sass what its inner loop executes. Needs neither a GPU nor a driver.
The folder of --out is a kernel cache: point FLASHRT_CACHE_DIR at it, on this machine or another.
IS NOT: needed; `flashrt.load` compiles what is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from flashrt.backends.cpu import compile as cpu_compile
from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.compiler_api import Unit
from flashrt.backends.cuda.device import ACTS
from flashrt.backends.cuda.fused_ops import FUSED_OPS
from flashrt.backends.cuda.fusion import SendTo, fuse
from flashrt.backends.cuda.nvrtc import Nvrtc, resources
from flashrt.backends.cuda.occupancy import blocks_at_once, multiprocessor
from flashrt.backends.cuda.sass import Counts, disassembler, inner_loops
from flashrt.backends.cuda.sources import Sources
from flashrt.base.errors import CompileError, FlashrtError
from flashrt.base.flags import flags, thread_count
from flashrt.commands.bench.gpu.cost.paper import ADDRESS, lay_out
from flashrt.core.op import Launch
from flashrt.core.region import ActDTypes
from flashrt.core.runs import MAX_RUNS
from flashrt.hub.resolve import resolve
from flashrt.load import DRAFT_HEAD_TENSOR, KV_DTYPES, kv_dtype_of, model_in
from flashrt.models import Model, model_for
from flashrt.models.flow_policy.config import MODEL_TYPE, config_of, parse_config
from flashrt.models.flow_policy.model import FlowPolicy
from flashrt.models.model import PREFILL_ROWS, tapes_of
from flashrt.ops import OPS
from flashrt.weights.opening import open_weights
from flashrt.weights.random_checkpoint import SHAPES, shape_config
from flashrt.weights.random_policy import policy_config

ARCHS: Final = (
    "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121",
)  # fmt: skip
# Kernel variants depend on the device's size: from Orin to Blackwell.
MULTIPROCESSORS: Final = (8, 20, 48, 84, 108, 132, 148, 170, 188)


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel in the report."""

    arch: str
    source: str
    kernel: str
    defines: str
    registers: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    blocks_at_once: int  # of a multiprocessor
    inner_loop: Counts | None = None  # with --sass


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except FlashrtError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1


def build_cpu(arguments: argparse.Namespace) -> int:
    """Compile the CPU kernel library."""
    started = time.perf_counter()
    binary = cpu_compile.library(OPS, arguments.out and arguments.out / "cpu")
    seconds = time.perf_counter() - started
    print(f"{binary.path}: {'up to date' if binary.was_cached else f'built in {seconds:.1f} s'}")
    return 0


def build_cuda(arguments: argparse.Namespace) -> int:
    """Compile all kernels that a model needs, for each architecture."""
    if arguments.sass:
        disassembler()  # before minutes of compiling, not after
    recorded = _recorded(arguments)
    rows: list[Row] = []
    for arch in arguments.arch:
        started = time.perf_counter()
        compiler = Nvrtc(arch, arguments.out and arguments.out / "cuda")
        launches = _launches(arguments, recorded, arch)
        made = compile_all(compiler, launches, has_sass=arguments.sass)
        rows += made
        seconds = time.perf_counter() - started
        print(
            f"{arch}: {len(made)} kernels by {compiler.identity.split(' --')[0]}, {seconds:.1f} s"
        )
    (report_loops if arguments.sass else report)(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if arguments.markdown:
        text = markdown_loops(rows) if arguments.sass else markdown(rows)
        arguments.markdown.write_text(text)
    spilling = sorted({f"{row.kernel} ({row.arch})" for row in rows if row.spill_bytes})
    if spilling:
        print(f"spills: {', '.join(spilling)}")
    return 1 if spilling and arguments.no_spills else 0


def compile_all(
    compiler: Nvrtc, launches: Sequence[kernels.KernelLaunch], *, has_sass: bool = False
) -> list[Row]:
    """Compile the launches' units, several at a time; a row per kernel that is launched.

    `has_sass`: with counts of the inner loops. Raises CompileError, BackendError.
    """
    sources = Sources()
    sources.set_ops(OPS)
    by_unit: dict[Unit, dict[str, tuple[int, int]]] = {}  # most dynamic shared memory, threads
    for launch in launches:
        wanted = by_unit.setdefault(sources.unit(launch), {})
        before = wanted.get(launch.kernel, (0, 0))
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        wanted[launch.kernel] = (max(before[0], launch.shared_bytes), max(before[1], threads))

    def compiled(unit: Unit) -> tuple[str, dict[str, Counts]]:
        binary = compiler.compile(unit)
        return binary.log, inner_loops(binary.content) if has_sass else {}

    with ThreadPoolExecutor(thread_count()) as pool:
        results = list(pool.map(compiled, by_unit))
    rows = []
    for (unit, wanted), (log, loops) in zip(by_unit.items(), results, strict=True):
        defines = " ".join(f"{name}={value}" for name, value in unit.defines)
        for found in resources(log):
            if found.kernel not in wanted:
                continue
            dynamic, threads = wanted[found.kernel]
            at_once = blocks_at_once(
                multiprocessor(compiler.arch), threads, found.registers,
                found.shared_bytes + dynamic,
            )  # fmt: skip
            rows.append(
                Row(
                    compiler.arch, unit.name, found.kernel, defines, found.registers,
                    found.shared_bytes, dynamic, found.stack_bytes, found.spill_bytes, at_once,
                    loops.get(found.kernel),
                )
            )  # fmt: skip
    return sorted(rows, key=lambda row: (row.source, row.kernel, row.defines))


def report(rows: Iterable[Row]) -> None:
    """A table of what kernels take."""
    table = Table("arch", "kernel", "defines", "registers", "static", "dynamic", "stack", "spills")
    for row in rows:
        style = "bold red" if row.spill_bytes else ""
        numbers = (
            row.registers, row.static_shared_bytes, row.dynamic_shared_bytes, row.stack_bytes,
            row.spill_bytes,
        )  # fmt: skip
        table.add_row(row.arch, row.kernel, row.defines, *map(str, numbers), style=style)
    # A log file has no width; wide enough for the longest defines then.
    Console(width=None if sys.stdout.isatty() else 180).print(table)


_LOOP_COLUMNS: Final = (
    "loop", "mma", "moves", "to mma", "prmt", "lds", "sts", "ldg", "16 B", "copies", "16 B",
    "registers", "shared", "spills", "blocks",
)  # fmt: skip
_LOOP_CAPTION: Final = (
    "Instructions of the inner loop (that with most tensor instructions, or the longest), and of "
    "them: tensor, register moves, those to operands of tensor instructions, byte permutes, loads "
    "and stores of shared memory, loads of global memory, copies from global to shared, and how "
    "many of these have 16 bytes. Then registers of a thread, bytes of shared memory and of "
    "spills, and blocks that a multiprocessor holds at once."
)


def _loop_cells(row: Row) -> list[str]:
    loop = row.inner_loop
    if loop is None:
        return ["?"] * len(_LOOP_COLUMNS)
    numbers = (
        loop.instructions, loop.tensor, loop.moves, loop.operand_moves, loop.permutes,
        loop.shared_loads, loop.shared_stores, loop.global_loads, loop.global_loads_128,
        loop.copies, loop.copies_128, row.registers,
        row.static_shared_bytes + row.dynamic_shared_bytes, row.spill_bytes, row.blocks_at_once,
    )  # fmt: skip
    return [str(n) for n in numbers]


def report_loops(rows: Iterable[Row]) -> None:
    """A table of what the inner loops of kernels execute, and how many blocks fit at once."""
    table = Table("arch", "kernel", "defines", *_LOOP_COLUMNS, caption=_LOOP_CAPTION)
    for row in rows:
        style = "bold red" if row.spill_bytes else ""
        table.add_row(row.arch, row.kernel, row.defines, *_loop_cells(row), style=style)
    Console(width=None if sys.stdout.isatty() else 240).print(table)


def markdown_loops(rows: Iterable[Row]) -> str:
    """The same table."""
    lines = [
        f"| arch | kernel | defines | {' | '.join(_LOOP_COLUMNS)} |",
        f"|---|---|---|{'---:|' * len(_LOOP_COLUMNS)}",
    ]
    for row in rows:
        cells = " | ".join(_loop_cells(row))
        lines.append(f"| {row.arch} | {row.kernel} | {row.defines} | {cells} |")
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """Registers of each kernel (a row) on each architecture (a column), spilled bytes in bold."""
    archs = list(dict.fromkeys(row.arch for row in rows))
    cells = {
        (row.kernel, row.defines, row.arch): f"{row.registers}"
        + (f" **+{row.spill_bytes}**" if row.spill_bytes else "")
        for row in rows
    }
    shared = {(r.kernel, r.defines): (r.static_shared_bytes, r.dynamic_shared_bytes) for r in rows}
    lines = [
        f"| kernel | defines | shared, bytes | {' | '.join(archs)} |",
        f"|---|---|---:|{'---:|' * len(archs)}",
    ]
    for (kernel, defines), (static, dynamic) in shared.items():
        registers = " | ".join(cells.get((kernel, defines, arch), "") for arch in archs)
        lines.append(f"| {kernel} | {defines} | {static} + {dynamic} | {registers} |")
    return "\n".join(lines) + "\n"


def _launches(
    arguments: argparse.Namespace, recorded: Recorded, arch: str
) -> list[kernels.KernelLaunch]:
    """Every distinct kernel variant of a model's tapes, on devices of any size."""
    found: dict[kernels.KernelLaunch, None] = {}
    for n_sms in MULTIPROCESSORS:
        for launch in (kernels.copy_launch(1, n_sms), kernels.digest_launch(1, n_sms)):
            found[launch] = None
    for acts, launches in recorded.items():
        for one in launches:
            for n_sms in MULTIPROCESSORS:
                found.update(dict.fromkeys(kernels.expand(one, acts, n_sms, arch)))
    if not arguments.kernels:
        return list(found)
    wanted = [launch for launch in found if launch.kernel in arguments.kernels]
    if missing := set(arguments.kernels) - {launch.kernel for launch in wanted}:
        names = sorted({launch.kernel for launch in found})
        raise CompileError(f"no kernel {sorted(missing)} in this model; there are {names}")
    return wanted


Recorded = Mapping[ActDTypes, Sequence[Launch]]


def _recorded(arguments: argparse.Namespace) -> Recorded:
    """By activations, the launches of a checkpoint's model; without one, of two language models and
    a policy. Each as the tape has it, and fused.
    """
    models = _models_of(arguments) if arguments.checkpoint is not None else _shapes_of(arguments)
    found: dict[ActDTypes, list[Launch]] = {}
    send_to = SendTo(ADDRESS, ADDRESS)
    for acts in (ACTS[name] for name in arguments.precision):
        launches = found[acts] = []
        for model in models:
            for plain in lay_out(model, acts, tapes_of(model, MAX_RUNS)).bound.values():
                launches += [bound.launch for bound in plain]
                fused = [bound.launch for bound in fuse(plain, acts, ADDRESS, send_to)]
                launches += [launch for launch in fused if launch.op in FUSED_OPS]
    return found


def _models_of(arguments: argparse.Namespace) -> list[Model]:
    """A checkpoint's, its weights in the formats that it has them in."""
    source = open_weights(resolve(str(arguments.checkpoint)))
    if source.config.get("model_type") == MODEL_TYPE:
        return [FlowPolicy(config_of(source))]
    return [  # prefill without a draft head ends otherwise
        model_in(
            source,
            max_positions=arguments.max_positions,
            kv_dtype=arguments.kv_dtype,
            draft=draft,
        )
        for draft in {False, DRAFT_HEAD_TENSOR in source.tensors}
    ]


def _shapes_of(arguments: argparse.Namespace) -> list[Model]:
    """A hybrid of a named shape with and without a draft head, a dense one, and a policy."""
    config = shape_config(arguments.shape, has_draft_head=True)
    dense = {name: config[name] for name in _SHARED_FIELDS} | {"model_type": "qwen2"}
    models: list[Model] = [FlowPolicy(parse_config(policy_config("base")))]
    models += (
        model_for(
            fields,
            max_positions=arguments.max_positions,
            kv_dtype=kv_dtype_of(arguments.kv_dtype),
            has_draft_head=with_draft_head,
            prefill_rows=PREFILL_ROWS[-1],
        )
        for fields, with_draft_head in ((config, False), (config, True), (dense, False))
    )
    return models


_SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="build.py", description="Compile kernels ahead of time, without a GPU."
    )
    commands = parser.add_subparsers(required=True)
    cache = f"a kernel cache to fill (default: {flags().cache_dir})"

    cpu = commands.add_parser("cpu", help="the CPU kernel library, for this machine")
    cpu.add_argument("--out", type=Path, metavar="DIR", help=cache)
    cpu.set_defaults(run=build_cpu)

    cuda = commands.add_parser("cuda", help="cubins for a model, and what each kernel takes")
    cuda.add_argument(
        "--arch", type=_archs, default=ARCHS, metavar="LIST",
        help=f"architectures, separated by commas (default: {','.join(ARCHS)})",
    )  # fmt: skip
    cuda.add_argument("--out", type=Path, metavar="DIR", help=cache)
    which = cuda.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint's shape")
    which.add_argument("--shape", choices=sorted(SHAPES), default="0.8b", help="default: 0.8b")
    cuda.add_argument(
        "--precision", type=_precisions, default=["bfloat16"], metavar="LIST",
        help=f"of {','.join(ACTS)} (default: bfloat16)",
    )  # fmt: skip
    cuda.add_argument("--kv-dtype", choices=KV_DTYPES, default="bfloat16")
    cuda.add_argument("--max-positions", type=int, default=4096, metavar="N")
    cuda.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON too")
    cuda.add_argument("--markdown", type=Path, metavar="FILE", help="write it as Markdown too")
    cuda.add_argument(
        "--sass", action="store_true",
        help="count what the inner loops execute: pip install 'flashrt[sass]'",
    )  # fmt: skip
    cuda.add_argument(
        "--kernels", type=lambda text: text.split(","), default=[], metavar="LIST",
        help="only these, e.g. linear_many,linear_few (default: all)",
    )  # fmt: skip
    cuda.add_argument("--no-spills", action="store_true", help="fail if a kernel spills registers")
    cuda.set_defaults(run=build_cuda)
    return parser


def _archs(text: str) -> list[str]:
    return [name if name.startswith("sm_") else f"sm_{name}" for name in text.split(",")]


def _precisions(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(ACTS):
        raise argparse.ArgumentTypeError(f"unknown {sorted(unknown)}; choose of {[*ACTS]}")
    return names


if __name__ == "__main__":
    sys.exit(main())
