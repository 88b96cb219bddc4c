"""What a device can do, measured in the run that uses it: copy, read and multiply.

IS: bare kernels (cuda_src/limits.cu) and the driver's own copy, on a device opened for them alone
and closed again, so that its buffers are not beside the model's. IS NOT: data sheets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flashrt.backends.cuda.clock import DeviceClock
from flashrt.backends.cuda.device import CudaDevice
from flashrt.backends.cuda.extra_ops import (
    THREADS,
    add_kernels,
    copy_stream,
    mma_flop,
    mma_rate,
    read_stream,
)
from flashrt.core.backend import BoundLaunch


@dataclass(frozen=True, slots=True)
class LimitSizes:
    """How much is moved and multiplied."""

    buffer_bytes: int = 1 << 30  # far beyond any cache
    mma_steps: int = 32768  # some milliseconds: long enough for the power limit to speak
    repeats: int = 7


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Medians. A copied byte counts twice, read and written; `copy` is the faster of two ways."""

    driver_copy_bytes_per_s: float
    kernel_copy_bytes_per_s: float
    read_bytes_per_s: float
    mma_flops: float
    buffer_bytes: int

    @property
    def copy_bytes_per_s(self) -> float:
        """The copy bandwidth that others are fractions of."""
        return max(self.driver_copy_bytes_per_s, self.kernel_copy_bytes_per_s)


def measure_limits(open_device: Callable[[], CudaDevice], sizes: LimitSizes) -> DeviceLimits:
    """Open, measure, close. Raises BackendError."""
    device = open_device()
    try:
        return _measure(device, sizes)
    finally:
        device.close()


def _measure(device: CudaDevice, sizes: LimitSizes) -> DeviceLimits:
    add_kernels(device)
    device.build(())  # none of a model's ops
    nbytes = min(sizes.buffer_bytes, device.driver.mem_info()[0] // 8) // 4096 * 4096
    n_sms = device.driver.info.multiprocessors
    blocks, readers = 4 * n_sms, 8 * n_sms  # as many as fit, so that no wave is a short one
    src = device.allocate("limits, source", nbytes).address
    dst = device.allocate("limits, target", nbytes).address
    out = device.allocate("limits, sums", 4 * THREADS * blocks).address
    device.fill(src, nbytes, 0x3C)
    clock = DeviceClock(device, dst, nbytes)

    def seconds(launch: BoundLaunch) -> float:
        graph = device.capture([launch])
        device.replay(graph)  # once to warm up
        return clock.median_us(lambda: device.replay(graph), sizes.repeats) / 1e6

    driver_us = clock.median_us(
        lambda: device.driver.copy_on_device(dst, src, nbytes, device.stream), sizes.repeats
    )
    limits = DeviceLimits(
        driver_copy_bytes_per_s=2 * nbytes / (driver_us / 1e6),
        kernel_copy_bytes_per_s=2 * nbytes / seconds(copy_stream(src, dst, nbytes)),
        read_bytes_per_s=nbytes / seconds(read_stream(src, out, nbytes, readers)),
        mma_flops=mma_flop(blocks, sizes.mma_steps)
        / seconds(mma_rate(out, blocks, sizes.mma_steps)),
        buffer_bytes=nbytes,
    )
    clock.close()
    return limits
