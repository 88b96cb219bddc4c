"""Time to the first token after a restart as a picture: from disk beside a cold prefill.

IS: rows of commands.bench_resume, as mappings -> PNG or SVG by matplotlib, which is optional.
IS NOT: measurement. Called by: commands bench.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.view.units import seconds_text

SERIES = (
    ("cold_s", "cold prefill", "#8c959f"),
    ("evicted_s", "from disk, page cache dropped", "#c8741a"),
    ("cached_s", "from disk, in the page cache", "#2f6fb0"),
)


def plot(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> Path:
    """Draw and write. Raises FlashrtError without matplotlib or when it cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FlashrtError("a plot needs matplotlib: pip install 'flashrt[plot]'") from error
    figure: Any = Figure(figsize=(8, 4.2), layout="constrained")
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
    axes.set_title(title, loc="left", fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise FlashrtError(f"cannot write {path}: {error}") from error
    return path
