"""The choice of a backend by name.

IS: names, and the fall-back of "auto". IS NOT: a backend. NVIDIA's libraries are loaded by the
devices when they are opened, not by an import of this.
"""

from __future__ import annotations

import warnings

from flashrt.backends.cpu.device import Activations, CpuDevice, PlainActivations
from flashrt.backends.cuda.device import Precision, open_device
from flashrt.backends.cuda.probe import probe
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError, DeviceWarning
from flashrt.core.backend import Backend

__all__ = ["CPU_ACTIVATIONS", "CPU_PLAIN", "DEVICES", "PRECISIONS", "Precision", "open_backend"]

PRECISIONS: tuple[Precision, ...] = ("bfloat16", "high", "fast")
# What `linear` makes of its activations on the CPU, by precision: over quantised weights, where
# that of the default is as docs/exactness.md measures it; and over weights in bfloat16. Others get
# float32.
CPU_ACTIVATIONS: dict[Precision, Activations] = {
    "bfloat16": "int16",
    "high": "float32",
    "fast": "int8",
}
CPU_PLAIN: dict[Precision, PlainActivations] = {
    "bfloat16": "float32",
    "high": "float32",
    "fast": "bfloat16",
}
DEVICES = ("auto", "cpu", "cuda", "simt")


def open_backend(
    device: str,
    precision: Precision = "bfloat16",
    *,
    cpu_alone_nbytes: int = 0,
    cpu_gives_way: bool = False,
) -> Backend:
    """The backend by name. Raises BackendError for an unknown name or an unusable device.

    CUDA is looked for only where it is asked for: by "cuda", and by "auto", which falls back to the
    CPU, and warns (DeviceWarning) where there is a GPU that cannot be used. What a
    precision is: `ACTS` of cuda.device, CPU_ACTIVATIONS and CPU_PLAIN here. `cpu_alone_nbytes`,
    `cpu_gives_way`: see CpuDevice.
    """
    if device not in DEVICES:
        raise BackendError(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}")
    if precision not in PRECISIONS:
        raise BackendError(f"precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if device == "simt":
        return SimtDevice(precision)
    if device == "cuda" or (device == "auto" and _may_use_gpu()):
        return open_device(precision)
    return CpuDevice(
        alone_nbytes=cpu_alone_nbytes,
        activations=CPU_ACTIVATIONS[precision],
        plain=CPU_PLAIN[precision],
        gives_way=cpu_gives_way,
    )


def _may_use_gpu() -> bool:
    status = probe()
    if status.has_gpu and not status.is_usable:
        warnings.warn(
            f"device='auto' runs on the CPU, though there is a GPU: {status.reason}",
            DeviceWarning,
            stacklevel=4,
        )
    return status.is_usable
