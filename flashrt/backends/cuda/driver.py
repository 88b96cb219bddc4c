"""The CUDA driver through cuda-python: every call checked, counted and, when it fails, explained.

IS: the only file that imports cuda.bindings.driver, and that when a driver is opened, not before.
IS NOT: policy; it holds no buffers and no graphs, it hands out integers.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from flashrt.backends.cache import Binary
from flashrt.backends.cuda.advice import what_to_do
from flashrt.backends.cuda.driver_api import (
    SHARED_PERCENT,
    ArgumentBlock,
    DeviceInfo,
    HostBuffer,
    LaunchConfig,
)
from flashrt.base.errors import BackendError

MIN_CAPABILITY = (8, 0)


class _PerThread(threading.local):
    """The driver whose context this thread is in, between `enter` and `leave`."""

    inside: CudaDriver | None = None


_THREAD = _PerThread()
_NESTED = object()  # of `enter` in a thread that is inside already


class CudaDriver:
    """A device's primary context, as `driver_api.Driver`.

    Other libraries of the process may make other contexts current, at any time and in any thread:
    each outermost `enter`, and each call outside of one, asks which it is, and gives it back.
    Opening raises BackendError: no cuda-python, no driver library, no device, or one before sm_80.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._api = _import_api()
        self.counts: Counter[str] = Counter()
        self._context: object = None
        self._context_id = 0
        self._initialise()
        api = self._api
        self._device = self._call(api.cuDeviceGet, ordinal)
        self.info = self._read_info(ordinal)
        if self.info.capability < MIN_CAPABILITY:
            raise BackendError(
                f"{self.info.name} is {self.info.arch}; flashrt needs sm_80 (Ampere) or later: "
                "use device='cpu'"
            )
        self._context = self._call(api.cuDevicePrimaryCtxRetain, self._device)
        self._context_id = int(self._context)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        try:
            self._call(self._api.cuInit, 0)
        except RuntimeError as error:  # cuda-python looks for libcuda at the first call
            raise BackendError(
                "the NVIDIA driver library (libcuda.so.1, nvcuda.dll) is not on this machine: "
                "install the NVIDIA driver, start a container with --gpus all, or use device='cpu' "
                f"[{error}]"
            ) from error

    def _read_info(self, ordinal: int) -> DeviceInfo:
        api, device = self._api, self._device
        kinds = api.CUdevice_attribute

        def read(kind: object) -> int:
            return int(self._call(api.cuDeviceGetAttribute, kind, device))

        major = read(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = read(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        version = int(self._call(api.cuDriverGetVersion))
        return DeviceInfo(
            name=self._call(api.cuDeviceGetName, 128, device).split(b"\0")[0].decode(),
            arch=f"sm_{major}{minor}",
            memory_bytes=int(self._call(api.cuDeviceTotalMem, device)),
            driver_version=(version // 1000, version % 1000 // 10),
            multiprocessors=read(kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            max_shared_bytes=read(kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
            ordinal=ordinal,
            is_integrated=bool(read(kinds.CU_DEVICE_ATTRIBUTE_INTEGRATED)),
        )

    # ---- the context

    def enter(self) -> object:
        """A session may be driven from any thread, and a thread may drive several devices."""
        if self._context is None or _THREAD.inside is self:
            return _NESTED
        before = self._checked(self._api.cuCtxGetCurrent)
        if int(before) == self._context_id:
            before = None
        else:
            self._checked(self._api.cuCtxSetCurrent, self._context)
        outer, _THREAD.inside = _THREAD.inside, self
        return before, outer

    def leave(self, before: object) -> None:
        """A thread that came without a context keeps ours: so it is switched only once."""
        if before is _NESTED:
            return
        assert isinstance(before, tuple)
        context, _THREAD.inside = before
        if context is not None and int(context):
            self._checked(self._api.cuCtxSetCurrent, context)

    # ---- memory

    def mem_alloc(self, nbytes: int) -> int:
        """Device memory, not initialised."""
        return int(
            self._call(self._api.cuMemAlloc, nbytes, detail=lambda: self._memory_detail(nbytes))
        )

    def mem_free(self, address: int) -> None:
        """Free what mem_alloc gave; waits for the device."""
        self._call(self._api.cuMemFree, address)

    def mem_info(self) -> tuple[int, int]:
        """(free, total) bytes of device memory."""
        free, total = self._call(self._api.cuMemGetInfo)
        return int(free), int(total)

    def host_alloc(self, nbytes: int, *, is_mapped: bool = False) -> HostBuffer:
        """Pinned host memory."""
        api = self._api
        flags = api.CU_MEMHOSTALLOC_PORTABLE | api.CU_MEMHOSTALLOC_DEVICEMAP if is_mapped else 0
        address = int(self._call(api.cuMemHostAlloc, nbytes, flags))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        mapped = int(self._call(api.cuMemHostGetDevicePointer, address, 0)) if is_mapped else 0
        return HostBuffer(address, array, mapped)

    def host_free(self, buffer: HostBuffer) -> None:
        """Free what host_alloc gave."""
        self._call(self._api.cuMemFreeHost, buffer.address)

    def copy_to_device(self, dst: int, src_host: int, nbytes: int, stream: int) -> None:
        """Asynchronous; the source must stay as it is until the stream has passed."""
        self._call(self._api.cuMemcpyHtoDAsync, dst, src_host, nbytes, stream)

    def copy_rows_to_device(
        self, dst: int, dst_pitch: int, src_host: int, width: int, height: int, stream: int
    ) -> None:
        """Asynchronous, as copy_to_device; the host's rows lie one after another."""
        api = self._api
        copy = api.CUDA_MEMCPY2D()
        copy.srcMemoryType, copy.srcHost = api.CUmemorytype.CU_MEMORYTYPE_HOST, src_host
        copy.dstMemoryType = api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.dstDevice = api.CUdeviceptr(dst)
        copy.srcPitch, copy.dstPitch = width, dst_pitch
        copy.WidthInBytes, copy.Height = width, height
        self._call(api.cuMemcpy2DAsync, copy, stream)

    def copy_to_host(self, dst_host: int, src: int, nbytes: int, stream: int) -> None:
        """Asynchronous; the destination is valid once the stream has passed."""
        self._call(self._api.cuMemcpyDtoHAsync, dst_host, src, nbytes, stream)

    def copy_on_device(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Asynchronous copy of one range."""
        self._call(self._api.cuMemcpyDtoDAsync, dst, src, nbytes, stream)

    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        """Asynchronous fill."""
        self._call(self._api.cuMemsetD8Async, address, byte, nbytes, stream)

    # ---- streams and events

    def stream_create(self) -> int:
        """A stream that does not wait for the legacy default stream."""
        flags = self._api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call(self._api.cuStreamCreate, int(flags)))

    def stream_destroy(self, stream: int) -> None:
        """Release a stream; work already in it still runs."""
        self._call(self._api.cuStreamDestroy, stream)

    def stream_sync(self, stream: int) -> None:
        """Wait until all work in the stream is done."""
        self._call(self._api.cuStreamSynchronize, stream)

    def stream_wait(self, stream: int, event: int) -> None:
        """Later work in the stream starts after the event."""
        self._call(self._api.cuStreamWaitEvent, stream, event, 0)

    def event_create(self, *, is_timed: bool = False) -> int:
        """An event; only timed ones can be used with elapsed_us."""
        flags = self._api.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if is_timed else flags.CU_EVENT_DISABLE_TIMING
        return int(self._call(self._api.cuEventCreate, int(flag)))

    def event_destroy(self, event: int) -> None:
        """Release an event."""
        self._call(self._api.cuEventDestroy, event)

    def event_record(self, event: int, stream: int) -> None:
        """The event happens when the stream has done what it holds now."""
        self._call(self._api.cuEventRecord, event, stream)

    def event_sync(self, event: int) -> None:
        """Wait until the event has happened."""
        self._call(self._api.cuEventSynchronize, event)

    def event_is_done(self, event: int) -> bool:
        """Whether the event has happened."""
        before = self.enter()
        try:
            self.counts["cuEventQuery"] += 1
            (result,) = self._api.cuEventQuery(event)
        finally:
            self.leave(before)
        if result == self._api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._check("cuEventQuery", result, None)
        return True

    def elapsed_us(self, start: int, end: int) -> float:
        """Device time between two timed events."""
        return float(self._call(self._api.cuEventElapsedTime, start, end)) * 1e3

    # ---- code

    def module_load(self, binary: Binary) -> int:
        """Load a cubin."""
        load = self._api.cuModuleLoadData
        return int(self._call(load, binary.content, detail=lambda: str(binary.path)))

    def module_unload(self, module: int) -> None:
        """Give back what module_load took; no kernel of it may run."""
        self._call(self._api.cuModuleUnload, module)

    def module_function(self, module: int, name: str) -> int:
        """A kernel of a module; see SHARED_PERCENT."""
        function = int(
            self._call(self._api.cuModuleGetFunction, module, name.encode(), detail=lambda: name)
        )
        kinds = self._api.CUfunction_attribute
        carveout = kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        self._call(self._api.cuFuncSetAttribute, function, carveout, SHARED_PERCENT)
        return function

    def allow_shared(self, function: int, nbytes: int) -> None:
        """Let a function use more than 48 KiB of dynamic shared memory."""
        attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        limit = self.info.max_shared_bytes
        self._call(
            self._api.cuFuncSetAttribute, function, attribute, nbytes,
            detail=lambda: f"{nbytes} bytes of shared memory wanted, {self.info.arch} has {limit}",
        )  # fmt: skip

    def launch(
        self, function: int, config: LaunchConfig, block: ArgumentBlock, stream: int
    ) -> None:
        """Launch a kernel; the driver copies the argument block before this returns."""
        api = self._api
        if not config.is_programmatic:
            self._call(
                api.cuLaunchKernel,
                function,
                *config.grid,
                *config.block,
                config.shared_bytes,
                stream,
                block.params,
                0,
            )
            return
        attribute = api.CUlaunchAttribute()
        attribute.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        geometry = api.CUlaunchConfig()
        geometry.gridDimX, geometry.gridDimY, geometry.gridDimZ = config.grid
        geometry.blockDimX, geometry.blockDimY, geometry.blockDimZ = config.block
        geometry.sharedMemBytes, geometry.hStream = config.shared_bytes, api.CUstream(stream)
        geometry.attrs, geometry.numAttrs = [attribute], 1
        self._call(api.cuLaunchKernelEx, geometry, function, block.params, 0)

    # ---- graphs

    def capture_begin(self, stream: int) -> None:
        """Record what this thread puts into the stream instead of running it."""
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call(self._api.cuStreamBeginCapture, stream, mode)

    def capture_end(self, stream: int) -> int:
        """The graph recorded."""
        return int(self._call(self._api.cuStreamEndCapture, stream))

    def graph_instantiate(self, graph: int) -> int:
        """An executable graph."""
        return int(self._call(self._api.cuGraphInstantiate, graph, 0))

    def graph_upload(self, executable: int, stream: int) -> None:
        """Move an executable to the device now rather than at its first launch."""
        self._call(self._api.cuGraphUpload, executable, stream)

    def graph_launch(self, executable: int, stream: int) -> None:
        """Run an executable."""
        self._call(self._api.cuGraphLaunch, executable, stream)

    def graph_dot(self, graph: int, path: Path) -> None:
        """Write a graph as Graphviz, with kernel names and launch geometry."""
        flags = self._api.CUgraphDebugDot_flags
        shown = (
            flags.CU_GRAPH_DEBUG_DOT_FLAGS_KERNEL_NODE_PARAMS
            | flags.CU_GRAPH_DEBUG_DOT_FLAGS_KERNEL_NODE_ATTRIBUTES
        )
        self._call(self._api.cuGraphDebugDotPrint, graph, str(path).encode(), int(shown))

    def graph_destroy(self, graph: int, executable: int) -> None:
        """Release a graph and its executable."""
        self._call(self._api.cuGraphExecDestroy, executable)
        self._call(self._api.cuGraphDestroy, graph)

    def close(self) -> None:
        """Give the context back; nothing may be used afterwards. The thread keeps the context that
        it came with, but not ours: the last user's release destroys it.
        """
        if int(self._checked(self._api.cuCtxGetCurrent)) == self._context_id:
            self._checked(self._api.cuCtxSetCurrent, None)
        self._context, self._context_id = None, 0
        self._checked(self._api.cuDevicePrimaryCtxRelease, self._device)

    # ---- checking

    def _call(
        self, function: Callable[..., Any], *args: object, detail: Callable[[], str] | None = None
    ) -> Any:
        if _THREAD.inside is self:
            return self._checked(function, *args, detail=detail)
        before = self.enter()
        try:
            return self._checked(function, *args, detail=detail)
        finally:
            self.leave(before)

    def _checked(
        self, function: Callable[..., Any], *args: object, detail: Callable[[], str] | None = None
    ) -> Any:
        name = function.__name__
        self.counts[name] += 1
        result, *values = function(*args)
        if result:
            self._check(name, result, detail)
        return values[0] if len(values) == 1 else tuple(values)

    def _check(self, name: str, result: Any, detail: Callable[[], str] | None) -> None:
        if not int(result):
            return
        _, described = self._api.cuGetErrorString(result)
        where = f" ({detail()})" if detail else ""
        text = f"{name}{where}: {result.name}, {(described or b'unknown error').decode()}"
        advice = what_to_do(result.name)
        raise BackendError(f"{text}; {advice}" if advice else text)

    def _memory_detail(self, nbytes: int) -> str:
        result, free, total = self._api.cuMemGetInfo()
        known = (
            f"{int(free):,} of {int(total):,} bytes are free"
            if not int(result)
            else "free memory unknown"
        )
        return f"{nbytes:,} bytes wanted, {known}"


def _import_api() -> ModuleType:
    try:
        from cuda.bindings import driver  # here, for `import flashrt` must not touch CUDA
    except ImportError as error:
        raise BackendError(
            "the CUDA backend needs cuda-python: pip install 'flashrt[cuda]', or use device='cpu' "
            f"[{error}]"
        ) from error
    module: ModuleType = driver
    return module
