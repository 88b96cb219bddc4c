"""Every example runs as its own docstring says; the loops print what the README tells of them.

The loops assert exactness themselves: a run that ends with 0 is a run in which every bit agreed.
"""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import flashrt

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
ON_DEVICES = [(name, device) for name in ("custom_kernel",) for device in ("cpu", "simt")]
NEED_GYM = [name for name in EXAMPLES if name.startswith("robot_")]
LOOPS = {  # what a line of the output must look like: the comparison that it exists for
    "generate": r"the first text \d+ times sooner",
    "agent_rollback": r"\d+ calls taken back in [\d.]+ ms; by prefilling again: [\d,]+ tokens",
    "tree_search": r"coins: one tale \d+, best of \d+ \d+, beam \d+",
    "barge_in": r"interrupted +[\d.]+ ms +[\d.]+ ms",
    "robot_rollout": r"looking ahead +mean return [\d.]+, +[\d.]+ steps/s",
    "robot_reset": r"restore the capsule +\d+ us",
    "robot_lookahead": r"[\d.]+ s one by one, [\d.]+ s side by side: [\d.]+ x",
    "robot_barge_in": r"interrupted +turns after +\d+ ms",
    "robot_replay": r"a policy loaded afresh answers the same: \d+ digests, every action",
    "robot_pixels": r"looking ahead by 4 forks: mean return -[\d.]+ -> -[\d.]+",
    "langchain_tools": r"18 calls, all .*\n[\d,]+ tokens of prompts, of which 1,\d{3} were fed",
    "rl_rollouts": r"sampled again, one worker killed: the same 128 digests",
    "fleet_tree_search": r"\d+ of 160 branches ran where their node was",
    "warm_start": r"restore +[\d,]+ tokens ready in +[\d.]+ ms",
}
SLOW = {"robot_rollout", "rl_rollouts", "fleet_tree_search"}
MAX_LINES = 80  # of code: without blank lines, comments and docstrings


def run(path: Path, *arguments: str) -> str:
    command = [sys.executable, str(path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("name", "device"), ON_DEVICES)
def test_an_example_on_a_device(name: str, device: str) -> None:
    """Without a checkpoint it runs on the bundled model, which simt is too slow for here."""
    checkpoint = [] if device == "cpu" else [str(ROOT / "tests/golden/tiny")]
    said = run(EXAMPLES[name], *checkpoint, "--device", device)
    assert said.startswith(f"{device}:")


@pytest.mark.parametrize("name", NEED_GYM)
def test_an_example_without_gymnasium_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when it dies with a ModuleNotFoundError on gymnasium, or on gym-pusht."""
    extra = "pusht" if name == "robot_pixels" else "gym"
    missing = "gym_pusht.envs.pusht" if extra == "pusht" else "gymnasium"
    monkeypatch.setitem(sys.modules, missing, None)
    for module in ("gym", "two_doors", "robots", "pusht"):
        monkeypatch.delitem(sys.modules, f"flashrt.worlds.{module}", raising=False)
    line = f"pip install 'flashrt[{extra}]'"
    with pytest.raises((flashrt.FlashrtError, SystemExit), match=re.escape(line)):
        runpy.run_path(str(EXAMPLES[name]), run_name="example")
    assert line in EXAMPLES[name].read_text()


def test_an_example_without_langchain_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when it dies with a ModuleNotFoundError."""
    monkeypatch.setitem(sys.modules, "langchain_openai", None)
    with pytest.raises(SystemExit, match="pip install langchain-openai"):
        runpy.run_path(str(EXAMPLES["langchain_tools"]), run_name="example")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LOOPS],
)
def test_a_loop_prints_its_comparison(name: str) -> None:
    said = run(EXAMPLES[name])
    assert re.search(LOOPS[name], said), said


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_told_of(name: str) -> None:
    text = EXAMPLES[name].read_text()
    tree = ast.parse(text)
    doc = ast.get_docstring(tree)
    assert doc is not None
    assert f"examples/{name}.py" in doc, "its docstring says how to run it"
    assert f"({name}.py)" in (ROOT / "examples/README.md").read_text()
    assert len(code_lines(text, tree)) <= MAX_LINES


def code_lines(text: str, tree: ast.Module) -> list[str]:
    told: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            told |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return [s for i, s in lines if i not in told and s.strip() and not s.strip().startswith("#")]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_uses_public_names_only(name: str) -> None:
    reached = re.findall(r"\w\.(_[a-z]\w*)", EXAMPLES[name].read_text())
    assert not reached
