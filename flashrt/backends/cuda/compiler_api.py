"""Compilation units and what compiles them, as one protocol.

IS: the seam between the CUDA backend and a compiler: `cuda.nvrtc` (cubins) or the SIMT shim (shared
objects). IS NOT: the choice of kernels; that is `kernels`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashrt.base.errors import CompileError
from flashrt.base.files import replace_file


@dataclass(frozen=True, slots=True)
class Unit:
    """One source with its defines and the headers it may include, all by value."""

    name: str  # for messages, e.g. "linear.cu"
    text: str
    defines: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()  # (name in #include "...", text)

    @property
    def title(self) -> str:
        """Name and defines, as messages show them."""
        return " ".join([self.name, *(f"-D{name}={value}" for name, value in self.defines)])


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled unit: a file in the cache."""

    path: Path
    log: str
    was_cached: bool


class Compiler(Protocol):
    """Turns units into files for a driver's `module_load`. Safe across threads and processes."""

    @property
    def identity(self) -> str:
        """What decides bits besides the units: compiler, version, options, architecture."""
        ...

    @property
    def title(self) -> str:
        """Compiler and target, as messages show them."""
        ...

    def is_cached(self, unit: Unit) -> bool:
        """Whether `compile` would take it from the cache."""
        ...

    def compile(self, unit: Unit) -> Binary:
        """Compile, or take from the cache. Raises CompileError with the compiler's log."""
        ...


def cache_key(unit: Unit, identity: str) -> str:
    """Content hash of a unit and its compiler: equal keys, equal binaries."""
    digest = hashlib.sha256()
    parts = [identity, unit.name, unit.text]
    parts += [text for pair in (*unit.defines, *unit.headers) for text in pair]
    for part in parts:  # lengths keep neighbours apart: ("ab", "c") is not ("a", "bc")
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def publish(path: Path, data: bytes) -> None:
    """Write a cache file so that no other process ever sees a part of it. Raises CompileError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data, is_durable=True)  # cut short, it would fail every later start
    except OSError as error:
        raise CompileError(
            f"cannot write the kernel cache {path.parent}: {error}; set FLASHRT_CACHE_DIR to a "
            "folder that can be written"
        ) from error
