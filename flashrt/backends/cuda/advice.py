"""What to do about a driver error, by the name of its CUresult.

IS: one table, and which extra of flashrt fits a driver. IS NOT: detection; see `driver`.
"""

from __future__ import annotations

EXTRAS = ("cuda12", "cuda13")  # of pyproject.toml: bindings and NVRTC of one major version each

_STICKY = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS", "LAUNCH_FAILED", "HARDWARE_STACK_ERROR", "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC", "ASSERT", "ECC_UNCORRECTABLE",
    )
)  # fmt: skip
_RESTART = (
    "a kernel launched earlier failed, and the device context is lost with all its memory: restart "
    "the process; to find the kernel, run with device='simt' or under compute-sanitizer"
)
_OTHER_TOOLKIT = (
    "the driver is too old for kernels compiled by the installed NVRTC: update the driver, or "
    "install NVRTC of the driver's major version, such as pip install 'flashrt[cuda12]'"
)
_CAPTURE = (
    "a call that may not run during stream capture did; this is a bug in flashrt, please report it"
)
_ADVICE = {
    "NO_DEVICE": "no GPU is visible: check nvidia-smi, CUDA_VISIBLE_DEVICES, or use device='cpu'",
    "INVALID_DEVICE": "there is no device of this ordinal: check CUDA_VISIBLE_DEVICES",
    "SYSTEM_DRIVER_MISMATCH": "kernel module and driver library differ: reboot or reinstall",
    "DEVICE_UNAVAILABLE": "another process holds the GPU exclusively: end it, or use another GPU",
    "OUT_OF_MEMORY": "use a smaller max_positions, pool_bytes or lanes, or end other GPU users",
    "UNSUPPORTED_PTX_VERSION": _OTHER_TOOLKIT,
    "INVALID_IMAGE": _OTHER_TOOLKIT,
    "NO_BINARY_FOR_GPU": _OTHER_TOOLKIT,
    "CALL_REQUIRES_NEWER_DRIVER": _OTHER_TOOLKIT,
    "LAUNCH_OUT_OF_RESOURCES": "a block needs more registers or shared memory than the GPU has",
    "LAUNCH_TIMEOUT": f"the display watchdog stopped a kernel that took too long; {_RESTART}",
    "NOT_FOUND": "the module holds no such kernel: clear the kernel cache (FLASHRT_CACHE_DIR)",
    "STREAM_CAPTURE_UNSUPPORTED": _CAPTURE,
    "STREAM_CAPTURE_INVALIDATED": _CAPTURE,
}  # fmt: skip


def extra_for(driver_major: int) -> str:
    """The extra whose kernels a driver for that CUDA can load; the newest for newer ones, and empty
    for a driver that is too old.
    """
    fitting = [name for name in EXTRAS if int(name.removeprefix("cuda")) <= driver_major]
    return fitting[-1] if fitting else ""


def what_to_do(result: str) -> str:
    """Advice for a CUresult name such as "CUDA_ERROR_NO_DEVICE"; empty where there is none."""
    if result in _STICKY:
        return _RESTART
    return _ADVICE.get(result.removeprefix("CUDA_ERROR_"), "")
