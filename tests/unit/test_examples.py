"""Every example runs, on every device that is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RUNS = [(path, device) for path in EXAMPLES for device in ("cpu", "simt")]


@pytest.mark.parametrize(("path", "device"), RUNS, ids=[f"{p.stem}-{d}" for p, d in RUNS])
def test_example(path: Path, device: str) -> None:
    command = [sys.executable, str(path), str(ROOT / "tests/golden/tiny"), "--device", device]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{device}:")


def test_there_are_examples() -> None:
    assert EXAMPLES
