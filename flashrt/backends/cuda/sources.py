"""Kernel sources: the files of cuda_src, plus raw kernel files that a user adds.

IS: text by name, and the units that launches are compiled from, each with the argument structs it
uses. IS NOT: compiling. Called by: library, device, build.py, simt.build.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashrt.backends.cuda.compiler_api import Unit
from flashrt.backends.cuda.kernels import KernelLaunch
from flashrt.base.errors import BackendError, CompileError
from flashrt.core.op import Op, c_header

ARGUMENT_HEADER = "args.h"  # generated: the argument structs of core.op


@functools.cache
def folder() -> Path:
    """Where the sources are: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[2]
    for candidate in (package.parent / "cuda_src", package / "cuda_src"):
        if candidate.is_dir():
            return candidate
    raise BackendError(f"no kernel sources (cuda_src) beside or in {package}: reinstall flashrt")


@functools.cache
def shipped() -> Mapping[str, str]:
    """Name to text of all sources and headers of cuda_src."""
    files = sorted(p for p in folder().iterdir() if p.suffix in (".cu", ".cuh", ".h"))
    return {path.name: path.read_text() for path in files}


class Sources:
    """The sources of one device: shipped ones and those added to it."""

    def __init__(self) -> None:
        self._texts = dict(shipped())
        self._ops: tuple[Op, ...] = ()

    def add(self, name: str, text: str) -> None:
        """Add a raw kernel file. Raises CompileError where the name is taken by another text."""
        if self._texts.setdefault(name, text) != text:
            raise CompileError(
                f"kernel source {name!r} exists with another text; choose another name"
            )

    def set_ops(self, ops: Sequence[Op]) -> None:
        """The ops whose argument structs the sources may use."""
        self._ops = tuple(ops)

    def unit(self, launch: KernelLaunch) -> Unit:
        """What to compile for a launch. Raises CompileError for a source that is not there."""
        text = self._texts.get(launch.source)
        if text is None:
            raise CompileError(
                f"no kernel source {launch.source!r}; there are {sorted(self._texts)}"
            )
        headers = {n: t for n, t in self._texts.items() if not n.endswith(".cu")}
        # Only the structs in use: a new op must not recompile every kernel.
        seen = text + "".join(headers.values())
        used = [op for op in self._ops if f"{op.name}_args" in seen]
        headers[ARGUMENT_HEADER] = c_header(used)
        defines = tuple((name, str(value)) for name, value in launch.defines)
        return Unit(launch.source, text, defines, tuple(sorted(headers.items())))

    def waits_for_predecessor(self, name: str) -> bool:
        """Whether its kernels may be launched early: shipped ones all open with begin()."""
        return name in shipped()

    def digest(self) -> str:
        """Hash of all texts and argument structs."""
        digest = hashlib.sha256(c_header(self._ops).encode())
        for name, text in sorted(self._texts.items()):
            digest.update(f"\0{name}\0{text}".encode())
        return digest.hexdigest()
