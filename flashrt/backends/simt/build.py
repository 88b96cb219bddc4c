"""The SIMT shim's compiler: CUDA sources to shared objects with g++, cached by content.

IS: the `Compiler` of the simt device. A stub includes the shim, then the source, and exports a
launcher for each `extern "C" __global__` kernel. With `is_watched` the race detector is built in
(shim/race.h). IS NOT: running; that is `kernel`.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

from flashrt.backends.cache import Binary, KernelCache
from flashrt.backends.code import digest_of
from flashrt.backends.cuda.compiler_api import Unit, cache_key
from flashrt.base.errors import CompileError
from flashrt.base.flags import flags

SHIM = Path(__file__).parent / "shim"
# No contraction, as for NVRTC; -march=native only for speed: fmaf is exact with and without FMA.
# Not -O2: most kernels run for less time than that takes to compile them.
OPTIONS = (
    "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-w", "-fno-exceptions",
    "-Wl,-Bsymbolic",  # a kernel of the name of a libc function (advance) must stay the kernel
)  # fmt: skip
WATCHED_OPTIONS = ("-g1", "-fsanitize=thread", "-fno-tree-vectorize", "-DSIMT_RACE")
_KERNEL = re.compile(
    r"(?:extern\s+\"C\"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?"
    r"|^KERNEL\([^)]*\)\s*)(\w+)\s*\(",
    re.MULTILINE,
)


class ShimCompiler:
    """`compiler_api.Compiler` for the CPU. Raises CompileError where g++ is missing."""

    def __init__(self, cache: Path | None = None, *, is_watched: bool = False) -> None:
        self._cache = KernelCache(cache if cache is not None else flags().cache_dir / "simt")
        self._options = OPTIONS + (WATCHED_OPTIONS if is_watched else ())
        self._is_watched = is_watched
        self.identity = f"simt {_compiler_version()} {shim_digest()} {' '.join(self._options)}"

    @property
    def title(self) -> str:
        """g++ and the shim."""
        return f"{_compiler_version()} and the SIMT shim"

    def is_cached(self, unit: Unit) -> bool:
        """See Compiler."""
        return self._cache.read(self._name(unit)) is not None

    def compile(self, unit: Unit) -> Binary:
        """Compile, or take from the cache. Raises CompileError with g++'s messages."""
        name = self._name(unit)
        if (cached := self._cache.read(name)) is not None:
            return Binary(self._cache.path(name), cached, "", was_cached=True)
        with self._cache.building() as folder:
            log = self._compile(unit, folder)
            content = (folder / "kernel.so").read_bytes()
        self._cache.write(name, content)
        return Binary(self._cache.path(name), content, log, was_cached=False)

    def _name(self, unit: Unit) -> str:
        stem = unit.name.removesuffix(".cu").replace("/", "-")
        return f"{stem}-{cache_key(unit, self.identity)}.so"

    def _compile(self, unit: Unit, folder: Path) -> str:
        for name, text in (*unit.headers, (unit.name, unit.text)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "stub.cpp").write_text(stub(unit))
        defines = [f"-D{name}={value}" for name, value in unit.defines]
        command = ["g++", *self._options, *defines, f"-I{SHIM}", f"-I{folder}"]
        if not self._is_watched:
            return _run([*command, "-shared", "stub.cpp", "-o", "kernel.so"], unit, folder)
        # In two steps: linked without -fsanitize=thread, or its library would answer the hooks.
        log = _run([*command, "-c", "stub.cpp", "-o", "kernel.o"], unit, folder)
        link = ["g++", "-shared", "-Wl,-Bsymbolic", "kernel.o", "-o", "kernel.so"]
        return log + _run(link, unit, folder)


def kernel_names(text: str) -> list[str]:
    """Kernels of a source: `extern "C" __global__ void ... name(` or `KERNEL(threads) name(`."""
    return _KERNEL.findall(text)


def stub(unit: Unit) -> str:
    """The translation unit of a source: its shared memory is whatever statics it has."""
    lines = ['#include "simt.h"', "namespace {", f'#include "{unit.name}"', "}"]
    lines += [f"SIMT_EXPORT({name})" for name in kernel_names(unit.text)]
    return "\n".join(lines) + "\n"


def _run(command: list[str], unit: Unit, folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise CompileError("the simt device needs g++: install gcc 9 or later") from error
    if done.returncode:
        raise CompileError(f"{unit.title} does not compile with the shim:\n{done.stderr}")
    return done.stderr


@functools.cache
def shim_digest() -> str:
    """Hash of the shim's code: it decides bits as a compiler does."""
    return digest_of([], ((path.name, path.read_text()) for path in sorted(SHIM.glob("*.h"))))[:16]


@functools.cache
def _compiler_version() -> str:
    try:
        command = ["g++", "-dumpfullversion"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError("the simt device needs g++: install gcc 9 or later") from error
    return f"g++ {done.stdout.strip()}"
