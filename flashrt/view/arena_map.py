"""The arena as a picture: bands to scale, regions in a band, scratch over launches.

IS: ArenaPlan -> SVG. IS NOT: planning (core.planner) or the table (commands.plan).
"""

from __future__ import annotations

from collections.abc import Sequence

from flashrt.core.planner import ArenaPlan, Band, Slot
from flashrt.core.tape import Tape
from flashrt.view.svg import FONT_NARROW, Drawing
from flashrt.view.units import bytes_text

WIDTH, MARGIN = 1080, 28
_INNER = WIDTH - 2 * MARGIN
_BAR, _GAP = 30, 14
_RESTORED = "a restore copies it in one piece"
_SCRATCH_HEIGHT = 300
_LEGEND = {
    "fixed": "overwritten in place",
    "rows": "append-only, by position",
    "io": "host reads and writes",
    "scratch": "inside one replay, overlapped",
    "pool": "capsules",
}


def arena_map(
    plan: ArenaPlan,
    tape: Tape,
    title: str,
    *,
    step: str = "token",
    io: str = "tokens in, logits out",
    name: str = "",
) -> str:
    """The map of an arena as an SVG document; scratch is drawn for one tape of the plan.

    step: what rewrites the fixed state. io: what the host brings and takes. name: of the tape,
    where it has no such rows as tokens are.
    """
    drawing = Drawing(WIDTH)
    drawing.text(MARGIN, 36, title, "title")
    subtitle = f"one allocation of {bytes_text(plan.nbytes)}; every block below is to scale"
    drawing.text(MARGIN, 55, subtitle, "soft")
    y = _legend(drawing, plan, 74)
    y = _overview(drawing, plan, y + 34)
    lane = plan.lanes[0]
    more = f" (one of {len(plan.lanes)} lanes, all alike)" if len(plan.lanes) > 1 else ""
    for role, band, what in (
        ("fixed", lane.fixed, f"the state that a {step} rewrites; {_RESTORED}"),
        ("rows", lane.rows, "the state that grows; capsules share it by segments"),
        ("io", lane.io, io),
    ):
        heading = f"lane 0 {role}{more}: {bytes_text(band.nbytes)}; {what}"
        y = _band(drawing, role, band, heading, y + 36)
    y = _scratch(drawing, plan, tape, name or f"{tape.phase}, {tape.rows} rows", y + 40)
    return drawing.svg(y + MARGIN)


def bands(plan: ArenaPlan) -> list[tuple[str, str, Band]]:
    """(role, label, band) of the whole arena, by ascending offset."""
    parts: list[tuple[str, str, Band]] = []
    for i, lane in enumerate(plan.lanes):
        parts += [("fixed", f"lane {i} fixed", lane.fixed), ("rows", f"lane {i} rows", lane.rows)]
    parts += [("io", f"lane {i} io", lane.io) for i, lane in enumerate(plan.lanes)]
    parts.append(("io", "shared", plan.shared))
    return [*parts, ("scratch", "scratch", plan.scratch), ("pool", "pool", plan.pool)]


def _legend(drawing: Drawing, plan: ArenaPlan, y: float) -> float:
    totals = {role: sum(b.nbytes for r, _, b in bands(plan) if r == role) for role in _LEGEND}
    width = _INNER / len(_LEGEND)
    for i, (role, meaning) in enumerate(_LEGEND.items()):
        x = MARGIN + i * width
        drawing.rect(x, y, 12, 12, role, radius=2)
        drawing.text(x + 18, y + 10, f"{role}: {bytes_text(totals[role])}", "strong")
        drawing.text(x + 18, y + 25, meaning, "soft")
    return y + 26


def _overview(drawing: Drawing, plan: ArenaPlan, y: float) -> float:
    drawing.text(MARGIN, y, f"the arena, offsets 0 to {plan.nbytes:,}", "head")
    top = y + 9
    for role, label, band in bands(plan):
        x = MARGIN + _INNER * band.offset / plan.nbytes
        width = _INNER * band.nbytes / plan.nbytes
        hint = f"{label}: {band.nbytes:,} bytes at {band.offset:,}"
        drawing.rect(x, top, width, _BAR, f"{role} cell", hint)
        drawing.text_if_it_fits(x, top + 19, width, label)
    return top + _BAR


