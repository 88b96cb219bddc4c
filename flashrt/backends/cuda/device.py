"""The CUDA device: core.backend.Backend over a driver and a compiler.

IS: the verbs, on one compute stream, one at a time whatever thread they come from. With
`driver.CudaDriver` and `nvrtc.Nvrtc` it runs on a GPU, with simt's double and shim on any CPU: this
code does not know which. Driver memory is allocated at open and by `allocate`, never after `seal`.
IS NOT: geometry (kernels), storage (layouts), driver calls (driver).
"""

from __future__ import annotations

import functools
import hashlib
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from flashrt.backends.cuda import kernels, layouts
from flashrt.backends.cuda.compiler_api import Compiler
from flashrt.backends.cuda.driver import CudaDriver
from flashrt.backends.cuda.driver_api import ArgumentBlock, Driver, LaunchConfig
from flashrt.backends.cuda.fused_ops import COUNTERS
from flashrt.backends.cuda.fusion import fuse
from flashrt.backends.cuda.graph import CudaGraph, Node
from flashrt.backends.cuda.library import KernelLibrary
from flashrt.backends.cuda.nvrtc import Nvrtc
from flashrt.backends.cuda.sending import WordSlots, sent_by
from flashrt.backends.cuda.sources import Sources
from flashrt.backends.cuda.staging import DownloadRing, Readback, UploadRing, WordRing
from flashrt.backends.cuda.views import CPU, CUDA, DeviceArray, view
from flashrt.base.errors import BackendError, PlanError, SealedError
from flashrt.base.system import at_fork
from flashrt.base.tracing import PLAN, trace
from flashrt.core.backend import BoundLaunch, Bytes, Counters, Graph, Memory, Progress, Storage
from flashrt.core.copylist import COPY_FORMAT, CopyList, Upload
from flashrt.core.digest import DigestTerm
from flashrt.core.groups import Planes
from flashrt.core.op import Op
from flashrt.core.region import ActDTypes, DType, Region

Precision = Literal["bfloat16", "high", "fast"]
# "fast" is what others compute: one bfloat16, also where that shows; see docs/kernels.md.
ACTS: Mapping[Precision, ActDTypes] = {
    "bfloat16": ActDTypes(DType.BF16, DType.BF16X2),
    "high": ActDTypes(DType.BF16X2, DType.F32),
    "fast": ActDTypes(DType.BF16, DType.BF16),
}
_COPY_BYTES = struct.calcsize(COPY_FORMAT)
_TERM_BYTES = struct.calcsize(DigestTerm.FORMAT)
_SUM_BYTES = 16  # (lo, hi)
_SENT_BYTES = 256  # of region SENT, with what keeps the tables behind it aligned
_PROGRAMMATIC_DRIVER = (12, 3)  # the first that keeps programmatic edges in graphs


@dataclass(frozen=True, slots=True)
class Capacities:
    """Sizes fixed at open, so that nothing is allocated later; larger work goes in pieces."""

    staging_bytes: int = 4 << 20  # a section of the upload ring; a readback buffer
    copies: int = 4096  # descriptors of one copy launch
    terms: int = 512  # terms of one digest launch
    reserve_bytes: int = 224 << 20  # device memory left for kernels, their workspace and graphs


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """One allocation."""

    name: str
    address: int
    nbytes: int


_P = ParamSpec("_P")
_R = TypeVar("_R")
_Method = Callable[Concatenate["CudaDevice", _P], _R]


class _Forks:
    """How many forks lie between the first process and this one."""

    count = 0


def _count_fork() -> None:
    _Forks.count += 1


at_fork(_count_fork)


