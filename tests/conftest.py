"""Options and limits of the whole suite.

IS: `--oracle DIR` (repeatable) and `--device NAME` for the golden tests, and a time limit per test.
IS NOT: fixtures of one folder. Called by: pytest.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--oracle", action="append", default=[], type=Path, help="one more golden set (a folder)"
    )
    parser.addoption("--device", default="cpu", help="the device of the golden tests")
    parser.addoption("--fuzz", default=400, type=int, help="mutations per fuzz test")
    parser.addoption("--fuzz-seed", default=1, type=int, help="where their sequence begins")
    parser.addoption("--kills", default=20, type=int, help="processes killed in the crash test")
    parser.addoption("--seconds", default=5.0, type=float, help="length of the concurrency test")
    parser.addoption(
        "--test-limit", default=120.0, type=float, help="seconds until a test is taken for hung"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """When a test hangs, print all stacks and end the process: nothing else interrupts C code."""
    faulthandler.dump_traceback_later(item.config.getoption("--test-limit"), exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`golden_set` runs over the sets of the repository and those of --oracle."""
    if "golden_set" in metafunc.fixturenames:
        folders = sorted(p.parent for p in GOLDEN.glob("*/expected.json"))
        folders += metafunc.config.getoption("--oracle")
        metafunc.parametrize("golden_set", folders, ids=lambda p: p.name, scope="module")
