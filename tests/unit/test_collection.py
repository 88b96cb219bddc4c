"""Cases for a device or browser that is not there are not collected, and one line says so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashrt.backends.cuda.probe import probe
from tests import conftest

ROOT = Path(__file__).parents[2]


def test_gpu_cases_exist_where_cuda_is_usable() -> None:
    """Red when they are skipped one by one instead, or vanish without a word."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-m", "gpu"]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", "tests/gpu/test_limits.py"], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = re.findall(r"^\d+ cases were not collected: cuda: .*$", result.stdout, re.MULTILINE)
    if probe().is_usable:
        assert (result.returncode, said) == (0, [])
    else:
        assert (result.returncode, len(said)) == (5, 1), result.stdout


class Item:
    """As much of a test case as the rule asks for."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def get_closest_marker(self, name: str) -> bool:
        return name == self.marker


@pytest.mark.parametrize(("is_ci", "has_browser"), [(False, False), (True, False), (False, True)])
def test_cases_of_the_page_are_left_out_without_a_browser_but_not_in_ci(
    monkeypatch: pytest.MonkeyPatch, is_ci: bool, has_browser: bool
) -> None:
    """Red when CI passes without having tested the page."""
    monkeypatch.setenv("CI", "true" if is_ci else "")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/it" if has_browser else None)
    items: list[Any] = [Item("browser"), Item("slow")]
    config: Any = SimpleNamespace(stash=pytest.Stash())
    conftest.pytest_collection_modifyitems(config, items)
    is_left_out = not is_ci and not has_browser
    assert [item.marker for item in items] == ["slow"] if is_left_out else ["browser", "slow"]
    assert len(config.stash[conftest.LEFT_OUT]) == is_left_out
