"""The CPU device: a host arena, the kernel library through ctypes, graphs replayed by one C call.

IS: core.backend.Backend for the host. IS NOT: kernels (kernels/*.c), storage arithmetic (layouts),
the compiler (compile).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashrt.backends import shared_object
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu import layouts
from flashrt.backends.cpu.limits import CpuLimits
from flashrt.base.errors import BackendError, SealedError
from flashrt.base.flags import thread_count
from flashrt.core.backend import BoundLaunch, Bytes, Counters, Graph, Memory, Progress, Storage
from flashrt.core.copylist import CopyList, Upload
from flashrt.core.digest import LAYOUT_CODE, DigestTerm
from flashrt.core.direct import FileHash, FilePart
from flashrt.core.groups import Planes
from flashrt.core.op import Launch, Op
from flashrt.core.region import ActDTypes, DType, Layout, Region, resolve_dtype

Activations = Literal["float32", "int16", "int8"]
PlainActivations = Literal["float32", "bfloat16"]
INTEGER_CODES = (DType.U4, DType.U5, DType.U6, DType.I8, DType.E2M1)  # of kernels/linear_int8.c

_HUGE = 2 << 20
# Ops whose kernels have neither barriers nor claims: threads need not wait between two runs.
_APART = frozenset((
    "max_pool", "layer_norm", "add_rows", "normalize", "attend",
    "embed", "conv_window", "delta_rule", "delta_gates", "rope_append", "last_row", "last_values",
    "last_cursor", "advance", "hold", "rmsnorm", "add_rmsnorm", "gated_rmsnorm", "silu_mul",
    "add_bias",
    "conv_biased", "ssm", "silu_rmsnorm", "scale_rows",
    "keep_rows", "keep_values", "dense", "dense_add", "gru_cell", "gated_conv",
    "relu_squared",
    "activations", "mix_rows", "add_layer_norm", "gelu", "turn_patches", "attend_patches",
    "place_rows", "embed_seen", "rope_placed",
    "route", "add_gated", "rope_rows", "append_rows", "guide",
    "image_patches", "all_rows", "geglu", "adaptive_rmsnorm",
))  # fmt: skip
# Ops that round x where the device is told to, and weights are such codes, or bfloat16.
_PRODUCTS = frozenset(("linear", "experts_in", "experts_out"))
_GATHERED_ROWS = 60  # MOST_ROWS of kernels/experts.c
_MOST_ARGUMENTS = 1024  # of kernels/runtime.c
_ALIGN = 64  # of argument blocks: one cache line each
_FEW_NBYTES = 4096
_BYTE = ctypes.c_ubyte
# Blocks that kernels/pack.c takes as files have them, by their numbers in kernels/pack.h.
_BLOCKS = {
    "": 0, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
    "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
}  # fmt: skip
WEIGHTS = "weights"  # what core.arena calls their memory
_VALUES = (DType.BF16, DType.F16, DType.F32)


class HostMemory:
    """One anonymous mapping, huge pages advised, zero at first touch; gone with its last array."""

    def __init__(self, nbytes: int) -> None:
        """Raises BackendError when the system has no room."""
        try:
            mapping = _private_mapping(max(nbytes, 1) + _HUGE)
        except (OSError, ValueError, OverflowError) as error:
            raise BackendError(
                f"cannot map {nbytes} bytes of host memory: {error}; "
                "lower max_positions, lanes or pool_bytes"
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux only; 4 KB first touches cost four times as much
            mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(mapping, np.uint8)
        skip = -whole.ctypes.data % _HUGE
        self.array: Bytes = whole[skip : skip + nbytes]
        self.address: int = whole.ctypes.data + skip
        self.nbytes = nbytes

    def release(self) -> None:
        """Give the memory back, once nobody else holds an array over it."""
        self.array = np.empty(0, np.uint8)


def _private_mapping(nbytes: int) -> mmap.mmap:
    """Python maps shared memory by default, which Linux does not give huge pages."""
    if hasattr(mmap, "MAP_PRIVATE"):  # all but Windows
        return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, nbytes)


@dataclass(slots=True)
class CpuGraph:
    """A C array of {function, argument block, ...}; `keep` owns these, not what blocks point to.

    `lane`: the address of the lane that the moved blocks are for.
    """

    n_launches: int
    table: int
    lane: int
    is_shared: bool  # among the threads of the pool; else the calling thread runs it alone
    keep: tuple[object, ...] = field(repr=False)


class CpuDevice:
    """See core.backend.Backend for the contract of the verbs."""

    name = "cpu"
    acts = ActDTypes(DType.F32, DType.F32)
    is_async = False
    most_rows = 256  # measured: the packed rows of more do not stay in the caches

    def __init__(
        self,
        threads: int | None = None,
        alone_nbytes: int = 0,
        *,
        activations: Activations = "float32",
        plain: PlainActivations = "float32",
        gives_way: bool = False,
    ) -> None:
        """`threads`: size of the pool, FLASHRT_THREADS or the cores at hand by default.

        `alone_nbytes`: graphs that touch fewer bytes run on the calling thread, without waking the
        others: for many small replays with pauses between. No bit depends on it.

        `activations`: what `linear` makes of x where weights are codes of INTEGER_CODES: "int16"
        and "int8" round it, for dot products of integers. `plain`: the same where weights are
        bfloat16; "bfloat16" rounds it, for kernels/linear_bf16.c. Other weights get float32.

        `gives_way`: other engines of the process have their turn between two launches of a replay:
        for replays that take seconds, one at a time.
        """
        self.threads = threads or thread_count()
        self._activations = activations
        self._plain = plain
        self._alone_nbytes = alone_nbytes
        self._gives_way = gives_way
        self.counters = Counters()
        self._lib: ctypes.CDLL | None = None
        self._own_sources: list[Path] = []
        self._memories: list[HostMemory] = []
        self._arrays: tuple[Bytes, ...] | None = ()  # over them; None once the device is closed
        self._is_sealed = False
        self._workspace = 0
        self._digest = ""

    @property
    def kernel_digest(self) -> str:
        """Hash of C sources, argument structs and activations: bits depend on nothing else."""
        return self._digest

    @property
    def _ways(self) -> list[str]:
        """What activations are rounded to, where they are."""
        return [w for w in (self._activations, self._plain) if w != "float32"]

    @property
    def description(self) -> str:
        """One line for people."""
        way = f", {' and '.join(self._ways)} activations" if self._ways else ""
        return f"cpu, {self.threads} threads, kernels {self._digest[:12]}{way}"

    def limits(self) -> CpuLimits:
        """Measures of this machine, for benchmarks; after `build`."""
        return CpuLimits(self._c)

    def storage(self, region: Region) -> Storage:
        """See Backend."""
        return layouts.storage(region, self.acts)

    def pack(self, region: Region, array: NDArray[np.generic] | Planes, out: Bytes) -> None:
        """See Backend; matrices go through C, all threads."""
        if isinstance(array, Planes):
            self._pack_planes(region, array, out)
        elif region.layout is Layout.MATRIX:
            src = np.ascontiguousarray(array)
            n, k = src.shape
            if src.shape != region.shape or src.itemsize * 8 != region.dtype.bits or region.groups:
                raise BackendError(
                    f"cpu: region {region.name!r} is {region.dtype} {region.shape}, got "
                    f"{src.dtype} {src.shape}"
                )
            self._c.flashrt_pack_matrix(src.ctypes.data, out.ctypes.data, n, k, region.dtype.code)
        else:
            out[:] = layouts.pack(region, array)

    def _pack_planes(self, region: Region, planes: Planes, out: Bytes) -> None:
        layouts.check_planes(region, planes)
        groups, (n, k) = layouts.groups_of(region), region.shape
        codes = np.ascontiguousarray(planes.codes)
        scales = [np.ascontiguousarray(p) for p in planes.scales]
        addresses = (ctypes.c_void_p * len(scales))(*(p.ctypes.data for p in scales))
        self._c.flashrt_pack_planes(
            codes.ctypes.data, addresses, out.ctypes.data, n, k,
            region.dtype.code, groups.size, groups.outer, groups.scales.code,
        )  # fmt: skip

    def unpack(self, region: Region, raw: Bytes) -> NDArray[np.generic]:
        """See Backend."""
        return layouts.unpack(region, raw, self.acts)

    def digest_layout(self, region: Region) -> int:
        """See Backend."""
        return LAYOUT_CODE[region.layout]

    def add_source(self, source: Path) -> None:
        """Add a C file with kernels of your own, `void op_<name>(const <name>_args *, int, int)`.

        Before `build`; see kernels/common.h for the contract.
        """
        self._refuse_if_sealed("add a kernel source")
        self._own_sources.append(source)

    def build(self, ops: Sequence[Op], progress: Progress | None = None) -> None:
        """See Backend."""
        self._refuse_if_sealed("build kernels")
        binary = toolchain.library(ops, extra=self._own_sources, progress=progress)
        self.counters.compilations += not binary.was_cached
        try:
            self._lib = shared_object.load(binary.path, binary.content)
        except OSError as error:
            raise BackendError(f"cannot load {binary.path}: {error}; delete the file") from error
        self._digest = toolchain.source_digest(ops, self._own_sources)
        if self._ways:
            way = " ".join((self._digest, *self._ways))
            self._digest = hashlib.sha256(way.encode()).hexdigest()
        _declare(self._lib)
        self.resize(self.threads)

    def resize(self, threads: int) -> None:
        """Another number of threads, for all engines of the process; no bit depends on it."""
        if self._c.flashrt_pool_start(threads) != 0:
            raise BackendError(f"cannot start {threads} threads; lower FLASHRT_THREADS")
        self.threads = threads

    def allocate(self, name: str, nbytes: int) -> Memory:
        """See Backend."""
        self._refuse_if_sealed(f"allocate {name}")
        arrays = self._memory_in_use()
        self.counters.allocations += 1
        memory = HostMemory(nbytes)
        self._arrays = (*arrays, memory.array)
        self._memories.append(memory)
        # Touched by all threads now: no page fault while serving. Whoever loads weights writes them
        # all, and a page that is in a cache when it is written costs half of one that is not.
        if self._lib is not None and name != WEIGHTS:
            self._lib.flashrt_fill(memory.address, nbytes, 0)
        return memory

    def room(self, address: int, nbytes: int) -> Bytes:
        """See DirectBackend."""
        for array in self._memory_in_use():
            at = address - array.ctypes.data
            if 0 <= at <= at + nbytes <= array.nbytes:
                return array[at : at + nbytes]
        raise BackendError(f"cpu: {nbytes} bytes at {address:#x} are not in memory of this device")

    def packs(self, region: Region, blocks: str) -> bool:
        """See DirectBackend."""
        return blocks in _BLOCKS and (bool(blocks) or region.dtype in _VALUES)

    def new_hash(self) -> FileHash:
        """See DirectBackend."""
        return _FileHash(self._c)

    def load_parts(self, parts: Sequence[FilePart], hash_: FileHash) -> tuple[int, int] | None:
        """See DirectBackend."""
        _arrays = self._memory_in_use()
        assert isinstance(hash_, _FileHash)
        before = [np.frombuffer(part.before, np.uint8) for part in parts]
        table = np.array(
            [_part_words(part, data) for part, data in zip(parts, before, strict=True)], np.int64
        )
        why = ctypes.c_int()
        done = self._c.flashrt_load(
            table.ctypes.data, len(parts), hash_.state.ctypes.data, ctypes.byref(why)
        )
        return None if done == len(parts) else (done, why.value)

    def write(self, address: int, data: Bytes) -> None:
        """See Backend."""
        _arrays = self._memory_in_use()
        # `ctypes.data` of an array takes longer than to copy a few words twice.
        few = data.nbytes <= _FEW_NBYTES
        ctypes.memmove(address, data.tobytes() if few else data.ctypes.data, data.nbytes)

    def read(self, address: int, out: Bytes) -> None:
        """See Backend."""
        _arrays = self._memory_in_use()
        if out.nbytes:
            ctypes.memmove(ctypes.addressof(_BYTE.from_buffer(out.data)), address, out.nbytes)

    def begin_read(self, address: int, nbytes: int) -> Callable[[], Bytes]:
        """See Backend; everything here is synchronous."""
        out: Bytes = np.empty(nbytes, np.uint8)
        self.read(address, out)
        return lambda: out

    def begin_read_word(self, address: int) -> Callable[[], int]:
        """See Backend."""
        word = int(self.begin_read(address, 4)().view(np.int32)[0])
        return lambda: word

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """See Backend."""
        _arrays = self._memory_in_use()
        self._c.flashrt_fill(address, nbytes, byte)

    def copy(self, moves: CopyList, src_base: int, dst_base: int) -> None:
        """See Backend."""
        _arrays = self._memory_in_use()
        if len(moves):
            self._c.flashrt_copy(moves.pack(src_base, dst_base), len(moves))
            self.counters.copies += 1
            self.counters.copied_bytes += moves.nbytes

    def upload(self, uploads: Sequence[Upload], dst_base: int) -> None:
        """See Backend."""
        _arrays = self._memory_in_use()
        tables = [u.moves.pack(u.source.ctypes.data, dst_base) for u in uploads]
        self._c.flashrt_copy(b"".join(tables), sum(len(u.moves) for u in uploads))

    def digest(self, terms: Sequence[DigestTerm], base: int) -> list[tuple[int, int]]:
        """See Backend."""
        _arrays = self._memory_in_use()
        out = np.zeros((len(terms), 2), np.uint64)
        table = b"".join(t.pack(base) for t in terms)
        self._c.flashrt_digest(table, len(terms), out.ctypes.data)
        return [(int(lo), int(hi)) for lo, hi in out]

    def begin_digest(
        self, terms: Sequence[DigestTerm], base: int
    ) -> Callable[[], list[tuple[int, int]]]:
        """See Backend; there is nothing to wait for."""
        sums = self.digest(terms, base)
        return lambda: sums

    def capture(self, launches: Sequence[BoundLaunch]) -> Graph:
        """See Backend."""
        self._refuse_if_sealed("capture a graph")
        self.counters.captures += 1
        return self._record(launches)

    def replay(self, graph: Graph, table: bytes | None = None, at: int = 0) -> None:
        """See Backend."""
        _arrays = self._memory_in_use()
        assert isinstance(graph, CpuGraph)
        run = self._c.flashrt_replay if graph.is_shared else self._c.flashrt_replay_alone
        if self._gives_way:
            run = self._c.flashrt_replay_giving_way
        run(graph.table, graph.n_launches, table, len(table or b""), at, graph.lane)
        self.counters.replays += 1

    def eager(self, launches: Sequence[BoundLaunch]) -> None:
        """See Backend."""
        _arrays = self._memory_in_use()
        for launch in launches:
            graph = self._record([launch])
            self._c.flashrt_replay(graph.table, 1, None, 0, 0, None)
            self.counters.launches += 1

    def sync(self) -> None:
        """See Backend; everything here is synchronous."""

    def seal(self) -> None:
        """See Backend."""
        self._is_sealed = True

    def close(self) -> None:
        """See Backend. The memory goes with the last call that works on it, in whatever thread."""
        self._arrays = None
        for memory in self._memories:
            memory.release()
        self._memories.clear()

    def _memory_in_use(self) -> tuple[Bytes, ...]:
        """Whoever holds this keeps the device's memory mapped: `close` may come from another thread
        while a kernel runs, which knows addresses alone. Raises BackendError once closed.
        """
        arrays = self._arrays
        if arrays is None:
            raise BackendError("cpu: the device is closed; load another engine")
        return arrays

    @property
    def _c(self) -> ctypes.CDLL:
        if self._lib is None:
            raise BackendError("cpu: call build() before kernels are used")
        return self._lib

    def _refuse_if_sealed(self, what: str) -> None:
        if self._is_sealed:
            raise SealedError(f"cpu: cannot {what} after seal; load another engine")

    def _record(self, launches: Sequence[BoundLaunch]) -> CpuGraph:
        blocks = [b.pack(self.acts) for b in launches]
        offsets = [0]
        for block in (*blocks, *blocks):  # as they are, and as moved to a lane
            offsets.append(offsets[-1] + -(-len(block) // _ALIGN) * _ALIGN)
        arguments = ctypes.create_string_buffer(offsets[-1] + _ALIGN)
        base = ctypes.addressof(arguments)
        base += -base % _ALIGN
        table = bytearray()
        for i, (bound, block) in enumerate(zip(launches, blocks, strict=True)):
            offset, moved = base + offsets[i], base + offsets[len(blocks) + i]
            ctypes.memmove(offset, block, len(block))
            op = bound.launch.op
            if len(block) > _MOST_ARGUMENTS:
                raise BackendError(f"cpu: {op.name} has {len(block)} bytes of arguments, too many")
            moves_at = op.runs_offset if bound.runs else 0
            table += struct.pack(
                "@3P4i0P", self._function(bound.launch), offset, moved if moves_at else offset,
                len(block), len(op.params), moves_at, op.name not in _APART,
            )  # fmt: skip
        entries = ctypes.create_string_buffer(bytes(table), len(table))
        self._reserve(launches)
        is_shared = _touched_nbytes(launches) >= self._alone_nbytes
        lane = ctypes.c_int64(-1)
        keep = (entries, arguments, lane)
        at = ctypes.addressof(entries)
        return CpuGraph(len(launches), at, ctypes.addressof(lane), is_shared, keep)

    def _function(self, launch: Launch) -> int:
        name = f"op_{launch.op.name}"
        if launch.op.name in _PRODUCTS:
            w, way = launch.operand("w").region, "float32"
            if w.dtype in INTEGER_CODES and w.groups is not None:
                way = self._activations
            elif w.dtype is DType.BF16:
                way = self._plain
            name += f"_{way}" * (way != "float32")
        try:
            function = self._c[name]
        except AttributeError as error:
            raise BackendError(f"cpu: no kernel {name}; add it to {toolchain.KERNELS}") from error
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    def _reserve(self, launches: Sequence[BoundLaunch]) -> None:
        """Workspace for packed activations of `linear`, grown before seal only."""
        need = max((_workspace_nbytes(b, self.threads) for b in launches), default=0)
        if need > self._workspace:
            self._refuse_if_sealed("grow the kernels' workspace")
            if self._c.flashrt_workspace(need) != 0:
                raise BackendError(f"cpu: no memory for {need} bytes of kernel workspace")
            self._workspace = need


class _FileHash:
    """See core.direct.FileHash; the state is kernels/xxh3.h's."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        self.state = np.zeros(-(-lib.flashrt_hash_nbytes() // 8), np.uint64)
        lib.flashrt_hash_begin(self.state.ctypes.data)

    def hexdigest(self) -> str:
        """As of the package xxhash."""
        words = np.zeros(2, np.uint64)
        self._lib.flashrt_hash_end(self.state.ctypes.data, words.ctypes.data)
        low, high = words.tolist()
        return f"{high:016x}{low:016x}"


