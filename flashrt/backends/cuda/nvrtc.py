"""CUDA C++ to cubins with NVRTC, for one architecture, cached by content.

IS: the only file that imports cuda.bindings.nvrtc. Needs no GPU and no driver. Cubins, never PTX:
what runs is what was compiled, and a newer NVRTC serves older drivers of the same major version.
IS NOT: a loader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from flashrt.backends.cache import Binary, KernelCache
from flashrt.backends.cuda.compiler_api import Unit, cache_key
from flashrt.base.errors import BackendError, CompileError
from flashrt.base.flags import flags

# No contraction: bits are decided by the sources alone. -v puts the resource report into the log.
OPTIONS = ("--std=c++17", "--fmad=false", "--ptxas-options=-v")


@dataclass(frozen=True, slots=True)
class Resources:
    """What one kernel takes, as ptxas reports it."""

    kernel: str
    registers: int
    shared_bytes: int  # static
    stack_bytes: int
    spill_bytes: int  # stores + loads


class Nvrtc:
    """A `Compiler` for one architecture ("sm_90"). Raises BackendError where NVRTC is missing."""

    def __init__(self, arch: str, cache: Path | None = None) -> None:
        self._api = _import_api()
        self.version = self._read_version()
        self.arch = self._choose_arch(arch)
        folder = cache if cache is not None else flags().cache_dir / "cuda"
        self._cache = KernelCache(folder / self.arch)
        self.identity = f"nvrtc {self.version} {self.arch} {' '.join(OPTIONS)}"

    @property
    def title(self) -> str:
        """NVRTC and the architecture."""
        return f"NVRTC {self.version} for {self.arch}"

    def is_cached(self, unit: Unit) -> bool:
        """See Compiler."""
        return self._cached(unit) is not None

    def compile(self, unit: Unit) -> Binary:
        """Compile, or take from the cache. Raises CompileError with NVRTC's log."""
        if (cached := self._cached(unit)) is not None:
            return cached
        cubin, log = self._compile(unit)
        name = self._name(unit)
        self._cache.write(f"{name}.log", log.encode())
        self._cache.write(f"{name}.cubin", cubin)
        return Binary(self.path(unit), cubin, log, was_cached=False)

    def path(self, unit: Unit) -> Path:
        """Where the cache keeps, or would keep, the cubin of a unit."""
        return self._cache.path(f"{self._name(unit)}.cubin")

    def _name(self, unit: Unit) -> str:
        stem = unit.name.removesuffix(".cu").replace("/", "-")
        return f"{stem}-{cache_key(unit, self.identity)}"

    def _cached(self, unit: Unit) -> Binary | None:
        name = self._name(unit)
        cubin, log = self._cache.read(f"{name}.cubin"), self._cache.read(f"{name}.log")
        if cubin is None or log is None:
            return None
        return Binary(self.path(unit), cubin, log.decode(errors="replace"), was_cached=True)

    def _compile(self, unit: Unit) -> tuple[bytes, str]:
        api = self._api
        names = [name.encode() for name, _ in unit.headers]
        texts = [text.encode() for _, text in unit.headers]
        program = self._checked(
            api.nvrtcCreateProgram(unit.text.encode(), unit.name.encode(), len(names), texts, names)
        )
        try:
            options = [f"--gpu-architecture={self.arch}", *OPTIONS]
            options += [f"--define-macro={name}={value}" for name, value in unit.defines]
            encoded = [option.encode() for option in options]
            (result,) = api.nvrtcCompileProgram(program, len(encoded), encoded)
            log = self._log(program)
            if int(result):
                raise CompileError(f"{unit.title} does not compile for {self.arch}:\n{log}")
            cubin = bytes(self._checked(api.nvrtcGetCUBINSize(program)))
            self._checked(api.nvrtcGetCUBIN(program, cubin))
            return cubin, log
        finally:
            api.nvrtcDestroyProgram(program)

    def _log(self, program: object) -> str:
        log = bytes(self._checked(self._api.nvrtcGetProgramLogSize(program)))
        self._checked(self._api.nvrtcGetProgramLog(program, log))
        return log.decode(errors="replace").strip("\0 \n")

    def _read_version(self) -> str:
        try:
            major, minor = self._checked(self._api.nvrtcVersion())
        except RuntimeError as error:  # cuda-python looks for the library at the first call
            raise BackendError(
                f"NVRTC is not installed: pip install 'flashrt[cuda]' [{error}]"
            ) from error
        return f"{major}.{minor}"

    def _choose_arch(self, arch: str) -> str:
        """The architecture, or the nearest earlier one of its major version: its cubins run too."""
        supported = [int(n) for n in self._checked(self._api.nvrtcGetSupportedArchs())]
        wanted = arch.removeprefix("sm_")
        if not wanted.isdigit():
            raise CompileError(f"architecture {arch!r} is not of the form sm_90")
        fitting = [n for n in supported if n // 10 == int(wanted) // 10 and n <= int(wanted)]
        if not fitting:
            known = ", ".join(f"sm_{n}" for n in supported)
            raise CompileError(
                f"NVRTC {self.version} cannot compile for {arch}, only for {known}: install "
                "another version of it: pip install 'flashrt[cuda13]', or 'flashrt[cuda12]'"
            )
        return f"sm_{max(fitting)}"

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        result, *values = answer
        if int(result):
            _, text = self._api.nvrtcGetErrorString(result)
            raise BackendError(f"NVRTC: {text.decode()}")
        return values[0] if len(values) == 1 else tuple(values)


def resources(log: str) -> list[Resources]:
    """The resource report of each kernel in a compile log."""
    kernels: list[Resources] = []
    for block in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'(\w+)'", block)
        kernels.append(
            Resources(
                kernel=name[1] if name else "?",
                registers=_number(r"Used (\d+) registers", block),
                shared_bytes=_number(r"(\d+) bytes smem", block),
                stack_bytes=_number(r"(\d+) bytes stack frame", block),
                spill_bytes=_number(r"(\d+) bytes spill stores", block)
                + _number(r"(\d+) bytes spill loads", block),
            )
        )
    return kernels


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _import_api() -> ModuleType:
    try:
        from cuda.bindings import nvrtc  # here, for `import flashrt` must not touch CUDA
    except ImportError as error:
        raise BackendError(
            f"compiling CUDA kernels needs NVRTC: pip install 'flashrt[cuda]' [{error}]"
        ) from error
    module: ModuleType = nvrtc
    return module
