"""Cases for a device that is not there are not collected, and one line says so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from flashrt.backends.cuda.probe import probe

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
