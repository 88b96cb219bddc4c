"""The CPU kernel library: C sources compiled for this machine on first use, cached by content.

IS: finding a compiler, building one shared object, publishing it atomically (two processes may
build at once). IS NOT: loading or calling it; see `device`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashrt.backends.code import digest_of
from flashrt.base.errors import CompileError
from flashrt.base.files import replacing
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
) -> tuple[Path, bool]:
    """Path of the shared object, built if it is not in the cache; and whether it was built now.

    A build takes some seconds: `progress` is told "kernels", or a line on stderr says so.
    """
    key = hashlib.sha256(
        "\0".join(
            (source_digest(ops, extra), *CFLAGS, *compiler(), _compiler_version(), _machine())
        ).encode()
    ).hexdigest()[:24]
    folder = folder or flags().cache_dir / "cpu"
    target = folder / f"flashrt-{key}.so"
    if target.exists():
        return target, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if progress is None:
            announce(f"compiling the CPU kernels into {folder}, once; this takes some seconds")
        _build(ops, target, extra, progress or _tell_nobody)
    except OSError as error:
        raise CompileError(
            f"cannot write the kernel cache {folder}: {error}; set FLASHRT_CACHE_DIR to a "
            f"folder you can write"
        ) from error
    return target, True


def _tell_nobody(what: str, done: int, total: int) -> None:
    """The progress callback of who has none."""


def _build(ops: Sequence[Op], target: Path, extra: Sequence[Path], progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as temporary:
        work = Path(temporary)
        (work / "ops.h").write_text(c_header(ops))
        include = (f"-I{work}", f"-I{KERNELS}")
        files = [p for p in (*sources(), *extra) if p.suffix == ".c"]
        objects = [str(work / f"{i}-{p.stem}.o") for i, p in enumerate(files)]
        commands = [
            (*compiler(), *CFLAGS, *WARNINGS, *include, "-c", str(p), "-o", o)
            for p, o in zip(files, objects, strict=True)
        ]
        total = len(commands) + 1  # and the link
        progress("kernels", 0, total)
        with ThreadPoolExecutor(thread_count()) as pool:
            for done, _ in enumerate(pool.map(_run, commands), 1):
                progress("kernels", done, total)
        output = work / target.name
        _run((*compiler(), *CFLAGS, "-shared", *objects, "-o", str(output), "-lm"))
        with replacing(target, is_durable=True, temporary_in=work) as built:
            output.replace(built)  # whoever is second publishes the same bytes
        progress("kernels", total, total)


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