def _part_words(part: FilePart, before: Bytes) -> list[int]:
    """The fields of kernels/load.c's `flashrt_part`."""
    head = [before.ctypes.data, before.nbytes, part.file, part.offset, part.nbytes, part.address]
    region = part.region
    if region is None:
        return [*head, *[0] * 9]
    groups, order = region.groups, part.order
    scales = [0, 0, 0] if groups is None else [groups.size, groups.outer, groups.scales.code]
    return [
        *head, 0 if order is None else order.ctypes.data, part.rows, region.shape[1],
        part.nbytes // part.rows, _BLOCKS[part.blocks], region.dtype.code, *scales,
    ]  # fmt: skip


def _touched_nbytes(launches: Sequence[BoundLaunch]) -> int:
    """Bytes of all operands, of each launch anew."""
    return sum(
        math.prod(view.shape) * resolve_dtype(view.region.dtype, CpuDevice.acts).bits // 8
        for bound in launches
        for view in bound.launch.operands
    )


def _workspace_nbytes(bound: BoundLaunch, threads: int) -> int:
    dims = bound.launch.dims
    if "T" not in dims:
        return 0
    if bound.launch.op.name in ("experts_in", "experts_out"):  # each thread packs for itself
        columns = bound.launch.operand("w").shape[1] + 31
        return 4 * columns * min(dims["T"], _GATHERED_ROWS) * threads + (1 << 20)
    widest = max((v for k, v in dims.items() if k in ("K", "D", "dk", "dv", "H")), default=0)
    return dims["T"] * widest * 8 + (1 << 20)


