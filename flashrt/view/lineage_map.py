"""Who holds which rows: capsules over an axis of positions, rows that are shared drawn once.

IS: capsules -> SVG, one line per capsule: its own segment solid, its ancestors' outlined. IS NOT:
who descends from whom (session_tree).
"""

from __future__ import annotations

from collections.abc import Sequence

from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import chain_of
from flashrt.view.session_tree import bytes_alone
from flashrt.view.svg import FONT_NARROW, Drawing
from flashrt.view.units import bytes_text

WIDTH, MARGIN = 880, 28
_LINE, _BAR, _FIXED = 44, 22, 26
_TOP = 78


def lineage_map(capsules: Sequence[Capsule], title: str = "Who holds which rows") -> str:
    """The map as an SVG document; capsules from top to bottom as given."""
    drawing = Drawing(WIDTH)
    drawing.text(MARGIN, 36, title, "title")
    note = (
        "blue: rows of the capsule's own segment; outlined: rows of its ancestors, held once; "
        "orange: its fixed band, always its own"
    )
    drawing.text(MARGIN, 55, note, "soft")
    names = max((len(c.name or "capsule") for c in capsules), default=0)
    left = MARGIN + names * FONT_NARROW * 1.15 + 16
    right = WIDTH - MARGIN - 150
    end = max((c.position for c in capsules), default=1)
    scale = (right - left - _FIXED - 10) / end
    for i, capsule in enumerate(capsules):
        y = _TOP + i * _LINE
        drawing.text(left - 12, y + 15, capsule.name or "capsule", "strong", "end")
        for segment in chain_of(capsule.segment):
            own = segment is capsule.segment
            hint = f"rows [{segment.start:,}, {segment.stop:,})"
            x, width = left + segment.start * scale, (segment.stop - segment.start) * scale
            drawing.rect(x, y, width, _BAR, "rows" if own else "shared", hint, radius=3)
            drawing.text_if_it_fits(x, y + 15, width, hint, "on" if own else "soft")
        x = left + capsule.position * scale + 6
        drawing.rect(x, y, _FIXED, _BAR, "fixed", "fixed band", radius=3)
        cost = f"{bytes_text(capsule.nbytes)} of {bytes_text(bytes_alone(capsule))}"
        drawing.text(WIDTH - MARGIN, y + 15, cost, "soft", "end")
    y = _TOP + len(capsules) * _LINE
    drawing.line(left, y, left + end * scale, y)
    for position in sorted({0, end, *(c.position for c in capsules if c.position * 4 < end * 3)}):
        drawing.text(left + position * scale, y + 16, f"{position:,}", "soft", "middle")
    drawing.text(WIDTH - MARGIN, y + 16, "its own bytes, of all", "soft", "end")
    return drawing.svg(y + 30)
