"""The layering of docs/architecture.md, read from the imports; words that do not belong.

A room is a folder with the files directly in it, or one of the files that stand alone. The page
gives the rooms and their ranks. `python -m tests.unit.test_architecture` prints their sizes.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flashrt"
PAGE = ROOT / "docs/architecture.md"
TOP = {"__init__", "__main__"}  # the public names, made of `load` and the rooms below it
MODEL_WORDS = re.compile(r"qwen|gdn|(?<![a-z])kv(?![a-z])|mtp", re.IGNORECASE)
HEAVY = {
    "torch", "jax", "cuda", "tokenizers", "rich", "matplotlib", "jinja2", "gymnasium",
    "huggingface_hub", "ray", "PIL", "grpc", "gym_pusht",
}  # fmt: skip
DOCSTRING_LINES = 12


def name_of(path: Path) -> str:
    """flashrt.capsule.file; a package is called as its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(path: Path) -> str:
    """`models/qwen35` of a file in that folder, `load` of flashrt/load.py."""
    inside = path.relative_to(PACKAGE)
    return str(inside.parent) if len(inside.parts) > 1 else inside.stem


ROOMS = {name: room_of(path) for name, path in MODULES.items()}


def rooms_on_the_map(page: str) -> dict[str, int]:
    """Rooms and their ranks, from the tables of the page."""
    rows = re.findall(r"^\| (\d+) \| `([a-z0-9_/]+)(?:\.py)?` \|", page, re.MULTILINE)
    assert len(rows) == len({room for _, room in rows}), "a room is on the map twice"
    return {room: int(rank) for rank, room in rows}


RANKS = rooms_on_the_map(PAGE.read_text())


def imported_modules(path: Path) -> set[str]:
    """Modules of flashrt that a file imports, wherever in it: in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found |= {inner, str(node.module)}  # a package is run before what is in it
    return {name for name in found if name in MODULES}


IMPORTS = {name: imported_modules(path) - {name} for name, path in MODULES.items()}


def outer(room: str) -> str:
    return room.split("/", maxsplit=1)[0]


def goes_down(here: str, there: str) -> bool:
    """Whether a module of room `here` may import one of room `there`."""
    if there in TOP:
        return RANKS[here] > RANKS["load"]
    return outer(here) == outer(there) or RANKS[there] < RANKS[here]


@pytest.mark.parametrize("room", sorted(set(ROOMS.values()) - TOP))
def test_imports_go_down(room: str) -> None:
    for module in (name for name in MODULES if ROOMS[name] == room):
        for other in sorted(IMPORTS[module]):
            assert goes_down(room, ROOMS[other]), f"{module} imports {other}: see {PAGE.name}"


def test_an_import_upwards_or_aside_would_be_found() -> None:
    assert not goes_down("core", "capsule")
    assert not goes_down("weights", "backends/cpu")
    assert goes_down("commands/bench/gpu", "commands")


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(at: str) -> None:
        index[at] = low[at] = len(index)
        stack.append(at)
        for to in sorted(imports[at]):
            if to not in index:
                visit(to)
                low[at] = min(low[at], low[to])
            elif to in stack:
                low[at] = min(low[at], index[to])
        if low[at] == index[at]:
            group = stack[stack.index(at) :]
            del stack[stack.index(at) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(imports):
        if module not in index:
            visit(module)
    return found


def test_no_import_circle() -> None:
    assert circles(IMPORTS) == []


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    hidden = tmp_path / "errors.py"
    hidden.write_text("def late() -> None:\n    from flashrt.cli import main\n")
    planted = {**IMPORTS, "flashrt.base.errors": imported_modules(hidden)}
    assert any({"flashrt.base.errors", "flashrt.cli"} <= set(group) for group in circles(planted))


def lines_by_room() -> Counter[str]:
    """Lines of Python in each room."""
    lines: Counter[str] = Counter()
    for module, path in MODULES.items():
        lines[ROOMS[module]] += path.read_text().count("\n")
    return lines


def test_no_room_is_an_attic() -> None:
    """The largest room holds under a fifth of the lines."""
    lines = lines_by_room()
    (largest, most), *_ = lines.most_common(1)
    assert most < lines.total() / 5, f"{largest}: {most} of {lines.total()} lines"


def test_every_room_is_on_the_map() -> None:
    """The page names the rooms that exist, and no other; inner rooms have the outer one's rank."""
    assert set(RANKS) == set(ROOMS.values()) - TOP
    assert {room: RANKS[outer(room)] for room in RANKS} == RANKS


def test_modules_say_what_they_are() -> None:
    for module, path in MODULES.items():
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(text) > 10, f"{module} has no docstring"
        assert text.count("\n") < DOCSTRING_LINES, f"{module}: over {DOCSTRING_LINES} lines"


def test_the_mechanism_knows_no_model() -> None:
    generic = [p for f in ("core", "capsule", "backends") for p in PACKAGE.glob(f"{f}/**/*.py")]
    assert len(generic) > 10
    for path in generic:
        assert not (hit := MODEL_WORDS.search(path.read_text())), f"{path}: {hit}"


def test_only_one_file_imports_the_cuda_driver() -> None:
    users = [p for p in MODULES.values() if "cuda.bindings import driver" in p.read_text()]
    assert {p.name for p in users} <= {"driver.py"}


def test_import_is_light() -> None:
    code = f"import sys, flashrt; print(sorted({HEAVY} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


if __name__ == "__main__":
    sizes = lines_by_room()
    for name, size in sizes.most_common():
        print(f"{size:6d}  {100 * size / sizes.total():4.1f} %  {name}")
