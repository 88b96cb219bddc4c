"""The wheel has every module, kernel source and header."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "flashrt").rglob("__init__.py")
    }
    assert listed == found | {"flashrt.cuda_src"}


@pytest.mark.slow
def test_the_wheel_holds_the_sources(tmp_path: Path) -> None:
    wheel_command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q"]
    subprocess.run([*wheel_command, "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [p for p in (ROOT / "flashrt").rglob("*") if p.suffix in (".py", ".c", ".h")]
    assert {str(p.relative_to(ROOT)) for p in wanted} <= names
    cuda = {f"flashrt/cuda_src/{p.name}" for p in (ROOT / "cuda_src").iterdir() if p.is_file()}
    assert cuda
    assert cuda <= names
