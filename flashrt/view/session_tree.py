"""The tree of capsules as a picture: who descends from whom, and what each one costs.

IS: capsules and lane positions -> SVG. IS NOT: lineage itself (capsule.lineage).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import segment_layout
from flashrt.view.svg import FONT_NARROW, Drawing
from flashrt.view.units import bytes_text

MARGIN, _NODE_HEIGHT, _ROW, _COLUMN_GAP = 28, 58, 88, 92
_TOP = 84


def session_tree(
    capsules: Sequence[Capsule], lanes: Mapping[str, Capsule], title: str = "Session tree"
) -> str:
    """The tree as an SVG document. `lanes` names the capsule that each live lane stands on."""
    listed = set(capsules)
    children: dict[Capsule | None, list[Capsule]] = {}
    for capsule in sorted(capsules, key=lambda c: c.position):
        parent = capsule.parent if capsule.parent in listed else None
        children.setdefault(parent, []).append(capsule)
    places: dict[Capsule, tuple[int, int]] = {}  # column, row
    rows = _place(None, 0, 0, children, places)
    width = max((_node_width(c, lanes) for c in capsules), default=120)
    columns = 1 + max((column for column, _ in places.values()), default=0)
    total = 2 * MARGIN + 70 + columns * (width + _COLUMN_GAP)
    drawing = Drawing(max(total, 640))
    drawing.text(MARGIN, 36, title, "title")
    own, whole = sum(c.nbytes for c in capsules), sum(bytes_alone(c) for c in capsules)
    note = (
        f"{len(capsules)} capsules hold {bytes_text(own)}; as separate copies: {bytes_text(whole)}"
    )
    drawing.text(MARGIN, 55, note, "soft")
    drawing.rect(MARGIN, _TOP + 14, 56, 30, "frame", radius=15)
    drawing.text(MARGIN + 28, _TOP + 33, "empty", "soft", "middle")
    for capsule, (column, row) in places.items():
        x, y = MARGIN + 56 + _COLUMN_GAP + column * (width + _COLUMN_GAP), _TOP + row * _ROW
        parent = capsule.parent if capsule.parent in places else None
        left, above = MARGIN + 56.0, _TOP + _NODE_HEIGHT / 2
        if parent is not None:
            parent_column, parent_row = places[parent]
            left = x - _COLUMN_GAP - (column - parent_column - 1) * (width + _COLUMN_GAP)
            above = _TOP + parent_row * _ROW + _NODE_HEIGHT / 2
        drawing.curve(left, above, x, y + _NODE_HEIGHT / 2)
        _node(drawing, capsule, lanes, x, y, width)
    return drawing.svg(_TOP + max(rows, 1) * _ROW + 8)


def _place(
    parent: Capsule | None,
    column: int,
    row: int,
    children: Mapping[Capsule | None, Sequence[Capsule]],
    places: dict[Capsule, tuple[int, int]],
) -> int:
    """Depth to the right; the first child stays on its parent's row. Returns the next free row."""
    for child in children.get(parent, ()):
        places[child] = (column, row)
        row = max(_place(child, column + 1, row, children, places), row + 1)
    return row


def _node(
    drawing: Drawing,
    capsule: Capsule,
    lanes: Mapping[str, Capsule],
    x: float,
    y: float,
    width: float,
) -> None:
    here = capsule in lanes.values()
    drawing.rect(x, y, width, _NODE_HEIGHT, "lane" if here else "rows", radius=7)
    drawing.text(x + 10, y + 18, capsule.name or "capsule", "on strong")
    drawing.text(x + 10, y + 33, _second_line(capsule, lanes), "on")
    rows = capsule.nbytes - capsule.fixed.nbytes
    own = f"{bytes_text(capsule.fixed.nbytes)} fixed + {bytes_text(rows)} rows"
    drawing.text(x + 10, y + 48, own, "on")


def _node_width(capsule: Capsule, lanes: Mapping[str, Capsule]) -> float:
    longest = max(len(capsule.name or "capsule") * 1.1, len(_second_line(capsule, lanes)), 28)
    return longest * FONT_NARROW + 20


def _second_line(capsule: Capsule, lanes: Mapping[str, Capsule]) -> str:
    since = capsule.position - (capsule.parent.position if capsule.parent is not None else 0)
    names = [name for name, at in lanes.items() if at is capsule]
    here = f", {' and '.join(names)} here" if names else ""
    return f"position {capsule.position:,} (+{since:,}){here}"


def bytes_alone(capsule: Capsule) -> int:
    """Bytes of a capsule that shared nothing: the fixed band and all rows below its position."""
    if not capsule.position:
        return capsule.fixed.nbytes
    rows = capsule.owner.arena.lane(0).rows
    return capsule.fixed.nbytes + segment_layout(rows, 0, capsule.position)[1]
