"""Time to the first token after a restart as a picture: from disk beside a cold prefill.

IS: the document of `bench --resume` -> PNG or SVG. IS NOT: measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashrt.view.figure import new_figure, save_figure
from flashrt.view.units import seconds_text

SERIES = (
    ("cold_s", "cold prefill", "#8c959f"),
    ("evicted_s", "from disk, page cache dropped", "#c8741a"),
    ("cached_s", "from disk, in the page cache", "#2f6fb0"),
)


def plot(document: Mapping[str, Any], path: Path) -> Path:
    """Draw and write. Raises FlashrtError without matplotlib or when it cannot be written."""
    figure, rows = new_figure(8, 4.2), document["rows"]
    axes = figure.subplots()
    width = 0.8 / len(SERIES)
    for i, (key, label, colour) in enumerate(SERIES):
        places = [n + (i - 1) * width for n in range(len(rows))]
        bars = axes.bar(places, [r[key] for r in rows], width * 0.92, color=colour, label=label)
        axes.bar_label(bars, [seconds_text(r[key]) for r in rows], fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.set_ylabel("seconds to the first token")
    axes.set_xlabel("tokens of the prompt")
    axes.set_xticks(range(len(rows)), [f"{r['tokens']:,}" for r in rows])
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=9)
    title = f"First token after a restart: {document['model']}, {document['device']}"
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    return save_figure(figure, path)
