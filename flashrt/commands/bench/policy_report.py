"""The bench of a control loop as shown to people: tables, and the histogram as text.

IS: the document -> a report on the screen. IS NOT: measurement. Called by: bench_policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from flashrt.commands import console
from flashrt.commands.bench.document import Document, show_opening
from flashrt.view.units import bytes_text, seconds_text

_BAR = 60  # characters of the longest bar
_QUANTILES = ("p50", "p99", "p999", "max")


def show(document: Document) -> None:
    """Everything but the picture."""
    screen, shape = console.screen(), document["policy"]
    show_opening(screen, document)
    screen.print(
        f"{document['ticks']:,} ticks at {document['hz']:g} Hz; executes {shape['n_action_steps']} "
        f"of {shape['chunk_size']} actions planned in {shape['num_inference_steps']} Euler steps; "
        f"a capsule is {bytes_text(shape['capsule_bytes'])}\n"
    )
    rows = [
        ("tick: observation to action", "latency"),
        ("plan, in the slack of every chunk's last tick", "planning"),
        ("tick begun late by", "lateness"),
        ("restore", "restore"),
        ("snapshot", "snapshot"),
        ("fork onto another lane", "fork"),
    ]
    lines = [[label, *_quantiles(document, what)] for label, what in rows]
    for row in document["rewind"]:
        lines.append([f"rewind by {row['seconds']:g} s", *_quantiles(row, "rewind")])
    columns = ("", ">p50", ">p99", ">p99.9", ">max")
    screen.print(console.table("Times", columns, lines))
    _show_histogram(screen, document)
    _show_checks(screen, document)


def bars(counts: Sequence[int]) -> list[str]:
    """A bar per count; whatever occurred is seen."""
    most = max(counts, default=0)
    return ["█" * max(round(_BAR * n / most), 1) if n else "" for n in counts]


def _quantiles(document: Document, what: str) -> list[str]:
    return [seconds_text(document[f"{what}_{name}_s"]) for name in _QUANTILES]


def _show_histogram(screen: Console, document: Document) -> None:
    edges, counts = document["histogram"]["edges_s"], document["histogram"]["counts"]
    screen.print("[bold]Latency of ticks[/]")
    for low, count, bar in zip(edges[:-1], counts, bars(counts), strict=True):
        screen.print(f"{seconds_text(low):>8} {bar} {count or ''}")
    screen.print()


def _show_checks(screen: Console, document: Document) -> None:
    frozen = ", ".join(f"{document[n]} {n}" for n in ("allocations", "compilations", "captures"))
    screen.print(
        f"{document['overruns']} instants left out, {document['misses']} actions later than the "
        f"next instant; {frozen}"
    )
    is_exact = console.yes_no(document["is_exact"])
    screen.print(f"restored and rewound states go on to the bit: {is_exact}")
    for name, (limit, is_met) in document["targets"].items():
        what, quantile, _ = name.split("_")
        label = f"{what} {quantile}: {seconds_text(document[name])}"
        screen.print(f"{label}, under {seconds_text(limit)}: {console.yes_no(is_met)}")
