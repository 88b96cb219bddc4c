"""The probe: can this process use a GPU, and if not, why not.

IS: what device="auto" and `flashrt doctor` ask; it never raises and leaves nothing open.
IS NOT: a device.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashrt.backends.cuda.driver import CudaDriver
from flashrt.backends.cuda.nvrtc import Nvrtc
from flashrt.base.errors import FlashrtError


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

    def __str__(self) -> str:
        if not self.is_usable:
            return f"cuda: not usable: {self.reason}"
        return (
            f"cuda: {self.device}, {self.arch}, {self.memory_bytes / 2**30:.1f} GiB, "
            f"driver for CUDA {self.driver_version}, NVRTC {self.nvrtc_version}"
        )


def probe(ordinal: int = 0) -> CudaStatus:
    """Open the driver and the compiler, look, and close again."""
    try:
        driver = CudaDriver(ordinal)
    except FlashrtError as error:
        return CudaStatus(False, str(error))
    try:
        info = driver.info
        version = ".".join(map(str, info.driver_version))
        try:
            compiler = Nvrtc(info.arch)
        except FlashrtError as error:
            return CudaStatus(False, str(error), info.name, info.arch, version)
        if int(compiler.version.split(".")[0]) > info.driver_version[0]:
            reason = (
                f"a driver for CUDA {version} cannot load kernels of NVRTC {compiler.version}: "
                f"update it, or pip install 'cuda-bindings[all]=={info.driver_version[0]}.*'"
            )
            return CudaStatus(False, reason, info.name, info.arch, version, compiler.version)
        return CudaStatus(
            True, "", info.name, info.arch, version, compiler.version, info.memory_bytes
        )
    finally:
        driver.close()