def _verb(method: _Method[_P, _R]) -> _Method[_P, _R]:
    """A method that puts work into the stream: rings, tables and events are not made for two
    threads at once, nor for a process that has only a copy of them.
    """

    @functools.wraps(method)
    def call(self: CudaDevice, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        self._refuse_after_fork()
        with self._lock:
            if self._is_closed:
                raise BackendError(f"{self.name}: the device is closed; load another engine")
            before = self.driver.enter()
            try:
                return method(self, *args, **kwargs)
            finally:
                self.driver.leave(before)

    return cast(_Method[_P, _R], call)


class CudaDevice:
    """See core.backend.Backend for the contract of the verbs."""

    is_async = True
    most_rows = 2048  # by then launches fill the largest device: docs/cuda.md

    def __init__(
        self,
        driver: Driver,
        compiler: Compiler,
        precision: Precision = "bfloat16",
        *,
        name: str = "cuda",
        is_host: bool = False,
        is_fused: bool = True,
        capacities: Capacities | None = None,
    ) -> None:
        """`is_host`: device memory is host memory, and may be seen by numpy. `is_fused`: captured
        launches of few rows are fused where they can be (see fusion), with the same bits; `eager`
        never fuses.
        """
        if precision not in ACTS:
            raise BackendError(f"precision {precision!r} is not one of {sorted(ACTS)}")
        self.name = name
        self.acts = ACTS[precision]
        self.counters = Counters()
        self.driver = driver
        self._device_type = CPU if is_host else CUDA
        self._is_fused = is_fused
        self._compiler = compiler
        self._capacities = capacities or Capacities()
        self._sources = Sources()
        self._expansions = dict(kernels.EXPANSIONS)
        self._library = KernelLibrary(driver, compiler, self._sources)
        self._n_sms = driver.info.multiprocessors
        self._is_sealed = False
        self._is_built = False
        self._is_closed = False
        self._lock = threading.RLock()  # held through a verb
        self._fork_count = _Forks.count  # of the process that opened the driver
        self._memories: list[DeviceMemory] = []
        self._workspace: DeviceMemory | None = None  # of kernels, once one of them needs it
        self._graphs: list[CudaGraph] = []
        self._runs_at: dict[int, bytes] = {}  # tables of runs, as they lie on the device
        self._stream = driver.stream_create()
        self._capture_stream = driver.stream_create()
        self._ring = UploadRing(driver, self._stream, self._capacities.staging_bytes)
        self._readback = Readback(driver, self._stream, self._capacities.staging_bytes)
        self._downloads = DownloadRing(driver, self._stream, self._capacities.staging_bytes)
        self._words = WordRing(driver, self._stream)
        table_bytes = self._capacities.copies * _COPY_BYTES
        terms_bytes = self._capacities.terms * (_TERM_BYTES + _SUM_BYTES)
        counters_bytes = self.storage(COUNTERS).nbytes
        zeros_bytes = counters_bytes + _SENT_BYTES
        nbytes = zeros_bytes + table_bytes + terms_bytes
        self._tables = DeviceMemory("tables", driver.mem_alloc(nbytes), nbytes)
        self._counters_at = self._tables.address
        driver.fill(self._counters_at, 0, zeros_bytes, self._stream)
        self._sent = WordSlots(driver, self._stream, self._counters_at + counters_bytes)
        self._copies_at = self._counters_at + zeros_bytes
        self._terms_at = self._copies_at + table_bytes
        self._sums_at = self._terms_at + self._capacities.terms * _TERM_BYTES
        trace(PLAN, f"{self.description}, act {self.acts}")

    # ---- identity and storage

    @property
    def kernel_digest(self) -> str:
        """Hash of sources, argument structs, compiler, architecture and activation dtype."""
        parts = (self._sources.digest(), self._compiler.identity, str(self.acts))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def description(self) -> str:
        """One line for people."""
        info = self.driver.info
        version = ".".join(map(str, info.driver_version))
        memory = f"{info.memory_bytes / 2**30:.1f} GiB"
        return f"{self.name}: {info.name}, {info.arch}, {memory}, driver for CUDA {version}"

    @property
    def stream(self) -> int:
        """The compute stream, for code that launches beside the tapes."""
        return self._stream

    def storage(self, region: Region) -> Storage:
        """See Backend."""
        return layouts.storage(region, self.acts)

    def pack(self, region: Region, array: NDArray[np.generic] | Planes, out: Bytes) -> None:
        """See Backend."""
        layouts.pack(region, array, out, self.acts)

    def unpack(self, region: Region, raw: Bytes) -> NDArray[np.generic]:
        """See Backend."""
        return layouts.unpack(region, raw, self.acts)

    def digest_layout(self, region: Region) -> int:
        """See Backend."""
        return layouts.digest_layout(region)

    def view(self, region: Region, address: int) -> DeviceArray:
        """A region at an address, for other libraries, without a copy.

        Raises BackendError for a matrix, which is stored as tensor cores read it.
        """
        device = self._device_type, self.driver.info.ordinal
        return view(region, address, self.acts, device, self._stream, self)

    # ---- kernels

    def add_source(
        self,
        source: Path | str,
        expansions: Mapping[str, kernels.Expansion],
        *,
        name: str | None = None,
    ) -> None:
        """Add a raw CUDA file and how ops expand into its kernels. Before `build`.

        `source` is a path, or the text itself with a `name` such as "scale.cu". Each entry of
        `expansions` maps an op's name to a function from its shape to launches, as in `kernels`; a
        kernel gets the op's argument block, struct `<op>_args` of "args.h", by value.
        Raises SealedError, CompileError (the file name is taken), BackendError (the op has an
        expansion already, or a text without a name).
        """
        self._refuse_if_sealed("add a kernel source")
        if isinstance(source, Path):
            name, text = name or source.name, source.read_text()
        elif name is None:
            raise BackendError(
                "add_source: a source given as text needs a name, e.g. name='scale.cu'"
            )
        else:
            text = source
        if taken := sorted(set(expansions) & set(self._expansions)):
            raise BackendError(f"add_source({name!r}): ops {taken} have expansions already")
        self._sources.add(name, text)
        self._expansions.update(expansions)
        self._library.forget_units()

    @_verb
    def build(self, ops: Sequence[Op], progress: Progress | None = None) -> None:
        """See Backend. Compiles the copy and digest kernels; others when a capture needs them.

        Raises CompileError, and BackendError for an op without an expansion.
        """
        self._refuse_if_sealed("build kernels")
        if unknown := sorted({op.name for op in ops} - set(self._expansions)):
            raise BackendError(f"no CUDA kernels for ops {unknown}: see CudaDevice.add_source")
        self._sources.set_ops(ops)
        self._library.forget_units()
        self._library.progress = progress
        self._prepare([kernels.copy_launch(1, self._n_sms), kernels.digest_launch(1, self._n_sms)])
        self._is_built = True

    def _prepare(self, launches: Sequence[kernels.KernelLaunch]) -> None:
        if self._is_sealed and (missing := self._library.missing(launches)):
            self._refuse_if_sealed(f"compile {missing[0].title}")
        self._library.prepare(launches)
        self.counters.compilations = self._library.n_compiled

    def _fused(self, launches: Sequence[BoundLaunch]) -> Sequence[BoundLaunch]:
        if not self._is_fused:
            return launches
        return fuse(launches, self.acts, self._counters_at, self._sent.send_to)

    def _nodes(self, launches: Sequence[BoundLaunch]) -> list[Node]:
        """Launches as kernels with packed arguments; compiles what is not compiled yet."""
        arch = self.driver.info.arch
        expanded = [
            (bound, kernels.expand(bound.launch, self.acts, self._n_sms, arch, self._expansions))
            for bound in launches
        ]
        self._prepare([kernel for _, several in expanded for kernel in several])
        nodes = []
        for bound, several in expanded:
            arguments = bound.pack(self.acts)
            for kernel in several:
                over = self._over_runs(bound, kernel)
                beside = self._split_arguments(over)
                block = ArgumentBlock(arguments + beside)
                nodes.append(self._node(over, block, self._may_overlap(kernel)))
        return nodes

    def _split_arguments(self, kernel: kernels.KernelLaunch) -> bytes:
        """Of a kernel whose blocks share K, where they meet: in one workspace for all launches, for
        they run one after the other. Allocated for the first that needs it.
        """
        split = kernel.split
        if split is None:
            return b""
        if split.parts == 1:
            return split.pack(0)
        if not split.fits:
            raise PlanError(f"{kernel.kernel}: {split.nbytes:,} bytes of workspace are too many")
        if self._workspace is None:
            self._refuse_if_sealed("allocate the workspace of kernels")
            nbytes = kernels.WORKSPACE_BYTES
            self._workspace = DeviceMemory("workspace", self.driver.mem_alloc(nbytes), nbytes)
            self._memories.append(self._workspace)
            self.counters.allocations += 1
            self.driver.fill(self._workspace.address, 0, 4 * kernels.WORKSPACE_TILES, self._stream)
        return split.pack(self._workspace.address)

    def _over_runs(self, bound: BoundLaunch, kernel: kernels.KernelLaunch) -> kernels.KernelLaunch:
        """The kernel for every run that a replay may have; as it is where operands stay."""
        if not bound.runs:
            return kernel
        op = bound.launch.op.name
        if not self._sources.opens_runs(kernel.source, op):
            raise BackendError(
                f"{self.name}: operands of {op!r} move from run to run, and {kernel.source} does "
                f"not move them: let {kernel.kernel} begin with OPEN_RUN({op}), see flashrt.cuh"
            )
        return kernel.of_runs(bound.max_runs)

    def _may_overlap(self, kernel: kernels.KernelLaunch) -> bool:
        """Programmatic dependent launch: the next kernel is set up while this one still runs."""
        info = self.driver.info
        has_it = info.capability >= (9, 0) and info.driver_version >= _PROGRAMMATIC_DRIVER
        return has_it and self._sources.waits_for_predecessor(kernel.source)

    def _node(
        self, kernel: kernels.KernelLaunch, block: ArgumentBlock, may_overlap: bool = False
    ) -> Node:
        config = LaunchConfig(kernel.grid, kernel.block, kernel.shared_bytes, may_overlap)
        return Node(kernel.kernel, self._library.function(kernel), config, block)

    # ---- memory

    @_verb
    def allocate(self, name: str, nbytes: int) -> Memory:
        """See Backend. Raises BackendError with bytes wanted and free; also where less than
        Capacities.reserve_bytes would be left for kernels and graphs, which come later.
        """
        self._refuse_if_sealed(f"allocate {name}")
        free, _ = self.driver.mem_info()
        reserve = self._capacities.reserve_bytes
        if nbytes <= free < nbytes + reserve:
            raise BackendError(
                f"{self.name}: the {name} of {nbytes:,} bytes would leave {free - nbytes:,} of "
                f"{free:,} free bytes, and kernels and graphs, which are loaded later, need up to "
                f"{reserve:,}: use a smaller max_positions, pool_bytes, prefill_rows or lanes, or "
                "end other GPU users"
            )
        try:
            memory = DeviceMemory(name, self.driver.mem_alloc(max(nbytes, 1)), nbytes)
        except BackendError as error:
            raise BackendError(f"{self.name}: cannot allocate the {name}: {error}") from error
        self.counters.allocations += 1
        self._memories.append(memory)
        return memory

    @_verb
    def write(self, address: int, data: Bytes) -> None:
        """See Backend; asynchronous, `data` may change as soon as this returns."""
        self._downloads.fence()
        self._sent.forget()
        self._forget_runs(address, data.nbytes)
        self._ring.upload(address, data)

    @_verb
    def read(self, address: int, out: Bytes) -> None:
        """See Backend."""
        self._readback.download(address, out)

    @_verb
    def begin_read(self, address: int, nbytes: int) -> Callable[[], Bytes]:
        """See Backend."""
        arrive = self._downloads.begin(address, nbytes)

        def wait() -> Bytes:
            self._refuse_after_fork()
            with self._lock:
                return arrive()

        return wait

    @_verb
    def begin_read_word(self, address: int) -> Callable[[], int]:
        """See Backend. No copy, where the replay before it has sent the word."""
        arrive = self._sent.begin(address) or self._words.begin(address)

        def wait() -> int:
            self._refuse_after_fork()
            with self._lock:
                return arrive()

        return wait

    @_verb
    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """See Backend."""
        self._downloads.fence()
        self._sent.forget()
        self._forget_runs(address, nbytes)
        if nbytes:
            self.driver.fill(address, byte, nbytes, self._stream)

    @_verb
    def copy(self, moves: CopyList, src_base: int, dst_base: int) -> None:
        """See Backend: a single range by the driver, others by one launch over a table (the
        driver's 2-D copy may refuse pitches that are not its own).
        """
        if not len(moves):
            return
        self._downloads.fence()
        self._sent.forget()
        first = moves.copies[0]
        if len(moves) == 1 and first.height == 1:
            self._forget_runs(dst_base + first.dst, first.width)
            self.driver.copy_on_device(
                dst_base + first.dst, src_base + first.src, first.width, self._stream
            )
        else:
            self._runs_at.clear()  # cheaper than asking each copy where it goes
            self._require_build()
            for i in range(0, len(moves), self._capacities.copies):
                part = CopyList(moves.copies[i : i + self._capacities.copies])
                self._copy_table(part, src_base, dst_base)
        self.counters.copies += 1
        self.counters.copied_bytes += moves.nbytes

    @_verb
    def upload(self, uploads: Sequence[Upload], dst_base: int) -> None:
        """See Backend: through the ring, the rows of a copy together."""
        self._downloads.fence()
        self._sent.forget()
        self._runs_at.clear()
        for source, copy in ((u.source, copy) for u in uploads for copy in u.moves):
            shape, strides = (copy.height, copy.width), (copy.src_pitch, 1)
            rows = np.lib.stride_tricks.as_strided(source[copy.src :], shape, strides)
            self._ring.upload_rows(dst_base + copy.dst, copy.dst_pitch, rows)

    def _copy_table(self, moves: CopyList, src_base: int, dst_base: int) -> None:
        """In stream order, so that the one table may be overwritten for the next launch."""
        table = np.frombuffer(moves.pack(src_base, dst_base), np.uint8)
        self._ring.upload(self._copies_at, table)
        arguments = struct.pack(kernels.COPY_ARGS_FORMAT, self._copies_at, len(moves))
        launch = kernels.copy_launch(moves.nbytes, self._n_sms)
        self._node(launch, ArgumentBlock(arguments)).launch(self.driver, self._stream)

    @_verb
    def digest(self, terms: Sequence[DigestTerm], base: int) -> list[tuple[int, int]]:
        """See Backend."""
        return self.begin_digest(terms, base)()

    @_verb
    def begin_digest(
        self, terms: Sequence[DigestTerm], base: int
    ) -> Callable[[], list[tuple[int, int]]]:
        """See Backend."""
        self._require_build()
        n = self._capacities.terms
        parts = [self._digest_table(terms[i : i + n], base) for i in range(0, len(terms), n)]

        def wait() -> list[tuple[int, int]]:
            self._refuse_after_fork()
            with self._lock:
                sums = [part().view(np.uint64).reshape(-1, 2) for part in parts]
            return [(int(lo), int(hi)) for part in sums for lo, hi in part]

        return wait

    def _digest_table(self, terms: Sequence[DigestTerm], base: int) -> Callable[[], Bytes]:
        table = np.frombuffer(b"".join(term.pack(base) for term in terms), np.uint8)
        self._ring.upload(self._terms_at, table)
        self.fill(self._sums_at, len(terms) * _SUM_BYTES, 0)
        arguments = struct.pack(
            kernels.DIGEST_ARGS_FORMAT, self._terms_at, self._sums_at, len(terms)
        )
        launch = kernels.digest_launch(len(terms), self._n_sms)
        self._node(launch, ArgumentBlock(arguments)).launch(self.driver, self._stream)
        return self._downloads.begin(self._sums_at, len(terms) * _SUM_BYTES)

    def _forget_runs(self, address: int, nbytes: int) -> None:
        """A range is about to be overwritten: a table of runs there must be written again."""
        for at, words in list(self._runs_at.items()):
            if at < address + nbytes and address < at + len(words):
                del self._runs_at[at]

    # ---- launches

    @_verb
    def capture(self, launches: Sequence[BoundLaunch]) -> Graph:
        """See Backend. Raises CompileError, BackendError, SealedError."""
        self._refuse_if_sealed("capture a graph")
        self._require_build()
        fused = self._fused(launches)
        nodes = self._nodes(fused)
        graph = CudaGraph(self.driver, self._capture_stream, nodes, sent_by(fused))
        self.counters.captures += 1
        self._graphs.append(graph)
        return graph

    @_verb
    def replay(self, graph: Graph, table: bytes | None = None, at: int = 0) -> None:
        """See Backend; one driver call, and another where the table is not the last one there."""
        assert isinstance(graph, CudaGraph)
        if table is not None and self._runs_at.get(at) != table:
            self._runs_at.pop(at, None)
            self._ring.upload(at, np.frombuffer(table, np.uint8))
            self._runs_at[at] = table
        if graph.sent is None:
            self._sent.forget()
            graph.replay(self._stream)
        else:
            self._sent.replay(lambda: graph.replay(self._stream), graph.sent.of(table))
        self.counters.replays += 1

    @_verb
    def eager(self, launches: Sequence[BoundLaunch]) -> None:
        """See Backend. Synchronises after each launch, so that a failure names its op."""
        self._require_build()
        self._sent.forget()
        for bound in launches:
            for node in self._nodes([bound]):
                try:
                    node.launch(self.driver, self._stream)
                    self.driver.stream_sync(self._stream)
                except BackendError as error:
                    raise BackendError(f"{bound.launch.op.name}, {node.name}: {error}") from error
            self.counters.launches += 1

    @_verb
    def sync(self) -> None:
        """See Backend. Raises BackendError for whatever failed since the last sync."""
        self.driver.stream_sync(self._stream)

    def seal(self) -> None:
        """See Backend."""
        self._is_sealed = True

    def close(self) -> None:
        """See Backend. Releases everything; the device cannot be used afterwards.

        In a forked child there is nothing to release: all of it is the parent's.
        """
        if self._fork_count != _Forks.count:
            return
        with self._lock:
            if self._is_closed:
                return
            before = self.driver.enter()
            try:
                self._close()
            finally:
                self.driver.leave(before)
            self.driver.close()

    def _close(self) -> None:
        self._is_closed = True
        self.driver.stream_sync(self._stream)
        for graph in self._graphs:
            graph.close()
        self._library.close()
        self._ring.close()
        self._readback.close()
        self._downloads.close()
        self._words.close()
        self._sent.close()
        for memory in (*self._memories, self._tables):
            self.driver.mem_free(memory.address)
        self._memories, self._graphs = [], []
        self.driver.stream_destroy(self._capture_stream)
        self.driver.stream_destroy(self._stream)

    def _refuse_after_fork(self) -> None:
        if self._fork_count != _Forks.count:
            raise BackendError(
                f"{self.name}: this process was forked after the device was opened, and a GPU does "
                "not come along: load the engine in the process that runs it, or start that one "
                "with multiprocessing's 'spawn'"
            )

    def _refuse_if_sealed(self, what: str) -> None:
        if self._is_sealed:
            raise SealedError(f"{self.name}: cannot {what} after seal; load another engine")

    def _require_build(self) -> None:
        if not self._is_built:
            raise BackendError(f"{self.name}: call build() before kernels are used")


def open_device(
    precision: Precision = "bfloat16", ordinal: int = 0, *, is_fused: bool = True
) -> CudaDevice:
    """The GPU of that ordinal. Raises BackendError that says what is missing; see `probe`."""
    driver = CudaDriver(ordinal)
    try:
        return CudaDevice(driver, Nvrtc(driver.info.arch), precision, is_fused=is_fused)
    except BaseException:
        driver.close()
        raise