def _declare(lib: ctypes.CDLL) -> None:
    pointer, size, integer = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
    long = ctypes.c_int64
    signatures: dict[str, tuple[list[type[Any]], type[Any] | None]] = {
        "flashrt_pool_start": ([integer], integer),
        "flashrt_replay": ([pointer, integer, pointer, integer, pointer, pointer], None),
        "flashrt_replay_alone": ([pointer, integer, pointer, integer, pointer, pointer], None),
        "flashrt_replay_giving_way": (
            [pointer, integer, pointer, integer, pointer, pointer],
            None,
        ),
        "flashrt_copy": ([ctypes.c_char_p, integer], None),
        "flashrt_fill": ([pointer, size, integer], None),
        "flashrt_digest": ([ctypes.c_char_p, integer, pointer], None),
        "flashrt_pack_matrix": ([pointer, pointer, long, long, integer], None),
        "flashrt_pack_planes": ([*[pointer] * 3, *[long] * 2, *[integer] * 4], None),
        "flashrt_load": ([pointer, long, pointer, pointer], long),
        "flashrt_hash_nbytes": ([], long),
        "flashrt_hash_begin": ([pointer], None),
        "flashrt_hash_end": ([pointer, pointer], None),
        "flashrt_workspace": ([long], long),
        "flashrt_fma_peak": ([ctypes.c_long], ctypes.c_double),
        "flashrt_read_stream": ([pointer, size], None),
    }
    for name, (arguments, result) in signatures.items():
        function = lib[name]  # each lookup makes another object: keep the declared one
        function.argtypes = arguments
        function.restype = result
        setattr(lib, name, function)
