"""The layering of docs/design.md, read from the imports; file sizes; words that do not belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flashrt"
RANKS = {
    "base": 0, "core": 1, "backends": 2, "ops": 2, "weights": 2, "text": 2, "worlds": 2,
    "models": 3, "engine": 4, "policy_engine": 4, "session": 5, "serve": 6, "view": 6,
    "commands": 7, "cli": 8,
}  # fmt: skip
TOP = {"__init__", "__main__"}  # the public face; may import what it exports
FILES = sorted(PACKAGE.rglob("*.py"))
MODEL_WORDS = re.compile(r"qwen|gdn|(?<![a-z])kv(?![a-z])|mtp", re.IGNORECASE)


def folder_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_folders(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "flashrt":
                names = [f"flashrt.{a.name}" for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("flashrt.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = folder_of(path)
    if here in TOP:
        return
    assert here in RANKS, f"{path} is in no layer"
    for other in imported_folders(path) - {here}:
        assert RANKS[other] < RANKS[here], f"{here} (rank {RANKS[here]}) imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_the_mechanism_knows_no_model() -> None:
    generic = [*PACKAGE.glob("core/*.py"), *PACKAGE.glob("backends/**/*.py")]
    assert len(generic) > 10
    for path in generic:
        assert not (hit := MODEL_WORDS.search(path.read_text())), f"{path}: {hit}"


def test_the_mechanism_is_small() -> None:
    assert sum(p.read_text().count("\n") for p in PACKAGE.glob("core/*.py")) < 2600


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