def _band(drawing: Drawing, role: str, band: Band, heading: str, y: float) -> float:
    """One band, full width; regions too narrow for their name get it in a line below."""
    drawing.text(MARGIN, y, heading, "head")
    top, narrow = y + 9, list[str]()
    for slot in band.slots:
        x = MARGIN + _INNER * (slot.offset - band.offset) / band.nbytes
        width = _INNER * slot.storage.nbytes / band.nbytes
        name = f"{slot.region.name} {_shape(slot)}"
        drawing.rect(x, top, width, _BAR, f"{role} cell", _hint(slot))
        text = next((t for t in (name, slot.region.name) if _fits(t, width)), None)
        if text is None:
            narrow.append(f"{slot.region.name} {bytes_text(slot.storage.nbytes)}")
        else:
            drawing.text_if_it_fits(x, top + 19, width, text)
    if not narrow:
        return top + _BAR
    drawing.text(MARGIN, top + _BAR + 15, _listed("too small to label: ", narrow), "soft")
    return top + _BAR + 18


def _listed(text: str, names: list[str]) -> str:
    """As many names as fit on a line, and how many more there are."""
    for i, name in enumerate(names):
        more = f"and {len(names) - i} more"
        if not _fits(f"{text}{name}, {more}", _INNER):
            return text + more
        text += name + (", " if i + 1 < len(names) else "")
    return text


def _scratch(drawing: Drawing, plan: ArenaPlan, tape: Tape, name: str, y: float) -> float:
    """Offsets down, launches to the right: a region is as wide as it lives."""
    slots, spans = plan.tapes[tape.phase, tape.rows], tape.lifetimes()
    shared, alone = plan.scratch.nbytes, plan.scratch_unshared_nbytes
    drawing.text(MARGIN, y, f"scratch of {name}: who owns which bytes when", "head")
    note = (
        f"left to right: the {len(tape.launches)} launches of one replay; top to bottom: offsets. "
        f"All tapes together take {bytes_text(shared)}, without overlap {bytes_text(alone)}"
    )
    drawing.text(MARGIN, y + 16, note, "soft")
    top = y + 26
    depth = max((s.stop for s in slots), default=plan.scratch.offset + 1) - plan.scratch.offset
    step = _INNER / max(len(tape.launches), 1)
    for slot in slots:
        first, last = spans[slot.region]
        x, width = MARGIN + first * step, (last - first + 1) * step
        upper = top + _SCRATCH_HEIGHT * (slot.offset - plan.scratch.offset) / depth
        height = max(_SCRATCH_HEIGHT * slot.storage.nbytes / depth, 1.2)
        hint = f"{_hint(slot)}, launches {first} to {last}"
        drawing.rect(x, upper, width, height, "scratch cell", hint)
        name = slot.region.name
        label = next((t for t in (name, name.rpartition(".")[2]) if _fits(t, width)), "")
        if height >= 13 and label:
            drawing.text_if_it_fits(x, upper + height / 2 + 4, width, label)
    drawing.rect(MARGIN, top, _INNER, _SCRATCH_HEIGHT, "frame")
    return top + _SCRATCH_HEIGHT


def _fits(text: str, width: float) -> bool:
    return len(text) * FONT_NARROW + 6 <= width


def _shape(slot: Slot) -> str:
    return f"[{' x '.join(map(str, slot.region.shape))}] {slot.region.dtype}"


def _hint(slot: Slot) -> str:
    return f"{slot.region.name} {_shape(slot)}: {slot.storage.nbytes:,} bytes at {slot.offset:,}"


def tape_name(tape: Tape) -> str:
    """As a trace has it."""
    return f"{tape.phase}/{tape.rows}"


def scratch_nbytes(plan: ArenaPlan, tape: Tape) -> int:
    """Bytes of scratch that a tape reaches over."""
    slots = plan.tapes[tape.phase, tape.rows]
    return max((slot.stop for slot in slots), default=plan.scratch.offset) - plan.scratch.offset


def widest(tapes: Sequence[Tape]) -> Tape:
    """The tape worth drawing of tokens: most rows, then most launches."""
    return max(tapes, key=lambda t: (t.rows, len(t.launches)))


def busiest(plan: ArenaPlan, tapes: Sequence[Tape]) -> Tape:
    """The tape worth drawing of actions, whose rows are numbers of steps and cameras: most scratch,
    then most launches.
    """
    return max(tapes, key=lambda t: (scratch_nbytes(plan, t), len(t.launches)))
