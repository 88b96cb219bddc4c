"""Control loops as a picture: a few ticks against the clock, and the histogram of all latencies.

IS: the document of `bench --policy` -> SVG, or PNG by matplotlib. IS NOT: measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashrt.view.figure import new_figure, save_figure
from flashrt.view.svg import Drawing, save_svg
from flashrt.view.units import seconds_text, significant

Document = Mapping[str, Any]
WIDTH = 880.0
_LEFT, _RIGHT = 90.0, 24.0
_ROW = 13.0  # pixels per tick
_HISTOGRAM = 190.0
_PLOT = WIDTH - _LEFT - _RIGHT
_QUANTILES = {"p50": "p50", "p99": "p99", "p999": "p99.9"}


def plot(document: Document, path: Path) -> Path:
    """Draw and write, by the name's ending. Raises FlashrtError when that cannot be done."""
    if path.suffix == ".svg":
        return save_svg(ticks_svg(document), path)
    return _plot_histogram(document, path)


def ticks_svg(document: Document) -> str:
    """Both panels."""
    d = Drawing(WIDTH)
    d.text(16, 28, "A control loop, tick by tick", "title")
    on = f"{document['device']}: {document['machine']['processor']}"
    d.text(16, 46, f"{document['model']} at {document['hz']:g} Hz on {on}", "soft")
    bottom = _timeline(d, document, 78)
    bottom = _histogram(d, document, bottom + 44)
    return d.svg(bottom + 20)


def _timeline(d: Drawing, document: Document, top: float) -> float:
    """Ticks down the page, time since the instant due to the right; where it ends."""
    rows: Sequence[Mapping[str, Any]] = document["look"]
    steps = document["policy"]["n_action_steps"]
    limit = _nice(max(row["settled_s"] for row in rows))
    scale = _PLOT / limit
    d.text(16, top, "One line per tick: time since the instant it was due", "head")
    d.rect(WIDTH - 380, top - 9, 10, 10, "fixed")
    d.text(WIDTH - 365, top, "tick: observation in, action out", "soft")
    d.rect(WIDTH - 180, top - 9, 10, 10, "rows")
    d.text(WIDTH - 165, top, "slack: next chunk, boundary", "soft")
    top += 16
    bottom = top + _ROW * len(rows)
    for i in range(5):
        x = _LEFT + _PLOT * i / 4
        d.line(x, top, x, bottom + 4)
        d.text(x, bottom + 17, seconds_text(limit * i / 4), "soft", "middle")
    for i, row in enumerate(rows):
        y = top + i * _ROW
        if i % steps == 0:
            d.text(_LEFT - 8, y + _ROW - 3, f"tick {row['tick']}", "soft", "end")
        start, acted, settled = (scale * row[f"{n}_s"] for n in ("started", "acted", "settled"))
        took = seconds_text(row["acted_s"] - row["started_s"])
        d.rect(_LEFT + start, y + 2, acted - start, _ROW - 4, "fixed", f"action after {took}")
        if row["is_planned"]:
            planned = seconds_text(row["settled_s"] - row["acted_s"])
            d.rect(_LEFT + acted, y + 2, settled - acted, _ROW - 4, "rows", f"planned in {planned}")
    period = 1 / document["hz"]
    d.text(
        _LEFT + _PLOT, bottom + 32, f"the next instant is at {seconds_text(period)}: "
        f"{significant(period / limit)} times the width of this picture", "soft", "end",
    )  # fmt: skip
    return bottom + 32


def _histogram(d: Drawing, document: Document, top: float) -> float:
    """Counts on a logarithmic scale, so that a single late tick is seen; where it ends."""
    edges, counts = document["histogram"]["edges_s"], document["histogram"]["counts"]
    d.text(16, top, f"Latency of {document['ticks']:,} ticks, observation to action", "head")
    top += 30
    bottom = top + _HISTOGRAM
    height = _HISTOGRAM / (math.log10(max(counts)) + 1)
    low, high = math.log10(edges[0]), math.log10(edges[-1])

    def place(seconds: float) -> float:
        return _LEFT + _PLOT * (math.log10(seconds) - low) / (high - low)

    for power in range(math.ceil(math.log10(max(counts)) + 0.01)):
        y = bottom - height * (power + 1)
        d.line(_LEFT, y, _LEFT + _PLOT, y)
        d.text(_LEFT - 8, y + 4, f"{10**power:,}", "soft", "end")
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            x, tall = place(left), height * (math.log10(count) + 1)
            hint = f"{count:,} of {seconds_text(left)} to {seconds_text(right)}"
            d.rect(x + 0.5, bottom - tall, place(right) - x - 1, tall, "fixed", hint)
    for left in edges[:: max(1, len(edges) // 8)]:
        d.text(place(left), bottom + 16, seconds_text(left), "soft", "middle")
    for i, (name, label) in enumerate(_QUANTILES.items()):
        value = document[f"latency_{name}_s"]
        x, is_far = place(value), place(value) > 0.8 * WIDTH
        d.line(x, top - 6, x, bottom, "edge")
        text, anchor = f"{label} {seconds_text(value)}", "end" if is_far else "start"
        d.text(x + (-4 if is_far else 4), top - 8 + 13 * i, text, "strong", anchor)
    d.line(_LEFT, bottom, _LEFT + _PLOT, bottom, "edge")
    return bottom + 20


def _nice(value: float) -> float:
    """The least of 1, 2, 4, 5, 8 times a power of ten that is not less."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 4, 5, 8, 10) if m * power >= value)


def _plot_histogram(document: Document, path: Path) -> Path:
    figure = new_figure(8, 3.6)
    axes = figure.subplots()
    edges, counts = document["histogram"]["edges_s"], document["histogram"]["counts"]
    axes.stairs(counts, edges, fill=True, color="#e3ab52")
    for name, label in _QUANTILES.items():
        value = document[f"latency_{name}_s"]
        axes.axvline(value, color="#8c959f", linewidth=1)
        axes.text(value, max(counts), f" {label} {seconds_text(value)}", fontsize=8, rotation=90)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("seconds from observation to action")
    axes.set_ylabel("ticks")
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{document['model']}, {document['hz']:g} Hz"
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    return save_figure(figure, path)
