"""The CPU kernel library: C sources compiled for this machine on first use, cached by content.

IS: finding a compiler, and building one shared object, file by file (two processes may build at
once; a file that was compiled before is not compiled again); a machine without a compiler runs
kernels that were built elsewhere for the same sources and processor.
IS NOT: the cache's files (cache), nor loading or calling the kernels (device).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashrt.backends.cache import Binary, KernelCache
from flashrt.backends.code import digest_of
from flashrt.base.errors import CompileError
from flashrt.base.flags import flags, thread_count
from flashrt.base.tracing import announce
from flashrt.core.backend import Progress
from flashrt.core.header import c_header
from flashrt.core.op import Op

KERNELS = Path(__file__).with_name("kernels")
# No -ffast-math, no contraction: bits are decided by the sources alone.
CFLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter")


@functools.cache
def compiler() -> tuple[str, ...]:
    """The C compiler command: FLASHRT_CC or $CC, else cc, gcc, clang, else `python -m ziglang cc`.

    Raises CompileError that says what to install.
    """
    if chosen := flags().cc:
        command = chosen.split()
        if shutil.which(command[0]) is None:
            raise CompileError(
                f"C compiler {command[0]!r} from FLASHRT_CC or CC is not on the PATH"
            )
        return tuple(command)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return (name,)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "cc")
    raise CompileError(
        "no C compiler: install gcc or clang (for instance `apt install gcc`, `xcode-select "
        "--install`), or `pip install flashrt[zig]`"
    )


def sources() -> list[Path]:
    """All C sources and headers, in a fixed order."""
    return sorted(p for p in KERNELS.iterdir() if p.suffix in (".c", ".h"))


def source_digest(ops: Sequence[Op], extra: Sequence[Path] = ()) -> str:
    """Hash of everything that decides the kernels' bits but the compiler; comments do not."""
    return digest_of(ops, ((path.name, path.read_text()) for path in (*sources(), *extra)))


def library(
    ops: Sequence[Op],
    folder: Path | None = None,
    extra: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Binary:
    """The shared object: from the cache, else built now.

    A build takes some seconds: `progress` is told "kernels", or a line on stderr says so. Raises
    CompileError; without a compiler, only where the cache holds no library for this processor.
    """
    cache = KernelCache(folder or flags().cache_dir / "cpu")
    stem = f"flashrt-{_key(source_digest(ops, extra), *CFLAGS, _machine())}"
    try:
        names = [f"{stem}-{_key(*compiler(), _compiler_version())}.so"]
        why_no_compiler = None
    except CompileError as error:  # bits do not depend on the compiler: any one's will do
        names = cache.names(f"{stem}-*.so")
        why_no_compiler = error
    for name in names:
        if (content := cache.read(name)) is not None:
            return Binary(cache.path(name), content, "", was_cached=True)
    if why_no_compiler is not None:
        raise CompileError(
            f"{why_no_compiler}; or bring kernels that `python build.py cpu --out DIR` made for "
            f"this processor: {cache.folder} holds none that can be used"
        ) from why_no_compiler
    if progress is None:
        announce(f"compiling the CPU kernels into {cache.folder}, once; this takes some seconds")
    objects = KernelCache(flags().cache_dir / "cpu" / "objects") if folder is None else None
    content = _build(ops, cache, objects, extra, progress or _tell_nobody)
    cache.write(names[0], content)
    return Binary(cache.path(names[0]), content, "", was_cached=False)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _tell_nobody(what: str, done: int, total: int) -> None:
    """The progress callback of who has none."""


def _build(
    ops: Sequence[Op],
    cache: KernelCache,
    objects: KernelCache | None,
    extra: Sequence[Path],
    progress: Progress,
) -> bytes:
    """With `objects`, files that none of the changes touch are taken from there: a new op with its
    kernel compiles that kernel.
    """
    paths = [*sources(), *extra]
    headers = "".join(p.read_text() for p in paths if p.suffix == ".h")
    files = [p for p in paths if p.suffix == ".c"]
    with cache.building() as work:
        made = [work / f"{i}-{p.stem}.o" for i, p in enumerate(files)]

        def compile_one(path: Path, output: Path) -> None:
            text = path.read_text()
            ops_h = c_header(ops, used_by=headers + text)
            key = _key(text, headers, ops_h, *CFLAGS, _machine(), *compiler(), _compiler_version())
            name = f"{path.stem}-{key}.o"
            known = None if objects is None else objects.read(name)
            if known is not None:
                output.write_bytes(known)
                return
            own = output.with_suffix("")
            own.mkdir()
            (own / "ops.h").write_text(ops_h)
            include = (f"-I{own}", f"-I{KERNELS}")
            _run((*compiler(), *CFLAGS, *WARNINGS, *include, "-c", str(path), "-o", str(output)))
            if objects is not None:
                objects.write(name, output.read_bytes())

        total = len(files) + 1  # and the link
        progress("kernels", 0, total)
        try:
            with ThreadPoolExecutor(thread_count()) as pool:
                for done, _ in enumerate(pool.map(compile_one, files, made), 1):
                    progress("kernels", done, total)
        except OSError as error:
            raise CompileError(f"cannot write into {work}: {error}") from error
        output = work / "kernels.so"
        _run((*compiler(), *CFLAGS, "-shared", *map(str, made), "-o", str(output), "-lm"))
        progress("kernels", total, total)
        return output.read_bytes()


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompileError(f"{' '.join(command)}\n{result.stderr.strip()[-4000:]}")


@functools.cache
def _compiler_version() -> str:
    result = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[0] if result.stdout else ""


def _machine() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = cpuinfo.read_text().splitlines()
    seen = dict.fromkeys(line for line in lines if line.startswith(wanted))
    return platform.machine() + hashlib.sha256("\n".join(seen).encode()).hexdigest()
