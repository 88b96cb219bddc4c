"""The model of cost as tables: a line per GPU, and for one GPU a line per op.

IS: figures -> what a person reads, on the screen and as Markdown for docs/cuda-cost.md. IS NOT:
figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flashrt.commands import console
from flashrt.commands.bench.document import Document
from flashrt.commands.console import Screen, styled
from flashrt.view.units import bytes_text, percent_text, seconds_text, significant

_LEAST_SHARE = 0.02  # of a graph's time, below which a limit is not named
_RATES = {"read_bytes_per_s": "TB/s read from DRAM", "mma_flops": "TFLOP/s of a bare mma loop"}
_DIMS = ("T", "N", "K")  # that a table has room for
HEADER = ("GPU", ">decode", ">tokens/s", ">of DRAM", "its time goes to", ">first token",
          "its time goes to")  # fmt: skip


def show(document: Document) -> None:
    """All of it: for one GPU with its ops at the first length."""
    screen = console.screen()
    form, precision = document["weights"], document["precision"]
    screen.print(
        "\n", styled(f"{document['shape']}, weights in {form}, precision {precision}", "bold"),
        ": computed from published figures, not measured",
    )  # fmt: skip
    gpus = document["gpus"]
    for i, row in enumerate(gpus[0]["rows"]):
        title = f"At {row['tokens']:,} tokens"
        screen.print(console.table(title, HEADER, [summary(gpu, i) for gpu in gpus]))
    if len(gpus) == 1:
        _show_ops(screen, gpus[0])
    _notes(screen, document)


def summary(gpu: Document, index: int) -> list[str]:
    """Cells of HEADER for the length of an index."""
    row = gpu["rows"][index]
    decode, prefill = row["decode"], row["prefill"]
    figures = gpu["figures"]
    bandwidth = decode["dram_bytes"] / (decode["us"] / 1e6) / figures["memory_bytes_per_s"]
    return [
        figures["title"] + ("" if gpu["fits"] else " (does not fit)"),
        _time(decode["us"], decode["measured_us"]),
        significant(1e6 / decode["us"]),
        percent_text(bandwidth),
        limits(decode),
        _time(row["ttft_us"], row["ttft_measured_us"]),
        limits(prefill),
    ]


def limits(graph: Document) -> str:
    """What limits a graph, most of it first."""
    shares = {name: us / graph["us"] for name, us in graph["by_limit"].items()}
    named = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{n} {share:.0%}" for n, share in named if share >= _LEAST_SHARE)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; columns whose name begins with `>` are to the right."""
    lines = [
        f"| {' | '.join(name.lstrip('>') for name in header)} |",
        "|" + "|".join("---:" if name.startswith(">") else "---" for name in header) + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _time(us: float, measured_us: float | None) -> str:
    """A time, and the measured one where there is one."""
    text = seconds_text(us / 1e6)
    return text if measured_us is None else f"{text} (measured {seconds_text(measured_us / 1e6)})"


def replays_text(graph: Document) -> str:
    """How many launches, replays and rows."""
    replays, rows = graph["replays"], graph["rows"]
    each = f"{rows} rows" if rows > 1 else "1 row"
    return f"{graph['launches']:,} launches in {replays} replay{'s' * (replays > 1)} of {each}"


def op_header(graph: Document) -> list[str]:
    """Columns of `op_rows`; one for measured times where there are any."""
    is_measured = any(op["measured_us"] is not None for op in graph["ops"])
    header = ["op", "dims", "weights", ">launches", ">each", ">share", "limit", ">of DRAM"]
    return [*header, *([">measured"] if is_measured else [])]


def op_rows(graph: Document, memory_bytes_per_s: float) -> list[list[str]]:
    """A line per op and size."""
    is_measured = op_header(graph)[-1] == ">measured"
    rows = []
    for op in graph["ops"]:
        dims = " ".join(f"{n}={op['dims'][n]}" for n in _DIMS if n in op["dims"])
        of_dram = op["dram_bytes"] / (op["us"] / 1e6) / memory_bytes_per_s
        cells = [
            op["op"], dims, op["weights"], f"{op['launches']:,}",
            seconds_text(op["us"] / op["launches"] / 1e6), percent_text(op["share"]), op["limit"],
            percent_text(of_dram),
        ]  # fmt: skip
        if is_measured:
            us = op["measured_us"]
            cells.append("" if us is None else seconds_text(us / 1e6))
        rows.append(cells)
    return rows


def _show_ops(screen: Screen, gpu: Document) -> None:
    row = gpu["rows"][0]
    figures: dict[str, Any] = gpu["figures"]
    for graph, what in (
        (row["decode"], f"A token at {row['tokens']:,}"),
        (row["prefill"], f"A prompt of {row['tokens']:,}"),
    ):
        title = f"{what}: {replays_text(graph)}, {bytes_text(graph['dram_bytes'])} from and to DRAM"
        rows = op_rows(graph, figures["memory_bytes_per_s"])
        screen.print(console.table(title, op_header(graph), rows))


def _notes(screen: Screen, document: Document) -> None:
    notes = [
        "First token: the prompt in launches of the largest bucket, then head and sampling. "
        "Limits: shares of the time that launches take to begin (launch), and of the longest of "
        "what each needs: DRAM (memory), L2 (cache), tensor cores, instructions (issue), a single "
        "warp's way through them (latency). docs/cuda-cost.md says what is assumed.",
        *document["notes"],
        *(_measured_note(gpu) for gpu in document["gpus"] if gpu["measured"]),
    ]
    screen.print("\n".join(notes), style="dim")


def _measured_note(gpu: Document) -> str:
    """Where measured times come from, and the limits that the same run found."""
    found = [
        f"{significant(is_so / 1e12)} {_RATES[rate]}, assumed were {significant(assumed / 1e12)}"
        for rate, (assumed, is_so) in gpu["assumed_and_measured"].items()
        if is_so is not None
    ]
    return f"Measured: {'; '.join([gpu['measured'], *found])}"
