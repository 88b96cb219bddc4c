"""Compilation units and what compiles them, as one protocol.

IS: the seam between the CUDA backend and a compiler: `cuda.nvrtc` (cubins) or the SIMT shim (shared
objects). IS NOT: the choice of kernels (kernels) or where compiled ones are kept (backends.cache).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from flashrt.backends.cache import Binary


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


class Compiler(Protocol):
    """Turns units into binaries for a driver's `module_load`. Safe across threads and processes."""

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
