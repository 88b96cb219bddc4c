"""`flashrt doctor`: what this machine offers, and what is missing, in one table.

IS: questions to the toolchain, the cache folder and the CUDA probe. IS NOT: benchmarks.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import flashrt
from flashrt.backends.cache import problem
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.cuda.probe import CudaStatus, needed_driver, probe
from flashrt.base.errors import FlashrtError
from flashrt.base.flags import flags, thread_count
from flashrt.commands import console
from flashrt.ops import OPS
from flashrt.view.units import bytes_text

LIBRARIES = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2", "xxhash", "rich")
OPTIONAL = ("matplotlib", "cuda-bindings", "ziglang")
Finding = tuple[str, str, bool | None]  # what, finding, is it fine (None: not needed)


def doctor(as_json: bool) -> int:
    """The command; 1 when something that the CPU device needs is missing."""
    with console.warnings_as_notes():
        kernels = _kernels()
        compiler = _compiler(is_needed=not kernels[2])
        findings = [*_machine(), compiler, kernels, _cache(), *_cuda(probe()), *_versions()]
    if as_json:
        console.print_json(
            [{"what": what, "finding": text, "is_fine": fine} for what, text, fine in findings]
        )
    else:
        styles = {True: ("ok", "green"), False: ("missing", "bold red"), None: ("optional", "dim")}
        rows: list[list[console.Part]] = [
            [what, console.styled(*styles[fine]), text] for what, text, fine in findings
        ]
        console.screen().print(console.table("flashrt doctor", ("", "", "~"), rows))
    return 0 if all(fine is not False for _, _, fine in findings) else 1


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> list[Finding]:
    system = f"{platform.system()} {platform.release()}, python {platform.python_version()}"
    return [
        (
            "flashrt",
            f"{version_of('flashrt') or 'from a checkout'} ({Path(flashrt.__file__).parent})",
            True,
        ),
        ("system", system, True),
        ("processor", f"{cpu_name()}, {thread_count()} of {os.cpu_count()} threads in use", True),
    ]


def _compiler(is_needed: bool) -> Finding:
    """Kernels that were built elsewhere need none."""
    try:
        return ("C compiler", " ".join(toolchain.compiler()), True)
    except FlashrtError as error:
        return ("C compiler", str(error), False if is_needed else None)


def _kernels() -> Finding:
    device = CpuDevice()
    try:
        with console.progress_bars() as progress:
            device.build(OPS, progress)
    except FlashrtError as error:
        return ("cpu device", str(error), False)
    was_built = "compiled just now" if device.counters.compilations else "from the cache"
    text = f"{device.description}, {was_built}"
    device.close()
    return ("cpu device", text, True)


def _cache() -> Finding:
    folder = flags().cache_dir
    if not folder.is_dir():
        return ("cache folder", f"{folder} (is made when it is needed)", True)
    if not os.access(folder, os.W_OK):
        return ("cache folder", f"{folder} cannot be written; set FLASHRT_CACHE_DIR", False)
    for path in (folder / kind for kind in ("cpu", "cuda", "simt")):
        if why := problem(path):
            return ("cache folder", f"{path} {why}: its kernels are not run", False)
    nbytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return ("cache folder", f"{folder}, {bytes_text(nbytes)}", True)


def _cuda(status: CudaStatus) -> list[Finding]:
    fine = True if status.is_usable else None
    found: list[Finding] = [("cuda device", str(status).removeprefix("cuda: "), fine)]
    if status.bindings_version:
        text = f"cuda-bindings {status.bindings_version}"
        if needed := needed_driver(status.bindings_version):
            text += f", which needs {needed}"
    else:
        text = "cuda-bindings is not installed"
    if status.driver_version:
        text += f"; the driver is for CUDA {status.driver_version}"
        text += f": flashrt[{status.extra}] fits it" if status.extra else ": too old for flashrt"
    elif not status.bindings_version:
        text += ": flashrt[cuda13], or flashrt[cuda12] where nvidia-smi says CUDA Version 12"
    found.append(("cuda packages", text, fine))
    if status.arch:
        memory = f"{bytes_text(status.memory_bytes)}, " + (
            "the host's: one memory for both" if status.is_integrated else "its own"
        )
        found.append(("cuda memory", f"{memory}; compute capability {status.capability}", fine))
    if mode := power_mode():
        found.append(("power mode", mode, None))
    return found


def power_mode() -> str:
    """What a Jetson's nvpmodel says; empty elsewhere. The mode bounds clocks, so all timings."""
    try:
        done = subprocess.run(
            ["nvpmodel", "-q"], capture_output=True, text=True, check=False, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    mode = re.search(r"NV Power Mode:\s*(\S.*)", done.stdout)
    return f"{mode[1].strip()} (nvpmodel)" if mode else ""


def _versions() -> list[Finding]:
    needed: list[Finding] = []
    for name in LIBRARIES:
        version = version_of(name)
        needed.append((name, version or f"pip install {name}", version is not None))
    return [*needed, *((n, version_of(n) or "not installed", None) for n in OPTIONAL)]
