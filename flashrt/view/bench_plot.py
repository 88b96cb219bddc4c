"""The bench's document as a picture: four panels over context length.

IS: figures -> PNG or SVG. IS NOT: measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashrt.view.figure import new_figure, save_figure

OURS, LIMIT, WARM, REFERENCE = "#2f6fb0", "#8c959f", "#c8741a", "#3d8f57"
TURN = "#8a63b8"
Document = Mapping[str, Any]


def plot(document: Document, path: Path) -> Path:
    """Draw and write. Raises FlashrtError without matplotlib or when it cannot be written."""
    figure = new_figure(11, 7.2)
    (prefill, decode), (starts, copies) = figure.subplots(2, 2)
    _prefill(prefill, document)
    _decode(decode, document)
    _starts(starts, document)
    _copies(copies, document)
    for axes in figure.axes:
        _finish(axes, document)
    machine = document["machine"]
    figure.get_layout_engine().set(hspace=0.06, wspace=0.05)
    figure.suptitle(
        f"{document['model']} on {document['device']}: {machine['processor']}, "
        f"{document['threads']} threads, {document['date'][:10]}",
        fontsize=11,
        parse_math=False,
    )
    return save_figure(figure, path)


def _prefill(axes: Any, document: Document) -> None:
    axes.set_title("prefill, tokens/s")
    _line(axes, document, "prefill_tokens_per_s", "flashrt", OURS)
    if document["limits"]["fma_flops"] is not None:
        peak = [r["prefill_tokens_per_s"] / r["prefill_of_fma_peak"] for r in document["rows"]]
        axes.plot(_lengths(document), peak, "--", color=LIMIT, label="multiply-add peak")
    _peer(axes, document, "prefill_tokens_per_s")


def _decode(axes: Any, document: Document) -> None:
    axes.set_title("decode, tokens/s")
    _line(axes, document, "decode_tokens_per_s", "flashrt", OURS)
    if document["limits"]["stream_s"] is not None:
        limit = [1 / document["limits"]["stream_s"]] * len(document["rows"])
        axes.plot(_lengths(document), limit, "--", color=LIMIT, label="reading the weights once")
    _peer(axes, document, "decode_tokens_per_s")


def _starts(axes: Any, document: Document) -> None:
    axes.set_title("time to first token, ms")
    _line(axes, document, "ttft_cold_s", "cold prefill", OURS, scale=1e3)
    _line(axes, document, "ttft_warm_s", "warm: restore + turn", WARM, scale=1e3)
    _line(axes, document, "ttft_turn_s", "a turn after a reply", TURN, scale=1e3)
    _peer(axes, document, "ttft_warm_s", scale=1e3)
    axes.set_yscale("log")


def _copies(axes: Any, document: Document) -> None:
    axes.set_title("snapshot, restore, rollback, ms")
    _line(axes, document, "snapshot_s", "snapshot, everything", OURS, scale=1e3)
    _line(axes, document, "restore_s", "restore, everything", WARM, scale=1e3)
    _line(axes, document, "restore_ancestor_s", "restore of an ancestor", REFERENCE, scale=1e3)
    _line(axes, document, "rollback_s", "rollback, with replay", TURN, scale=1e3)
    if all("memcpy_s" in row for row in document["rows"]):
        memcpy = [1e3 * row["memcpy_s"] for row in document["rows"]]
        axes.plot(_lengths(document), memcpy, "--", color=LIMIT, label="memcpy of everything")
    axes.set_yscale("log")


def _line(
    axes: Any, document: Document, key: str, label: str, color: str, scale: float = 1.0
) -> None:
    values = [scale * row[key] for row in document["rows"]]
    axes.plot(_lengths(document), values, "o-", color=color, label=label, markersize=4.5)


def _peer(axes: Any, document: Document, key: str, scale: float = 1.0) -> None:
    peer = document["peer"]
    if peer is not None:
        values = [scale * peer[key][n] for n in _lengths(document)]
        axes.plot(_lengths(document), values, "D", color=REFERENCE, label=peer["name"])


def _lengths(document: Document) -> list[int]:
    return [row["tokens"] for row in document["rows"]]


def _finish(axes: Any, document: Document) -> None:
    lengths = _lengths(document)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context")
    low, high = axes.get_ylim()
    is_log = axes.get_yscale() == "log"
    axes.set_ylim(low if is_log else 0, high * (6 if is_log else 1.25))  # room for the legend
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
