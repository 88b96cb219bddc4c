"""What users get: the sdist has the sources and the licence, the wheel made of it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEFT_BEHIND = (".*", "__pycache__", "*.egg-info", "build", "dist", "out")
USE = """
import sys, flashrt
from flashrt.weights.bundled import bundled_checkpoint
assert flashrt.__file__.startswith(sys.argv[1]), flashrt.__file__
engine = flashrt.load(bundled_checkpoint(), device="cpu", max_positions=64)
session = engine.session()
session.prefill([1, 2, 3])
print(len(list(session.generate(4, temperature=0))))
"""


def test_every_package_is_listed() -> None:
    """Red for a folder that was added without its line in pyproject.toml."""
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    found = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "flashrt").rglob("__init__.py")
    }
    assert listed == found | {"flashrt.cuda_src"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout, and the wheel that was built from the sdist.

    `build` runs in another folder: in ours, Python would take build.py for it.
    """
    folder = tmp_path_factory.mktemp("packages")
    source, out = folder / "source", folder / "dist"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    command = [sys.executable, "-m", "build", str(source), "--outdir", str(out)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def names_below(folder: str, *suffixes: str) -> set[str]:
    """Source files of the checkout, as they are called in an archive."""
    found = (p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)
    return {str(p.relative_to(ROOT)) for p in found if "__pycache__" not in p.parts}


@pytest.mark.slow
def test_the_sdist_holds_what_a_build_needs(built: Path) -> None:
    """Red when cuda_src, the tests or the licence stay behind."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "build.py"} <= names
    assert names_below("flashrt", ".py", ".c", ".h", ".html", ".css", ".js", ".svg") <= names
    assert names_below("cuda_src", ".cu", ".cuh") <= names
    assert names_below("tests", ".py", ".json", ".safetensors") <= names
    assert names_below("examples", ".py", ".c", ".cu") <= names


@pytest.mark.slow
def test_the_wheel_holds_sources_and_licence(built: Path) -> None:
    """Red when package-data or license-files lose a kernel, a header or the licence."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names_below("flashrt", ".py", ".c", ".h", ".html", ".css", ".js", ".svg") <= names
    assert {f"flashrt/{name}" for name in names_below("cuda_src", ".cu", ".cuh")} <= names
    version = PYPROJECT["project"]["version"]
    assert f"flashrt-{version}.dist-info/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_wheel_runs(built: Path, tmp_path: Path) -> None:
    """Red when the installed package needs a file that only a checkout has."""
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target"]
    subprocess.run([*command, str(tmp_path), str(wheel)], check=True)
    result = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path)], cwd=tmp_path, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.stdout.split()[-1:] == ["4"], result.stdout
