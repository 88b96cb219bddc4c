"""The GPU bench's documents as a picture: four panels over context length, a line per shape.

IS: figures -> PNG; without matplotlib there is no picture. IS NOT: ratios; the documents have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrt.view.figure import has_matplotlib, new_figure, save_figure

Document = dict[str, Any]
_COLORS = ("#2f6fb0", "#c8741a", "#3d8f57", "#8a63b8", "#b04a5a", "#5a6572")


def plot(documents: Sequence[Document], path: Path) -> bool:
    """Draw and write; False without matplotlib, or while there is nothing to draw."""
    drawn = [d for d in documents if any(row.get("figures") for row in d["rows"])]
    if not drawn or not has_matplotlib():
        return False
    figure = new_figure(11, 7.4)
    (decode, prefill), (starts, moves) = figure.subplots(2, 2)
    for color, document in zip(_COLORS, drawn, strict=False):
        shape = document["shape"]
        _line(decode, document, "decode_weights_of_copy", shape, color, 100)
        _line(prefill, document, "prefill_of_mma", shape, color, 100)
        _line(starts, document, "ttft_cold_s", f"{shape}, cold", color, 1e3)
        _line(starts, document, "ttft_warm_s", f"{shape}, warm", color, 1e3, "--")
        _move(moves, document, "restore", "us", f"{shape}, restore", color, "-")
        _move(moves, document, "restore", "plain_us", f"{shape}, plain copy", color, ":")
        _move(moves, document, "restore_ancestor", "us", f"{shape}, ancestor", color, "--")
    decode.set_title("decode: weight bytes per second, % of copy rate")
    prefill.set_title("prefill: FLOP/s, % of bare mma loop")
    starts.set_title("time to first token, ms")
    moves.set_title("restore on the device, us")
    for axes in (decode, prefill):
        axes.set_ylim(0, 100)
    for axes in (starts, moves):
        axes.set_yscale("log")
    for axes in figure.axes:
        _finish(axes)
    first = drawn[0]
    title = f"{first['device']}, {first['date'][:10]}, {first['precision']}, random weights"
    if first["is_verification_only"]:
        title += " -- simt: verification, not speed"
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)
    return True


def _line(
    axes: Any, document: Document, key: str, label: str, color: str, scale: float, style: str = "-"
) -> None:
    points = [(r["tokens"], scale * r["figures"][key]) for r in document["rows"]
              if key in r.get("figures", {})]  # fmt: skip
    _draw(axes, points, label, color, style)


def _move(
    axes: Any, document: Document, name: str, field: str, label: str, color: str, style: str
) -> None:
    points = [(r["tokens"], r["device"][name][field]) for r in document["rows"] if "device" in r]
    _draw(axes, points, label, color, style)


def _draw(
    axes: Any, points: Sequence[tuple[float, float]], label: str, color: str, style: str
) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=color,
                  label=label)  # fmt: skip


def _finish(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted({x for line in axes.get_lines() for x in line.get_xdata()})
    axes.set_xticks(ticks, [f"{int(x):,}" for x in ticks])
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.set_xlabel("tokens of context")
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if ticks and axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    if ticks:
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="upper left")
