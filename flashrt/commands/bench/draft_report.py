"""The document of `flashrt bench --draft` as tables.

IS: figures -> what a person reads. IS NOT: measurement. Called by: bench_draft.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from flashrt.commands import console
from flashrt.commands.bench.document import Document, show_opening
from flashrt.view.units import percent_text, seconds_text, significant


def show(document: Document) -> None:
    """Print everything on stdout."""
    screen = console.screen()
    show_opening(screen, document)
    for row in document["rows"]:
        screen.print()
        screen.print(_costs(row, document["replays"]))
        screen.print(_speeds(row, document["repeats"]))
    notes = [
        "A replay: one verb of the engine from the same boundary, taking turns, with what the host "
        "writes and reads.",
        "Forced: true tokens were written over the drafts, each with the probability given; the "
        "drafts were still made.",
        "In brackets: share of all drafted tokens that were accepted; one that disagrees rejects "
        "those after it. auto learns within each run, from nothing.",
    ]
    screen.print("[dim]" + "\n".join(notes) + "[/]")
    exact = all(row["is_exact"] for row in document["rows"])
    screen.print(f"Tokens of every run equal those of draft=0: {console.yes_no(exact)}")


def _costs(row: dict[str, Any], replays: int) -> Table:
    cells = [
        [
            cost["what"],
            str(cost["rows"]),
            seconds_text(cost["median_s"]),
            f"{cost['of_decode']:.2f} x",
        ]
        for cost in row["costs"]
    ]
    title = f"One replay at position {row['position']:,}, median of {replays}"
    return console.table(title, ("", ">rows", ">time", ">of a decode"), cells)


def _speeds(row: dict[str, Any], repeats: int) -> Table:
    """A line per agreement, a column per draft length."""
    speeds = row["speeds"]
    lengths = list(dict.fromkeys(s["draft"] for s in speeds))
    columns = ("agreement", *(f">{f'draft={n}' if n != 'auto' else n}" for n in lengths))
    lines = [
        [_agreement(forced), *(_speed(s) for s in speeds if s["forced"] == forced)]
        for forced in dict.fromkeys(s["forced"] for s in speeds)
    ]
    title = (
        f"Tokens/s, greedy, {row['tokens']} tokens from position {row['position']:,}, "
        f"median of {repeats}"
    )
    return console.table(title, columns, lines)


def _agreement(forced: float | None) -> str:
    return "as the model agrees" if forced is None else f"forced: {forced:.1f}"


def _speed(speed: dict[str, Any]) -> str:
    text = significant(speed["tokens_per_s"])
    share = speed["acceptance"]
    return text if share is None else f"{text} ({percent_text(share)})"
