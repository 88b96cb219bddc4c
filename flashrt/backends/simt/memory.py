"""Host memory dressed as device and pinned memory: allocations with bounds, poison and a limit.

IS: what makes a wrong address an error that names it, instead of a crash of the process.
IS NOT: able to watch what kernels touch; they run on raw pointers.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.backends.cuda.driver_api import HostBuffer
from flashrt.base.errors import BackendError

ALIGNMENT = 256  # of cuMemAlloc
POISON = 0xFF  # NaN in float32 and bfloat16


@dataclass(frozen=True, slots=True)
class _Allocation:
    address: int
    nbytes: int
    is_device: bool
    array: NDArray[np.uint8]  # keeps the memory alive


class Memory:
    """All allocations of one driver double; at most `limit_bytes` of device memory at a time."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._starts: list[int] = []  # ascending
        self._by_start: dict[int, _Allocation] = {}

    def allocate(self, nbytes: int, *, is_device: bool) -> HostBuffer:
        """Poisoned memory at a multiple of ALIGNMENT."""
        if nbytes < 1:
            raise BackendError(f"cuMemAlloc: CUDA_ERROR_INVALID_VALUE, {nbytes} bytes")
        if is_device and self.used_bytes + nbytes > self.limit_bytes:
            raise BackendError(
                f"cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY, {nbytes:,} bytes wanted, "
                f"{self.limit_bytes - self.used_bytes:,} of {self.limit_bytes:,} bytes are free; "
                "use a smaller max_positions, pool_bytes or lanes"
            )
        raw = np.empty(nbytes + ALIGNMENT, np.uint8)
        skip = -raw.ctypes.data % ALIGNMENT
        array = raw[skip : skip + nbytes]
        array.fill(POISON)
        allocation = _Allocation(array.ctypes.data, nbytes, is_device, array)
        bisect.insort(self._starts, allocation.address)
        self._by_start[allocation.address] = allocation
        self.used_bytes += nbytes if is_device else 0
        return HostBuffer(allocation.address, array)

    def free(self, address: int) -> None:
        """Forget an allocation."""
        allocation = self._by_start.pop(address, None)
        if allocation is None:
            raise BackendError(
                f"cuMemFree: CUDA_ERROR_INVALID_VALUE, {address:#x} was not allocated"
            )
        self._starts.remove(address)
        self.used_bytes -= allocation.nbytes if allocation.is_device else 0

    def check(self, call: str, address: int, nbytes: int, *, is_device: bool) -> None:
        """[address, address + nbytes) lies inside one allocation of that kind."""
        i = bisect.bisect_right(self._starts, address) - 1
        found = self._by_start[self._starts[i]] if i >= 0 else None
        kind = "device" if is_device else "pinned host"
        if found is None or address >= found.address + found.nbytes:
            raise BackendError(
                f"{call}: CUDA_ERROR_INVALID_VALUE, {address:#x} is in no {kind} allocation"
            )
        if found.is_device != is_device:
            raise BackendError(
                f"{call}: CUDA_ERROR_INVALID_VALUE, {address:#x} is not {kind} memory"
            )
        if address + nbytes > found.address + found.nbytes:
            raise BackendError(
                f"{call}: CUDA_ERROR_INVALID_VALUE, {nbytes:,} bytes at {address:#x} leave an "
                f"allocation of {found.nbytes:,} bytes at {found.address:#x}"
            )

    def array(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes of a checked range, without a copy."""
        start = self._starts[bisect.bisect_right(self._starts, address) - 1]
        allocation = self._by_start[start]
        return allocation.array[address - start : address - start + nbytes]
