"""The bench's document as tables.

IS: figures -> what a person reads. IS NOT: measurement. Called by: bench.
"""

from __future__ import annotations

from rich.table import Table

from flashrt.commands import console
from flashrt.commands.bench.document import Document, show_opening
from flashrt.view.units import bytes_text, percent_text, rate_text, seconds_text, significant


def show(document: Document) -> None:
    """Print everything on stdout."""
    screen = console.screen()
    limits = document["limits"]
    show_opening(screen, document)
    if limits["fma_flops"] is not None:
        screen.print(
            f"limits in this run: {significant(limits['fma_flops'] / 1e9)} GFLOP/s multiply-add, "
            f"{rate_text(limits['read_bytes_per_s'])} reading the weights "
            f"({bytes_text(limits['streamed_bytes'])} in {seconds_text(limits['stream_s'])}), "
            f"{rate_text(limits['memcpy_bytes_per_s'])} memcpy of a large range"
        )
    screen.print()
    screen.print(_speed(document))
    screen.print(_starts(document))
    screen.print(_restores(document))
    screen.print(_snapshots(document))
    against = _against(document)
    if against.row_count:
        screen.print(against)
    notes = [
        "Medians. Decode: tokens over the time of all of them; ITL: inter-token latency.",
        f"Warm: full restore into a lane that holds another text, {document['turn_tokens']} "
        "tokens, first token.",
        "Restore of memcpy: the same bytes by libc's memcpy, taking turns, over the restore.",
    ]
    screen.print("[dim]" + "\n".join(notes) + "[/]")
    exact = all(row["is_exact"] for row in document["rows"])
    screen.print(f"Digests equal after every restore: {console.yes_no(exact)}")


def _speed(document: Document) -> Table:
    columns = (
        ">tokens", ">prefill tok/s", ">of FMA peak", ">decode tok/s", ">of streaming",
        ">ITL p50", ">ITL p99",
    )  # fmt: skip
    rows = [
        [
            f"{row['tokens']:,}",
            significant(row["prefill_tokens_per_s"]),
            _fraction(row["prefill_of_fma_peak"]),
            significant(row["decode_tokens_per_s"]),
            _fraction(row["decode_of_streaming"]),
            seconds_text(row["inter_token_p50_s"]),
            seconds_text(row["inter_token_p99_s"]),
        ]
        for row in document["rows"]
    ]
    return console.table("Prefill from empty, decode at that position", columns, rows)


def _starts(document: Document) -> Table:
    columns = (">tokens", ">TTFT cold", ">TTFT warm", ">cold / warm")
    rows = [
        [
            f"{row['tokens']:,}",
            seconds_text(row["ttft_cold_s"]),
            seconds_text(row["ttft_warm_s"]),
            f"{significant(row['ttft_ratio'])} x",
        ]
        for row in document["rows"]
    ]
    return console.table("Time to first token of a turn after a prompt", columns, rows)


_COMPARED = (  # key, what, whether more is better
    ("prefill_tokens_per_s", "prefill tok/s", True),
    ("decode_tokens_per_s", "decode tok/s", True),
    ("ttft_warm_s", "TTFT warm", False),
)


def _against(document: Document) -> Table:
    """Ours beside the reference, wherever both have a figure."""
    rows = []
    for key, what, is_rate in _COMPARED:
        for row in document["rows"]:
            reference = document["reference"].get(key, {}).get(row["tokens"])
            if reference is not None:
                times = row[key] / reference if is_rate else reference / row[key]
                text = significant if is_rate else seconds_text
                cells = [what, f"{row['tokens']:,}", text(reference), text(row[key])]
                rows.append([*cells, f"{significant(times)} x"])
    columns = ("", ">tokens", ">llama.cpp f16", ">flashrt", ">speed ratio")
    return console.table(f"Reference: {document['reference_note']}", columns, rows)


def _restores(document: Document) -> Table:
    columns = (
        ">tokens", ">restore", ">bytes", ">bytes/s", ">of memcpy", ">to an ancestor", ">bytes",
    )  # fmt: skip
    rows = [
        [
            f"{row['tokens']:,}",
            seconds_text(row["restore_s"]),
            bytes_text(row["restore_bytes"]),
            rate_text(row["restore_bytes_per_s"]),
            _fraction(row["restore_of_memcpy"]),
            seconds_text(row["restore_ancestor_s"]),
            bytes_text(row["restore_ancestor_bytes"]),
        ]
        for row in document["rows"]
    ]
    return console.table("Restore: everything; to an ancestor, whose rows are there", columns, rows)


def _snapshots(document: Document) -> Table:
    ahead, back = document["rollback_tokens"]
    columns = (
        ">tokens", ">snapshot", ">bytes", ">snapshot of a turn", ">bytes",
        f">back {back} of {ahead}",
    )  # fmt: skip
    rows = [
        [
            f"{row['tokens']:,}",
            seconds_text(row["snapshot_s"]),
            bytes_text(row["snapshot_bytes"]),
            seconds_text(row["snapshot_turn_s"]),
            bytes_text(row["snapshot_turn_bytes"]),
            seconds_text(row["rollback_s"]),
        ]
        for row in document["rows"]
    ]
    return console.table("Snapshot: everything; of a turn. Rollback, with replay", columns, rows)


def _fraction(value: float | None) -> str:
    return "-" if value is None else percent_text(value)
