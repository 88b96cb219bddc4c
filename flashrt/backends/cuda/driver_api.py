"""The driver interface: the part of the CUDA driver API that the backend needs, as one protocol.

IS: the seam between the CUDA backend and what it runs on: `cuda.driver` (a GPU) or `simt.driver` (a
double on host memory). Handles are integers, as in C. Methods raise BackendError.
IS NOT: an abstraction over devices; that is core.backend.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flashrt.backends.cache import Binary

DEFAULT_SHARED_BYTES = 48 << 10  # dynamic shared memory that a kernel gets without asking
# Of what a multiprocessor has as first-level cache or as shared memory, the percentage asked for as
# shared memory. One value for all kernels: a multiprocessor drains before it changes its split, and
# then the next kernel cannot be set up while the last one still runs.
SHARED_PERCENT = 100


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the backend has to know about a device."""

    name: str
    arch: str  # "sm_90"
    memory_bytes: int
    driver_version: tuple[int, int]
    multiprocessors: int
    max_shared_bytes: int  # dynamic shared memory that a block may ask for
    ordinal: int = 0  # among the devices that this process sees
    is_integrated: bool = False  # device memory is the host's, as on Jetson and Spark

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, e.g. (9, 0)."""
        digits = self.arch.removeprefix("sm_")
        return int(digits[:-1]), int(digits[-1])


@dataclass(frozen=True, slots=True)
class HostBuffer:
    """Pinned host memory: the only host memory that asynchronous copies may touch; and kernels, if
    it is mapped.
    """

    address: int
    array: NDArray[np.uint8]
    device_address: int = 0  # as kernels see it; 0: it is not mapped


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Launch geometry.

    `is_programmatic`: the launch may start while its predecessor in the stream still runs; the
    kernel itself waits for it (griddepcontrol.wait) before it touches memory.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    is_programmatic: bool = False


class ArgumentBlock:
    """The packed arguments of one launch, passed by value as a kernel's only parameter."""

    __slots__ = ("_params", "_storage", "nbytes")

    def __init__(self, data: bytes) -> None:
        self.nbytes = len(data)
        self._storage = ctypes.create_string_buffer(data, len(data))
        self._params = (ctypes.c_void_p * 1)(ctypes.addressof(self._storage))

    @property
    def params(self) -> int:
        """Address of the `void *[1]` that cuLaunchKernel reads."""
        return ctypes.addressof(self._params)

    def clone(self) -> ArgumentBlock:
        """A copy that outlives this block, as a driver makes one at each launch."""
        return ArgumentBlock(self._storage.raw)


class Driver(Protocol):
    """Checked, counted driver calls; `counts` is keyed by the names of the C functions."""

    @property
    def info(self) -> DeviceInfo: ...
    @property
    def counts(self) -> Counter[str]: ...

    # whose context the thread has
    def enter(self) -> object:
        """This thread is in the device's context until `leave` gets the answer; may be nested."""
        ...

    def leave(self, before: object) -> None:
        """The thread has the context again that it came with, if it came with one."""
        ...

    # memory: addresses are device addresses unless they say host
    def mem_alloc(self, nbytes: int) -> int: ...
    def mem_free(self, address: int) -> None: ...
    def mem_info(self) -> tuple[int, int]:
        """(free, total) bytes."""
        ...

    def host_alloc(self, nbytes: int, *, is_mapped: bool = False) -> HostBuffer:
        """`is_mapped`: kernels may store into it. What they stored before an event is there for the
        host after it.
        """
        ...

    def host_free(self, buffer: HostBuffer) -> None: ...
    def copy_to_device(self, dst: int, src_host: int, nbytes: int, stream: int) -> None: ...
    def copy_rows_to_device(
        self, dst: int, dst_pitch: int, src_host: int, width: int, height: int, stream: int
    ) -> None:
        """`height` rows of `width` bytes, without gaps on the host, every `dst_pitch` there."""
        ...

    def copy_to_host(self, dst_host: int, src: int, nbytes: int, stream: int) -> None: ...
    def copy_on_device(self, dst: int, src: int, nbytes: int, stream: int) -> None: ...
    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None: ...

    # streams and events
    def stream_create(self) -> int: ...
    def stream_destroy(self, stream: int) -> None: ...
    def stream_sync(self, stream: int) -> None: ...
    def stream_wait(self, stream: int, event: int) -> None: ...
    def event_create(self, *, is_timed: bool = False) -> int: ...
    def event_destroy(self, event: int) -> None: ...
    def event_record(self, event: int, stream: int) -> None: ...
    def event_sync(self, event: int) -> None: ...
    def event_is_done(self, event: int) -> bool: ...
    def elapsed_us(self, start: int, end: int) -> float: ...

    # code
    def module_load(self, binary: Binary) -> int: ...
    def module_unload(self, module: int) -> None: ...
    def module_function(self, module: int, name: str) -> int:
        """A kernel; its multiprocessors are asked for SHARED_PERCENT of shared memory."""
        ...

    def allow_shared(self, function: int, nbytes: int) -> None:
        """Let a function use more than DEFAULT_SHARED_BYTES of dynamic shared memory."""
        ...

    def launch(
        self, function: int, config: LaunchConfig, block: ArgumentBlock, stream: int
    ) -> None: ...

    # graphs
    def capture_begin(self, stream: int) -> None: ...
    def capture_end(self, stream: int) -> int: ...
    def graph_instantiate(self, graph: int) -> int: ...
    def graph_upload(self, executable: int, stream: int) -> None: ...
    def graph_launch(self, executable: int, stream: int) -> None: ...
    def graph_dot(self, graph: int, path: Path) -> None: ...
    def graph_destroy(self, graph: int, executable: int) -> None: ...

    def close(self) -> None: ...
