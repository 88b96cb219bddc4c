"""Ways to the same state: calls over an axis of positions, and the digest that each came to.

IS: ways (name, cuts, digest) -> SVG. IS NOT: their measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashrt.view.svg import Drawing

WIDTH, MARGIN = 880, 28
_LEFT, _RIGHT, _LINE, _BAR, _TOP = 210, 610, 36, 20, 78


@dataclass(frozen=True, slots=True)
class Way:
    """How a session came to a position: where its calls ended, ascending, and its digest.

    `is_copied`: which of the pieces were not computed but copied from a capsule.
    """

    name: str
    cuts: Sequence[int]
    digest: str
    is_copied: Sequence[bool] = ()


def batching_map(ways: Sequence[Way], title: str) -> str:
    """The picture as an SVG document."""
    drawing = Drawing(WIDTH)
    drawing.text(MARGIN, 36, title, "title")
    note = "blue: prefilled, a block per call; orange: copied from a capsule; right: the digest"
    drawing.text(MARGIN, 55, note, "soft")
    end = max(way.cuts[-1] for way in ways)
    scale = (_RIGHT - _LEFT) / end
    for i, way in enumerate(ways):
        y = _TOP + i * _LINE
        drawing.text(_LEFT - 12, y + 14, way.name, "strong", "end")
        start = 0
        for j, stop in enumerate(way.cuts):
            copied = j < len(way.is_copied) and way.is_copied[j]
            cls = "fixed" if copied else "rows"
            cls += " cell" if (stop - start) * scale > 2 else ""  # else the stroke would hide it
            hint = f"[{start:,}, {stop:,})"
            drawing.rect(_LEFT + start * scale, y, (stop - start) * scale, _BAR, cls, hint)
            start = stop
        drawing.text(WIDTH - MARGIN, y + 14, way.digest, "mono", "end")
    y = _TOP + len(ways) * _LINE + 6
    drawing.text(_LEFT, y + 6, "0", "soft", "middle")
    drawing.text(_RIGHT, y + 6, f"{end:,} tokens", "soft", "middle")
    return drawing.svg(y + 24)
