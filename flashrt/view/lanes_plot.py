"""Lanes that decode in one replay as a picture: tokens per second, and time between tokens.

IS: the document of `bench --lanes` -> PNG or SVG. IS NOT: measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashrt.view.figure import new_figure, save_figure

OURS, LIMIT, PEER = "#2f6fb0", "#8c959f", "#3d8f57"


def plot(document: Mapping[str, Any], path: Path) -> Path:
    """Draw and write. Raises FlashrtError without matplotlib or when it cannot be written."""
    figure, rows, peer = new_figure(10, 4.2), document["rows"], document["peer"]
    rate, latency = figure.subplots(1, 2)
    lanes = [row["lanes"] for row in rows]
    rate.set_title("tokens/s of all lanes")
    rate.plot(lanes, [r["tokens_per_s"] for r in rows], "o-", color=OURS, label="flashrt")
    alone = [rows[0]["tokens_per_s"]] * len(rows)
    rate.plot(lanes, alone, "--", color=LIMIT, label="one after the other")
    latency.set_title("time between tokens of a lane, ms")
    for name, style in (("p50", "o-"), ("p99", "o:")):
        values = [1e3 * row[f"inter_token_{name}_s"] for row in rows]
        latency.plot(lanes, values, style, color=OURS, label=f"flashrt, {name}")
    if peer is not None:
        rate.plot(lanes, [peer["tokens_per_s"][n] for n in lanes], "D-", color=PEER,
                  label=peer["name"])  # fmt: skip
        theirs = [1e3 * peer["inter_token_p50_s"][n] for n in lanes]
        latency.plot(lanes, theirs, "D-", color=PEER, label=f"{peer['name']}, p50")
    for axes in (rate, latency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lanes, [f"{n:,}" for n in lanes])
        axes.minorticks_off()
        axes.set_xlabel("lanes that decode")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend
        axes.grid(color="#d8dee4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    title = f"{document['model']} on {document['device']}, {document['threads']} threads"
    figure.suptitle(title, fontsize=11, parse_math=False)
    return save_figure(figure, path)
