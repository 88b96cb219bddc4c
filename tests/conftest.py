"""Options and limits of the whole suite.

IS: `--oracle DIR` (repeatable) and `--device NAME` for the golden tests, a time limit per test, and
the rule that cases marked `gpu` exist only where CUDA is usable, and those marked `browser` where
Chromium is, or in CI. IS NOT: fixtures of one folder.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from flashrt.backends.cuda.probe import probe

GOLDEN = Path(__file__).parent / "golden"
LEFT_OUT = pytest.StashKey[list[str]]()  # lines about cases that were left out
BROWSER = ("chromium", "chromedriver")  # of the distribution's packages chromium, chromium-driver
STDERR = pytest.StashKey[int]()  # the process's own: pytest's capture is lost with the process


# A shared machine stops a test for longer than any deadline: speed is shown by benchmarks.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


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
        "--operations", default=4000, type=int, help="random operations of the soak of sessions"
    )
    parser.addoption(
        "--stride",
        default=24,
        type=int,
        help="of the lines of a store's call, one in so many is struck; of others three or eight",
    )
    parser.addoption(
        "--all-formats",
        action="store_true",
        help="compile every format of weights for every GPU, and every variant of kernels",
    )
    parser.addoption(
        "--test-limit", default=120.0, type=float, help="seconds until a test is taken for hung"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Nothing is captured at this moment."""
    config.stash[STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """When a test hangs, print all stacks and end the process: nothing else interrupts C code."""
    limit, stderr = item.config.getoption("--test-limit"), item.config.stash[STDERR]
    faulthandler.dump_traceback_later(limit, exit=True, file=stderr)
    try:
        return (yield)
    finally:  # a process of xdist that waits for others is not hung
        faulthandler.cancel_dump_traceback_later()


def pytest_collection_finish() -> None:
    """Thousands of tests that were collected stay for good. Python need not look through them again
    and again, and would seldom look for what a test left behind, which is arenas.
    """
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`golden_set` runs over the sets of the repository and those of --oracle."""
    if "golden_set" in metafunc.fixturenames:
        folders = sorted(p.parent for p in GOLDEN.glob("*/expected.json"))
        folders += metafunc.config.getoption("--oracle")
        metafunc.parametrize("golden_set", folders, ids=lambda p: p.name, scope="module")


@pytest.hookimpl(trylast=True)  # after -m and -k: the line is about cases that were asked for
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of a device that is not there, and of a browser; in CI they fail."""
    lines = config.stash[LEFT_OUT] = []
    if left := _marked(items, "gpu"):
        status = probe()
        if not status.is_usable:
            items[:] = [item for item in items if item not in left]
            lines.append(f"{len(left)} cases were not collected: {status}")
    missing = [name for name in BROWSER if shutil.which(name) is None]
    if missing and not os.environ.get("CI") and (left := _marked(items, "browser")):
        items[:] = [item for item in items if item not in left]
        lines.append(
            f"{len(left)} cases were not collected: no {' and no '.join(missing)}; "
            "apt-get install chromium chromium-driver"
        )


def _marked(items: list[pytest.Item], marker: str) -> list[pytest.Item]:
    return [item for item in items if item.get_closest_marker(marker)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of xdist tells the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of xdist is done."""
    if lines := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[LEFT_OUT] = lines


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was left out, once."""
    for line in config.stash.get(LEFT_OUT, []):
        terminalreporter.write_line(line)
