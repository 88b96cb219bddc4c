"""The probe: can this process use a GPU, and if not, why not.

IS: what device="auto" and `flashrt doctor` ask; it never raises and leaves nothing open. Where
nothing can be opened, it looks for a GPU among the system's files: whoever has one wants to know.
IS NOT: a device.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path

from flashrt.backends.cuda.advice import EXTRAS, extra_for
from flashrt.backends.cuda.driver import CudaDriver
from flashrt.backends.cuda.nvrtc import Nvrtc
from flashrt.base.errors import FlashrtError
from flashrt.base.flags import hides_gpus

BINDINGS = "cuda-bindings"
# What the kernel modules of NVIDIA make, of cards, of Jetson, and of Windows' Linux.
_SIGNS = (
    "/dev/nvidiactl", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0",
    "/usr/lib/wsl/lib/libcuda.so.1",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CudaStatus:
    """What the probe found. Fields that could not be read are empty."""

    is_usable: bool
    reason: str  # why not, and what to do; empty if usable
    device: str = ""
    arch: str = ""  # "sm_90"
    driver_version: str = ""  # of CUDA, e.g. "13.0"
    nvrtc_version: str = ""
    memory_bytes: int = 0
    is_integrated: bool = False  # its memory is the host's
    bindings_version: str = ""  # of the package
    extra: str = ""  # of flashrt, for this driver: "cuda12" or "cuda13"
    has_gpu: bool = False  # there is one, usable or not, and it is not hidden on purpose

    @property
    def capability(self) -> str:
        """Compute capability, e.g. "9.0"."""
        digits = self.arch.removeprefix("sm_")
        return f"{digits[:-1]}.{digits[-1]}" if digits else ""

    def __str__(self) -> str:
        if not self.is_usable:
            return f"cuda: not usable: {self.reason}"
        kind = " shared with the host" if self.is_integrated else ""
        return (
            f"cuda: {self.device}, {self.arch}, {self.memory_bytes / 2**30:.1f} GiB{kind}, "
            f"driver for CUDA {self.driver_version}, NVRTC {self.nvrtc_version}"
        )


def probe(ordinal: int = 0) -> CudaStatus:
    """Open the driver and the compiler, look, and close again."""
    found = CudaStatus(False, "", bindings_version=_version(BINDINGS))
    try:
        driver = CudaDriver(ordinal)
    except FlashrtError as error:
        return replace(found, reason=str(error), has_gpu=_sees_gpu())
    try:
        info = driver.info
    finally:
        driver.close()
    major = info.driver_version[0]
    found = replace(
        found, device=info.name, arch=info.arch, memory_bytes=info.memory_bytes,
        driver_version=".".join(map(str, info.driver_version)),
        is_integrated=info.is_integrated, extra=extra_for(major), has_gpu=True,
    )  # fmt: skip
    try:
        compiler = Nvrtc(info.arch)
    except FlashrtError as error:
        return replace(found, reason=str(error))
    found = replace(found, nvrtc_version=compiler.version)
    if int(compiler.version.split(".")[0]) > major:
        reason = (
            f"a driver for CUDA {found.driver_version} cannot load kernels of NVRTC "
            f"{compiler.version}: "
            + (f"pip install 'flashrt[{found.extra}]', or " if found.extra else "")
            + "update the driver"
        )
        return replace(found, reason=reason)
    return replace(found, is_usable=True)


def needed_driver(bindings_version: str) -> str:
    """What of a driver a version of the bindings needs, in words; empty for an unknown version."""
    major = bindings_version.partition(".")[0]
    return f"a driver for CUDA {major} or later" if f"cuda{major}" in EXTRAS else ""


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sees_gpu() -> bool:
    """Whether files say that there is one; where CUDA_VISIBLE_DEVICES hides all, nobody asks."""
    return not hides_gpus() and any(Path(sign).exists() for sign in _SIGNS)
