"""The tables of docs/cuda-cost.md, computed again from the kernels as they are.

IS: the text between the page's markers; a minute or two per architecture, for every kernel is
compiled and disassembled (`pip install -e '.[dev]'` has what it takes). IS NOT: a measurement.

    python tools/cost_page.py            # rewrites the page in place
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from flashrt.backends.cuda.device import ACTS
from flashrt.base.flags import thread_count
from flashrt.commands.bench.document import Document
from flashrt.commands.bench.gpu.cost import report
from flashrt.commands.bench.gpu.cost.code import Codes
from flashrt.commands.bench.gpu.cost.devices import GPUS, Gpu
from flashrt.commands.bench.gpu.cost.graph import CostModel
from flashrt.commands.bench.gpu.cost.paper import PaperEngine
from flashrt.commands.bench.gpu.cost.run import ALL, GpuModelOptions, document_of
from flashrt.load import Precision
from flashrt.view.units import percent_text, seconds_text, significant

PAGE: Final = Path(__file__).resolve().parents[1] / "docs/cuda-cost.md"
SHORT, LONG = 2048, 16384
CHUNK: Final = 64  # rows of the delta rule in chunks
SOLVE_CYCLES: Final = 30  # of a row of its triangle, after the row before
DELTA_GPUS, DELTA_SHAPES = ("rtx-5090", "h200", "orin"), ("0.8b", "27b")
CASES: Final = (
    ("27b", "nvfp4", ("rtx-5090", "h200")),
    ("27b", "int4", ("rtx-5090", "h200")),
    ("27b", "bfloat16", ("h200",)),
    ("0.8b", "bfloat16", (ALL,)),
    ("0.8b", "int4", (ALL,)),
)
OPS_OF: Final = ("27b", "nvfp4", "rtx-5090")  # whose ops are shown
_OPS_SHOWN: Final = 6
# FlashRT upstream's own figures: 27B, NVFP4, RTX 5090, without drafting.
UPSTREAM: Final = (("tokens/s of decode", 36.0), ("TTFT at 2k, s", 0.25), ("TTFT at 16k, s", 1.57))
_FP4_OVER_BF16: Final = 8  # dense FP4 products of the RTX 5090 over bfloat16: 1,676 / 209.5

_codes: dict[str, Codes | None] = {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    page: Path = parser.parse_args(arguments).page
    started = time.monotonic()
    print(f"kernels are compiled and disassembled by {thread_count()} threads", file=sys.stderr)
    text = page.read_text()
    for name, make in SECTIONS.items():
        text = with_section(text, name, make())
        print(f"[{time.monotonic() - started:5.0f} s] {name}", file=sys.stderr)
    page.write_text(text)
    return 0


def with_section(text: str, name: str, content: str) -> str:
    """The page with what stands between the markers of a section replaced."""
    pattern = re.compile(
        rf"(<!-- computed: {name} -->\n).*?(<!-- end -->)", re.MULTILINE | re.DOTALL
    )
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"the page has not one section {name!r}")
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n{found[2]}", text)


def command(shape: str, form: str, gpus: Sequence[str]) -> str:
    """What prints a table."""
    return f"flashrt bench --gpu-model {','.join(gpus)} --shape {shape} --format {form}"


def computed(shape: str, form: str, gpus: tuple[str, ...]) -> Document:
    """The document of a case at both lengths; no kernel is disassembled twice."""
    options = GpuModelOptions(gpus, shape, form, lengths=(SHORT, LONG))
    return document_of(options, _codes)


def figures() -> str:
    """The GPUs: published, then assumed."""
    header = ("`--gpu-model`", "arch", ">SMs", ">GHz", ">bf16 TFLOP/s", ">DRAM GB/s", ">L2 MB",
              ">*L2 TB/s*", ">*mma.sync*", ">*DRAM*")  # fmt: skip
    rows = [
        [
            f"`{name}`", g.arch, f"{g.multiprocessors}", significant(g.clock_hz / 1e9),
            significant(g.tensor_flops / 1e12, 4), f"{g.memory_bytes_per_s / 1e9:,.0f}",
            f"{g.l2_bytes >> 20}", significant(g.l2_bytes_per_s / 1e12, 2),
            percent_text(g.mma_reach), percent_text(g.dram_reach),
        ]
        for name, g in GPUS.items()
    ]  # fmt: skip
    return report.markdown(header, rows)


def tables() -> str:
    """A table per case, below the command that prints it."""
    header = ("GPU", ">launches", ">decode at 2k", ">tokens/s", ">at 16k", "limits of decode, 2k",
              ">TTFT at 2k", ">at 16k", "limits of prefill, 16k")  # fmt: skip
    parts = []
    for shape, form, gpus in CASES:
        document = computed(shape, form, gpus)
        rows = []
        for gpu in document["gpus"]:
            short, long = gpu["rows"]
            first, last = report.summary(gpu, 0), report.summary(gpu, 1)
            decode = short["decode"]
            rows.append([
                first[0], f"{decode['launches']}", first[1], first[2],
                seconds_text(long["decode"]["us"] / 1e6), first[4], first[5], last[5], last[6],
            ])  # fmt: skip
        weights = document["gpus"][0]["weights_bytes"] / 1e9
        parts.append(
            f"{shape.upper()}, {form}, {weights:.1f} GB of weights:\n\n"
            f"```sh takes minutes\n{command(shape, form, gpus)}\n```\n\n"
            f"{report.markdown(header, rows)}"
        )
    return "\n".join(parts)


def largest_ops() -> str:
    """What takes most of a token and of a prompt, on one GPU."""
    shape, form, name = OPS_OF
    (gpu,) = computed(shape, form, (name,))["gpus"]
    row = gpu["rows"][0]
    parts = []
    for graph, what in ((row["decode"], "a token at 2k"), (row["prefill"], "a prompt of 2k")):
        rows = report.op_rows(graph, gpu["figures"]["memory_bytes_per_s"])[:_OPS_SHOWN]
        title = f"{shape.upper()}, {form}, {gpu['figures']['title']}, {what}"
        parts.append(
            f"{title}, {report.replays_text(graph)}:\n\n"
            f"{report.markdown(report.op_header(graph), rows)}"
        )
    return "\n".join(parts)


def against_upstream() -> str:
    """Upstream, us, and us with one figure changed, which says what the difference rests on."""
    gpu = GPUS["rtx-5090"]
    codes = _codes.get(gpu.arch)
    cases: tuple[tuple[str, Precision, int], ...] = (
        ("flashrt by this model", "bfloat16", 1),
        ('with `precision="fast"`: one part of x throughout', "fast", 1),
        ("and tensor cores 8 times as fast: the rate of FP4 products", "fast", _FP4_OVER_BF16),
    )
    rows = [["FlashRT upstream, its own figures", *(significant(n) for _, n in UPSTREAM), ""]]
    for what, precision, times in cases:
        faster = replace(gpu, tensor_flops=times * gpu.tensor_flops)
        cost = CostModel(PaperEngine("27b", "nvfp4", LONG + 512, ACTS[precision]), faster, codes)
        first_us, decode = cost.first_token().us, cost.decode(SHORT)
        prompts = [cost.prefill(n) for n in (SHORT, LONG)]
        by_limit = {str(limit): us for limit, us in prompts[0].by_limit.items()}
        limits = report.limits({"us": prompts[0].us, "by_limit": by_limit})
        seconds = [significant((p.us + first_us) / 1e6) for p in prompts]
        rows.append([what, significant(1e6 / decode.us), *seconds, limits])
    header = ("27B, NVFP4, RTX 5090", *(f">{what}" for what, _ in UPSTREAM), "limits of prefill")
    return report.markdown(header, rows)


def delta_rules() -> str:
    """The delta rule row by row, as it is, and an estimate of it in chunks."""
    header = ("GPU", "model", ">row by row", ">in chunks", ">TTFT at 2k", ">with chunks")
    rows = []
    for name in DELTA_GPUS:
        for shape in DELTA_SHAPES:
            gpu = GPUS[name]
            engine = PaperEngine(shape, "bfloat16", SHORT + 512, ACTS["bfloat16"])
            cost = CostModel(engine, gpu, _codes.get(gpu.arch))
            prompt, first_us = cost.prefill(SHORT), cost.first_token().us
            rule = next(op for op in prompt.ops if op.op == "delta_rule")
            chunked = _chunked_us(gpu, rule.dims, SHORT)
            gained = rule.us - rule.launches * chunked
            rows.append([
                gpu.title, shape.upper(), f"{rule.us / rule.launches:.0f} us", f"{chunked:.0f} us",
                seconds_text((prompt.us + first_us) / 1e6),
                seconds_text((prompt.us + first_us - gained) / 1e6),
            ])  # fmt: skip
    return report.markdown(header, rows)


def _chunked_us(gpu: Gpu, dims: Mapping[str, int], rows: int) -> float:
    """Of one layer. A block has 16 columns of a head's state, as now. Per chunk it multiplies q k^T
    and k k^T, k S, q S and k^T u, and applies the solved triangle twice, each in three products of
    bfloat16 parts, since operands are float32; the triangle is solved row after row.
    """
    dk, columns = dims["dk"], 16
    macs = CHUNK * (2 * CHUNK * dk + 3 * dk * columns + 2 * CHUNK * columns)
    blocks = dims["Hv"] * -(-dims["dv"] // columns)
    per_sm = -(-blocks // gpu.multiprocessors)
    rate = gpu.tensor_flops * gpu.mma_reach / gpu.multiprocessors
    chunk_s = per_sm * 3 * 2 * macs / rate + CHUNK * SOLVE_CYCLES / gpu.clock_hz
    return 1e6 * chunk_s * rows / CHUNK


SECTIONS: Final[dict[str, Callable[[], str]]] = {
    "figures": figures,
    "tables": tables,
    "ops": largest_ops,
    "upstream": against_upstream,
    "delta": delta_rules,
}


if __name__ == "__main__":
    sys.exit(main())
