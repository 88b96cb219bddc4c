"""The layering of docs/architecture.md, read from the imports; words that do not belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "flashrt"
RANKS = {
    "base": 0, "core": 1, "capsule": 2, "backends": 2, "ops": 2, "weights": 2, "text": 2,
    "worlds": 2, "models": 3, "engine": 4, "session": 5, "robot": 5, "store": 6, "load": 7,
    "view": 7, "commands": 8, "cli": 9,
}  # fmt: skip
TOP = {"__init__", "__main__"}  # the public face; may import what it exports
FILES = sorted(PACKAGE.rglob("*.py"))
MODEL_WORDS = re.compile(r"qwen|gdn|(?<![a-z])kv(?![a-z])|mtp", re.IGNORECASE)


def name_of(path: Path) -> str:
    """flashrt.capsule.file; a package is called as its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Modules of flashrt that a file imports, wherever in it: in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return {name for name in found if name in MODULES}


IMPORTS = {name: imported_modules(path) - {name} for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    here = room_of(module)
    if here in TOP:
        return
    assert here in RANKS, f"{module} is in no layer"
    for other in {room_of(name) for name in IMPORTS[module]} - {here}:
        assert RANKS[other] < RANKS[here], f"{here} (rank {RANKS[here]}) imports {other}"


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


def test_a_circle_would_be_found() -> None:
    planted = {**IMPORTS, "flashrt.base.errors": {"flashrt.cli"}}
    assert any("flashrt.base.errors" in group for group in circles(planted))


def test_no_room_is_an_attic() -> None:
    """The largest room holds under a fifth of the lines; files in Python."""
    lines: dict[str, int] = {}
    for module, path in MODULES.items():
        lines[room_of(module)] = lines.get(room_of(module), 0) + path.read_text().count("\n")
    largest = max(lines, key=lambda room: lines[room])
    assert lines[largest] < sum(lines.values()) / 5, f"{largest}: {lines[largest]} lines"


def test_every_room_is_on_the_map() -> None:
    """docs/architecture.md and this test name the same rooms, with the same ranks."""
    rows = re.findall(r"^\| (\d) \| `([a-z_]+)", (ROOT / "docs/architecture.md").read_text(), re.M)
    assert {room: int(rank) for rank, room in rows} == RANKS
    rooms = {room_of(module) for module in MODULES} - TOP
    assert rooms == set(RANKS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_say_what_they_are(module: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[module].read_text()))
    assert text and len(text) > 10, f"{module} has no docstring"


def test_the_mechanism_knows_no_model() -> None:
    generic = [p for f in ("core", "capsule", "backends") for p in PACKAGE.glob(f"{f}/**/*.py")]
    assert len(generic) > 10
    for path in generic:
        assert not (hit := MODEL_WORDS.search(path.read_text())), f"{path}: {hit}"


def test_only_one_file_imports_the_cuda_driver() -> None:
    users = [p for p in FILES if "cuda.bindings import driver" in p.read_text()]
    assert {p.name for p in users} <= {"driver.py"}


def test_import_is_light() -> None:
    code = (
        "import sys, flashrt; "
        "heavy = {'torch', 'jax', 'cuda', 'tokenizers', 'rich', 'matplotlib', 'jinja2'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
