"""Pictures are well-formed and complete; quantities read as they should."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

import flashrt
from flashrt.models.model import tapes_of
from flashrt.view import units
from flashrt.view.arena_map import WIDTH, arena_map, bands, widest
from flashrt.view.batching_map import Way, batching_map
from flashrt.view.bench_plot import plot
from flashrt.view.lineage_map import lineage_map
from flashrt.view.session_tree import bytes_alone, session_tree
from flashrt.view.svg import FONT_NARROW, Drawing, save_svg

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def rectangles(svg: str, cls: str) -> list[tuple[float, float, float, float]]:
    found = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    chosen = [e for e in found if cls in e.get("class", "").split() and e.get("x")]
    return [
        tuple(float(e.get(k, "nan")) for k in ("x", "y", "width", "height"))  # type: ignore[misc]
        for e in chosen
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.bytes_text(0), "0 B"),
        (units.bytes_text(999), "999 B"),
        (units.bytes_text(1000), "1.00 kB"),
        (units.bytes_text(999_600), "1.00 MB"),
        (units.bytes_text(9_437_184), "9.44 MB"),
        (units.rate_text(18.24e9), "18.2 GB/s"),
        (units.seconds_text(0), "0 s"),
        (units.seconds_text(12.345), "12.3 s"),
        (units.seconds_text(0.0371), "37.1 ms"),
        (units.seconds_text(0.00099996), "1.00 ms"),
        (units.seconds_text(0.000999), "999 µs"),
        (units.seconds_text(4.2e-6), "4.20 µs"),
        (units.seconds_text(3e-10), "0.300 ns"),
        (units.significant(1234567.0), "1,234,567"),
        (units.significant(0.0), "0.00"),
        (units.percent_text(0.784), "78%"),
    ],
)
def test_quantities(text: str, expected: str) -> None:
    assert text == expected


def test_a_drawing_escapes_what_it_is_told() -> None:
    drawing = Drawing(100)
    drawing.text(0, 0, "a < b & c", 'x"y')
    drawing.text(0, 0, "\x1b[31m\udcff")  # what XML and UTF-8 do not allow
    drawing.rect(0, 0, 1, 1, "io", hint="<&\x00>")
    svg = drawing.svg(50)
    assert texts(svg) == ["a < b & c", r"\x1b[31m\udcff"]
    assert svg.encode()
    assert "prefers-color-scheme: dark" in svg


def test_an_unwritable_picture_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(flashrt.FlashrtError, match="cannot write"):
        save_svg("<svg/>", tmp_path / "file" / "x.svg")


def test_the_arena_map_shows_every_region(engine: flashrt.Engine) -> None:
    tapes = tapes_of(engine.model, len(engine.lanes))
    tape = widest(tapes)
    assert (tape.phase, tape.rows) == ("prefill", max(engine.model.buckets))
    plan = engine.arena.plan
    svg = arena_map(plan, tape, "the title")
    assert texts(svg)[0] == "the title"
    whole = " ".join("".join(ElementTree.fromstring(svg).itertext()).split())
    for slot in (*plan.lanes[0].fixed.slots, *plan.lanes[0].rows.slots):
        assert f"{slot.region.name} [" in whole  # in the hint under the pointer
    drawn = rectangles(svg, "scratch")
    assert len(drawn) == len(plan.tapes[tape.phase, tape.rows]) + 2  # legend, overview


def test_scratch_that_lives_at_once_is_drawn_apart(engine: flashrt.Engine) -> None:
    tape = engine.model.record("prefill", 64)
    svg = arena_map(engine.arena.plan, tape, "")
    boxes = rectangles(svg, "scratch")[2:]
    assert len(boxes) > 10
    for i, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[:i]:
            is_beside = x + width <= other_x + 0.02 or other_x + other_width <= x + 0.02
            is_below = y + min(height, 1) <= other_y + 0.02 or other_y + other_height <= y + 1.3
            assert is_beside or is_below or y + height <= other_y + 0.02


def test_bands_tile_the_arena(engine: flashrt.Engine) -> None:
    offset = 0
    for _, _, band in bands(engine.arena.plan):
        assert band.offset == offset
        offset += band.nbytes


def test_the_session_tree_shows_who_descends_from_whom(session: flashrt.Session) -> None:
    session.prefill(range(50))
    root = session.snapshot("root & all")
    session.prefill(range(20))
    first = session.snapshot("first")
    session.restore(root)
    session.prefill(range(30))
    second = session.snapshot("second")
    svg = session_tree([root, first, second], {"main": second})
    shown = texts(svg)
    assert {"root & all", "first", "second"} <= set(shown)
    assert "position 80 (+30), main here" in shown
    assert "position 50 (+50)" in shown
    boxes = rectangles(svg, "rows") + rectangles(svg, "lane")
    assert len(boxes) == len({(x, y) for x, y, _, _ in boxes}) == 3
    assert len(rectangles(svg, "lane")) == 1
    assert bytes_alone(root) == root.nbytes
    session.rollback(0)
    session.prefill(first.tokens)
    assert bytes_alone(first) == session.snapshot().nbytes > first.nbytes


def test_the_lineage_map_draws_each_row_once(session: flashrt.Session) -> None:
    session.prefill(range(100))
    root = session.snapshot("root")
    session.prefill(range(50))
    first = session.snapshot("first")
    session.restore(root)
    session.prefill(range(70))
    second = session.snapshot("second")
    svg = lineage_map([root, first, second])
    own = sorted(width for _, _, width, _ in rectangles(svg, "rows"))
    assert [round(100 * w / own[-1]) for w in own] == [50, 70, 100]
    assert len(rectangles(svg, "shared")) == 2  # of both branches, below them
    assert len(rectangles(svg, "fixed")) == 3
    assert "rows [0, 100)" in texts(svg)


def test_the_batching_map_draws_calls_to_scale() -> None:
    ways = [
        Way("whole", [100], "a" * 32),
        Way("copied, then two", [60, 61, 100], "b" * 32, [True]),
    ]
    svg = batching_map(ways, "the title")
    (whole, one, rest) = (width for _, _, width, _ in rectangles(svg, "rows"))
    ((_, _, copied, _),) = rectangles(svg, "fixed")
    assert (one, copied, rest) == pytest.approx((whole / 100, 0.6 * whole, 0.39 * whole))
    assert {"the title", "a" * 32, "b" * 32} <= set(texts(svg))


def test_a_list_of_small_regions_stays_on_its_line(engine: flashrt.Engine) -> None:
    tapes = tapes_of(engine.model, len(engine.lanes))
    lines = texts(arena_map(engine.arena.plan, widest(tapes), ""))
    small = [line for line in lines if line.startswith("too small")]
    assert small
    assert all(len(line) * FONT_NARROW <= WIDTH for line in small)


def test_a_plot_without_matplotlib_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(flashrt.FlashrtError, match=r"pip install 'flashrt\[plot\]'"):
        plot({}, tmp_path / "plot.png")
