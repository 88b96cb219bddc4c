"""README and docs are true: code blocks run, links and pictures are there, tables are computed.

A page's python and sh blocks run in order, in a folder of its own that has `examples` in it. A
block that cannot run here says why after its language (```sh needs a checkpoint), in words of
ELSEWHERE.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.plan import lay_out
from flashrt.engine.engine import Layout
from flashrt.models import model_for
from flashrt.models.released import RELEASED
from flashrt.view.units import bytes_text
from flashrt.weights.random_checkpoint import SHAPES, shape_config

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")), ROOT / "examples/README.md", *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/measured/README.md",
]  # fmt: skip
BLOCK = re.compile(r"^```(python|sh)(?: ([^\n]+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")
ELSEWHERE = (
    "sets up a machine", "needs a checkpoint", "needs a GPU", "needs the package index",
    "takes minutes", "is what CI runs",
)  # fmt: skip
POSITIONS, BRANCH = 32768, 1000  # of the memory table


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def cases(pages: list[Path]) -> list[object]:
    """Pages to run; those that play the demo or start many processes are slow."""
    slow = {"docs/quickstart.md", "docs/store.md", "docs/fleet.md"}
    return [
        pytest.param(p, id=name_of(p), marks=[pytest.mark.slow] * (name_of(p) in slow))
        for p in pages
    ]


@pytest.mark.parametrize("page", cases(PAGES))
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, reason, block in BLOCK.findall(page.read_text()):
        if reason:
            assert reason in ELSEWHERE, f"{name_of(page)}: {reason!r} is no reason not to run"
            continue
        shell = ["bash", "-eu", "-c", block]
        command = shell if language == "sh" else [sys.executable, "-c", block]
        result = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, f"{block}\n{result.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pages_have_code_that_runs() -> None:
    running = [p.stem for p in PAGES if any(not why for _, why, _ in BLOCK.findall(p.read_text()))]
    assert {"README", "quickstart", "loops", "store", "loading-checkpoints"} <= set(running)


def test_pictures_are_shown_and_small() -> None:
    pictures = set((ROOT / "docs/pictures").iterdir())
    shown = {(p.parent / t).resolve() for p in PAGES for t in LINK.findall(p.read_text())}
    assert pictures
    assert pictures <= shown
    for picture in pictures:
        is_drawn = picture.suffix == ".svg"
        assert picture.stat().st_size < (60_000 if is_drawn else 150_000)
        if is_drawn:
            ElementTree.parse(picture)


def test_pictures_can_be_drawn_again(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/docs_pictures.py"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    drawn = {p.name: p.read_text() for p in tmp_path.iterdir()}
    others = {"fleet-crossover.svg"}  # by tools/fleet_simulation.py, see test_fleet_simulation
    assert set(drawn) == {p.name for p in (ROOT / "docs/pictures").glob("*.svg")} - others
    digests = re.findall(r">([0-9a-f]{32})<", drawn["exactness.svg"])
    assert len(digests) == 5
    assert len(set(digests)) == 1


OFTEN = ("0.8b", "4b", "9b", "27b", "lfm2.5-230m", "granite-4.0-h-350m")
RARELY = ("35b-a3b", "122b-a10b", *RELEASED)


def test_the_memory_table_is_what_the_planner_says() -> None:
    table = memory_table()
    assert set(table) == {*OFTEN, *RARELY}
    for shape in OFTEN:
        assert table[shape] == memory(shape), shape


@pytest.mark.slow
def test_the_rest_of_the_memory_table() -> None:
    table = memory_table()
    for shape in RARELY:
        assert table[shape] == memory(shape), shape


def memory_table() -> dict[str, list[str]]:
    """Cells of the page by the shape that they are about."""
    page = (ROOT / "docs/loading-checkpoints.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines()]
    named = {**SHAPES, **RELEASED}
    return {cells[0]: cells[1:] for cells in rows if cells and cells[0] in named}


def memory(shape: str) -> list[str]:
    """Weights, fixed band, rows per 1,000 tokens, a lane, scratch, a branch's capsule."""
    planned, longer = (planned_for(shape, n) for n in (POSITIONS, 2 * POSITIONS))
    lane = planned.arena.lanes[0]
    row = (longer.arena.lanes[0].rows.nbytes - lane.rows.nbytes) / POSITIONS
    whole = lane.fixed.nbytes + lane.rows.nbytes + lane.io.nbytes
    capsule = lane.fixed.nbytes + BRANCH * row
    found = [planned.weights.nbytes, lane.fixed.nbytes, 1000 * row, whole]
    return [bytes_text(n) for n in (*found, planned.arena.scratch.nbytes, capsule)]


def planned_for(shape: str, positions: int) -> Layout:
    options = EngineOptions(max_positions=positions, pool_bytes=0)
    config = RELEASED.get(shape) or shape_config(shape)
    return lay_out(model_for(config, max_positions=positions), options)


@pytest.mark.slow
def test_the_api_reference_builds(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = [sys.executable, str(ROOT / "tools/api_reference.py"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Warn" not in result.stderr
    page = (tmp_path / "flashrt/session/session.html").read_text()
    for verb in ("prefill", "generate", "snapshot", "restore", "fork", "rollback"):
        assert f'id="Session.{verb}"' in page
