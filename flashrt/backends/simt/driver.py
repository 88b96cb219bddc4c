"""A double of the CUDA driver on host memory, with kernels built by the SIMT shim.

IS: the same interface as cuda.driver, stricter than a GPU: streams are lazy queues that only a sync
or an event drains, so that a missing sync reads old data every time; copies are checked against
allocations; limits on geometry, shared memory and capture are those of the smallest supported GPU.
IS NOT: fast, or a model of time.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

from flashrt.backends import shared_object
from flashrt.backends.cache import Binary
from flashrt.backends.cuda.driver_api import (
    ArgumentBlock,
    DeviceInfo,
    HostBuffer,
    LaunchConfig,
)
from flashrt.backends.simt.kernel import MAX_SHARED_BYTES, Kernel, find, mix
from flashrt.backends.simt.memory import Memory
from flashrt.base.errors import BackendError

Work = Callable[[], object]


@dataclass(slots=True)
class _Stream:
    """Work not done yet, and how much was put in and done since the stream was created."""

    queue: deque[Work] = field(default_factory=deque)
    issued: int = 0
    done: int = 0
    captured: list[Work] | None = None  # not None while capturing


@dataclass(slots=True)
class _Event:
    stream: _Stream | None = None
    ticket: int = 0  # happens when stream.done reaches it
    time: float = 0.0


class SimtDriver:
    """`driver_api.Driver` on host memory.

    `seed` 0 runs threads and blocks in order; any other seed randomises each launch.
    `memory_bytes` and `multiprocessors` are those of the pretended device.
    """

    def __init__(
        self, seed: int = 0, memory_bytes: int = 16 << 30, multiprocessors: int = 16
    ) -> None:
        self.info = DeviceInfo(
            "SIMT shim", "sm_80", memory_bytes, (0, 0), multiprocessors, MAX_SHARED_BYTES
        )
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._n_runs = 0
        self._memory = Memory(memory_bytes)
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Event] = {}
        self._modules: dict[int, tuple[Path, ctypes.CDLL]] = {}
        self._functions: dict[int, Kernel] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._next_handle = 0

    # ---- the context

    def enter(self) -> object:
        """Host memory has no contexts."""
        return None

    def leave(self, before: object) -> None:
        """See enter."""

    # ---- memory

    def mem_alloc(self, nbytes: int) -> int:
        """Poisoned device memory, of which `memory_bytes` exist."""
        self._count("cuMemAlloc", may_capture=False)
        return self._memory.allocate(nbytes, is_device=True).address

    def mem_free(self, address: int) -> None:
        """Free device memory, after all work is done."""
        self._count("cuMemFree", may_capture=False)
        for stream in self._streams.values():
            self._drain(stream, stream.issued)
        self._memory.free(address)

    def mem_info(self) -> tuple[int, int]:
        """(free, total) bytes."""
        self._count("cuMemGetInfo")
        return self._memory.limit_bytes - self._memory.used_bytes, self._memory.limit_bytes

    def host_alloc(self, nbytes: int, *, is_mapped: bool = False) -> HostBuffer:
        """Memory that asynchronous copies may touch; kernels could touch all that there is."""
        self._count("cuMemHostAlloc", may_capture=False)
        buffer = self._memory.allocate(nbytes, is_device=False)
        return replace(buffer, device_address=buffer.address) if is_mapped else buffer

    def host_free(self, buffer: HostBuffer) -> None:
        """Free what host_alloc gave."""
        self._count("cuMemFreeHost", may_capture=False)
        self._memory.free(buffer.address)

    def copy_to_device(self, dst: int, src_host: int, nbytes: int, stream: int) -> None:
        """Reads the source when the stream gets there, not now."""
        self._count("cuMemcpyHtoDAsync")
        self._check_range("cuMemcpyHtoDAsync", dst, nbytes)
        self._memory.check("cuMemcpyHtoDAsync", src_host, nbytes, is_device=False)
        self._put(stream, lambda: _move(dst, src_host, nbytes))

    def copy_rows_to_device(
        self, dst: int, dst_pitch: int, src_host: int, width: int, height: int, stream: int
    ) -> None:
        """Reads the source when the stream gets there, not now."""
        self._count("cuMemcpy2DAsync")
        if width > dst_pitch or height < 1:
            raise BackendError(f"cuMemcpy2DAsync: {height} rows of {width}, pitch {dst_pitch}")
        self._check_range("cuMemcpy2DAsync", dst, (height - 1) * dst_pitch + width)
        self._memory.check("cuMemcpy2DAsync", src_host, width * height, is_device=False)

        def work() -> None:
            for row in range(height):
                _move(dst + row * dst_pitch, src_host + row * width, width)

        self._put(stream, work)

    def copy_to_host(self, dst_host: int, src: int, nbytes: int, stream: int) -> None:
        """Writes the destination when the stream gets there, not now."""
        self._count("cuMemcpyDtoHAsync")
        self._check_range("cuMemcpyDtoHAsync", src, nbytes)
        self._memory.check("cuMemcpyDtoHAsync", dst_host, nbytes, is_device=False)
        self._put(stream, lambda: _move(dst_host, src, nbytes))

    def copy_on_device(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """One range; refused where source and destination overlap."""
        self._count("cuMemcpyDtoDAsync")
        self._check_range("cuMemcpyDtoDAsync", dst, nbytes)
        self._check_range("cuMemcpyDtoDAsync", src, nbytes)
        if abs(dst - src) < nbytes:
            raise BackendError(f"cuMemcpyDtoDAsync: {nbytes} bytes from {src:#x} overlap {dst:#x}")
        self._put(stream, lambda: _move(dst, src, nbytes))

    def fill(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        """Set each byte of a range."""
        self._count("cuMemsetD8Async")
        self._check_range("cuMemsetD8Async", address, nbytes)
        self._put(stream, lambda: ctypes.memset(address, byte, nbytes))

    # ---- streams and events

    def stream_create(self) -> int:
        """An empty queue."""
        self._count("cuStreamCreate", may_capture=False)
        handle = self._handle()
        self._streams[handle] = _Stream()
        return handle

    def stream_destroy(self, stream: int) -> None:
        """Finish a stream's work and forget it."""
        self._count("cuStreamDestroy")
        self._drain(self._streams[stream], self._streams[stream].issued)
        del self._streams[stream]

    def stream_sync(self, stream: int) -> None:
        """Do all work of the stream."""
        self._count("cuStreamSynchronize", may_capture=False)
        self._drain(self._streams[stream], self._streams[stream].issued)

    def stream_wait(self, stream: int, event: int) -> None:
        """Later work of the stream finds the event happened."""
        self._count("cuStreamWaitEvent")
        source, ticket = self._events[event].stream, self._events[event].ticket
        if source is not None:
            self._put(stream, lambda: self._drain(source, ticket))

    def event_create(self, *, is_timed: bool = False) -> int:
        """An event that has happened."""
        del is_timed  # all of ours are
        self._count("cuEventCreate")
        handle = self._handle()
        self._events[handle] = _Event()
        return handle

    def event_destroy(self, event: int) -> None:
        """Forget an event."""
        self._count("cuEventDestroy")
        del self._events[event]

    def event_record(self, event: int, stream: int) -> None:
        """The event happens when the work in the stream is done."""
        self._count("cuEventRecord")
        mark = self._events[event]

        def work() -> None:
            mark.time = perf_counter()

        self._put(stream, work)
        mark.stream, mark.ticket = self._streams[stream], self._streams[stream].issued

    def event_sync(self, event: int) -> None:
        """Do the work before the event."""
        self._count("cuEventSynchronize", may_capture=False)
        mark = self._events[event]
        if mark.stream is not None:
            self._drain(mark.stream, mark.ticket)

    def event_is_done(self, event: int) -> bool:
        """Each question lets the stream do one piece of work: polling ends, but not at once."""
        self._count("cuEventQuery", may_capture=False)
        mark = self._events[event]
        if mark.stream is None or mark.stream.done >= mark.ticket:
            return True
        self._drain(mark.stream, mark.stream.done + 1)
        return mark.stream.done >= mark.ticket

    def elapsed_us(self, start: int, end: int) -> float:
        """Host time between two events that have happened."""
        self._count("cuEventElapsedTime")
        return (self._events[end].time - self._events[start].time) * 1e6

    # ---- code

    def module_load(self, binary: Binary) -> int:
        """Load a shared object built by the shim."""
        self._count("cuModuleLoadData", may_capture=False)
        handle = self._handle()
        try:
            library = shared_object.load(binary.path, binary.content)
        except OSError as error:
            raise BackendError(f"cuModuleLoadData ({binary.path}): {error}") from error
        self._modules[handle] = (binary.path, library)
        return handle

    def module_unload(self, module: int) -> None:
        """Forget a module; the process keeps its library."""
        self._count("cuModuleUnload", may_capture=False)
        del self._modules[module]

    def module_function(self, module: int, name: str) -> int:
        """A kernel of a module; shared memory is not split here."""
        self._count("cuModuleGetFunction")
        function = find(*self._modules[module], name)
        handle = self._handle()
        self._functions[handle] = function
        return handle

    def allow_shared(self, function: int, nbytes: int) -> None:
        """Raise a function's limit of dynamic shared memory."""
        self._count("cuFuncSetAttribute")
        if nbytes > MAX_SHARED_BYTES:
            raise BackendError(
                f"cuFuncSetAttribute: {nbytes} bytes of shared memory wanted, {MAX_SHARED_BYTES} "
                "is the most that a block has on sm_80"
            )
        self._functions[function].shared_limit_bytes = nbytes

    def launch(
        self, function: int, config: LaunchConfig, block: ArgumentBlock, stream: int
    ) -> None:
        """Queue a launch with a copy of its arguments."""
        self._count("cuLaunchKernelEx" if config.is_programmatic else "cuLaunchKernel")
        kernel = self._functions[function]
        kernel.check(config)
        copied = block.clone()
        self._put(stream, lambda: kernel.run(config, copied, self._next_seed()))

    def _next_seed(self) -> int:
        """A different, reproducible schedule for each launch; 0 where schedules are in order."""
        self._n_runs += 1
        return mix(self._seed + self._n_runs) if self._seed else 0

    # ---- graphs

    def capture_begin(self, stream: int) -> None:
        """Record what is put into the stream."""
        self._count("cuStreamBeginCapture", may_capture=False)
        self._streams[stream].captured = []

    def capture_end(self, stream: int) -> int:
        """What was recorded."""
        self._count("cuStreamEndCapture")
        works = self._streams[stream].captured
        if works is None:
            raise BackendError("cuStreamEndCapture: CUDA_ERROR_ILLEGAL_STATE, no capture is open")
        self._streams[stream].captured = None
        handle = self._handle()
        self._graphs[handle] = works
        return handle

    def graph_instantiate(self, graph: int) -> int:
        """An executable: the same list under another handle."""
        self._count("cuGraphInstantiate", may_capture=False)
        handle = self._handle()
        self._graphs[handle] = self._graphs[graph]
        return handle

    def graph_upload(self, executable: int, stream: int) -> None:
        """Nothing moves on the host."""
        self._count("cuGraphUpload", may_capture=False)
        del executable, stream

    def graph_launch(self, executable: int, stream: int) -> None:
        """Queue all works of a graph."""
        self._count("cuGraphLaunch", may_capture=False)
        for work in self._graphs[executable]:
            self._put(stream, work)

    def graph_dot(self, graph: int, path: Path) -> None:
        """Write the graph as Graphviz: a chain, for a stream captures nothing else."""
        self._count("cuGraphDebugDotPrint")
        n = len(self._graphs[graph])
        chain = " -> ".join(f"node{i}" for i in range(n))
        path.write_text(f"digraph graph_{graph} {{\n  {chain};\n}}\n")

    def graph_destroy(self, graph: int, executable: int) -> None:
        """Forget a graph."""
        self._count("cuGraphDestroy")
        del self._graphs[graph], self._graphs[executable]

    def close(self) -> None:
        """Finish all work."""
        for stream in self._streams.values():
            self._drain(stream, stream.issued)

    # ---- queues

    def _count(self, call: str, *, may_capture: bool = True) -> None:
        self.counts[call] += 1
        if not may_capture and any(s.captured is not None for s in self._streams.values()):
            raise BackendError(f"{call}: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, a capture is open")

    def _handle(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def _check_range(self, call: str, address: int, nbytes: int) -> None:
        self._memory.check(call, address, nbytes, is_device=True)

    def _put(self, handle: int, work: Work) -> None:
        stream = self._streams[handle]
        if stream.captured is not None:
            stream.captured.append(work)
            return
        stream.queue.append(work)
        stream.issued += 1

    def _drain(self, stream: _Stream, ticket: int) -> None:
        while stream.done < ticket:
            work = stream.queue.popleft()
            stream.done += 1
            work()


def _move(dst: int, src: int, nbytes: int) -> None:
    ctypes.memmove(dst, src, nbytes)
