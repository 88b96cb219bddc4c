"""Run weight rules: check every name, shape and dtype first, then stream the tensors into a sink.

IS: the one path from checkpoint bytes to logical weight arrays; the process holds one chunk at a
time, never the weights. IS NOT: packing into a backend's storage, which is the sink's work. A
backend in host memory is told which bytes of files are which rows, and reads them itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.base.messages import MOST_LISTED, printable, shown
from flashrt.core.arena import Arena
from flashrt.core.backend import Bytes, Progress
from flashrt.core.direct import DirectBackend, FilePart
from flashrt.core.groups import Planes
from flashrt.core.region import DType, Region
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.formats.blocks import BlockMatrix
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.reordered import Order, RowsGathered, RowsReordered
from flashrt.weights.formats.stored import PlainMatrix, Rows, StoredArray, StoredMatrix, Tensor
from flashrt.weights.rules import Source, Transform, WeightRule

CHUNK_NBYTES = 16 << 20  # fits a last-level cache: read, hashed and packed while it is warm
# Chunks begin at multiples of this: the widest panel of any backend's matrix storage.
CHUNK_ROWS = 32
# For backends that read files themselves: what one thread reads at a time, which its own cache
# holds; what one call reads, so that progress is told and an interrupt heard; and the least that a
# checkpoint must have, as a short file has no such hash.
_PART_NBYTES, _CALL_NBYTES, _LEAST_DIRECT_NBYTES = 1 << 20, 64 << 20, 1 << 16
_REORDERED_ROWS = 256  # rows that move only among themselves: heads, whose sizes divide this
# Parts that a checkpoint may carry and a model may leave unused, as a whole.
OPTIONAL_PREFIXES = ("mtp.",)

# Takes a region, a first row and rows; they are valid during the call alone.
Sink = Callable[[Region, int, Rows], None]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load` did: xxh3-128 of all source tensors in rule order (names, dtypes, shapes, bytes),
    and their size.
    """

    digest: str
    source_nbytes: int


def check_sources(rules: Sequence[WeightRule], checkpoint: Checkpoint) -> None:
    """Check that the checkpoint holds what the rules need and nothing else, by its headers alone.

    Raises one CheckpointError on all tensors that are missing, unused, or have a wrong shape or
    dtype.
    """
    missing: list[Source] = []
    misfits: list[str] = []
    used: set[str] = set()
    for rule in rules:
        for source in rule.sources:
            used.update(checkpoint.names_behind(source.name))
            matrix = _matrix(source, checkpoint) if rule.is_matrix else None
            stored = matrix if rule.is_matrix else checkpoint.array(source.name)
            if stored is None:
                tensor = checkpoint.tensors.get(source.name)
                if tensor is None:
                    missing.append(source)
                else:
                    misfits.append(_misfit(tensor, source))
            elif stored.shape != source.shape:
                name = printable(stored.tensors[0].stored_name)
                misfits.append(
                    f"{name} is {shown(list(stored.shape))}, expected {list(source.shape)}"
                )
            elif rule.is_uniform and matrix is not None and not _is_as(rule.region, matrix):
                name = printable(matrix.tensors[0].stored_name)
                misfits.append(
                    f"{name} is {matrix.description}, unlike other experts of its layer: all must "
                    "be stored alike; take another file of the model"
                )
    idle = tuple(p for p in OPTIONAL_PREFIXES if not any(name.startswith(p) for name in used))
    unused = [
        t.stored_name
        for name, t in checkpoint.tensors.items()
        if name not in used and not name.startswith(idle)
    ]
    problems = _missing(missing, checkpoint)
    problems += _first(misfits, "more have a wrong shape or dtype")
    problems += _first([f"unused {printable(name)}" for name in sorted(unused)], "more are unused")
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: tensors do not fit the config:\n  " + "\n  ".join(problems)
        )


def _matrix(source: Source, checkpoint: Checkpoint) -> StoredMatrix | None:
    """The matrix of a source, its rows as they are wanted."""
    stored = checkpoint.matrix(source.name)
    if stored is None or source.rows is None or stored.shape != source.shape:
        return stored
    order = source.rows.order()
    if isinstance(stored, PlainMatrix | BlockMatrix):
        return RowsReordered(stored, order)
    return RowsGathered(stored, order)


def _is_as(region: Region, matrix: StoredMatrix) -> bool:
    return (matrix.dtype, matrix.groups) == (region.dtype, region.groups)


def _all_stored(
    rules: Sequence[WeightRule], checkpoint: Checkpoint
) -> Iterator[StoredMatrix | StoredArray]:
    for rule in rules:
        for source in rule.sources:
            find = checkpoint.matrix if rule.is_matrix else checkpoint.array
            if (stored := find(source.name)) is not None:
                yield stored


def _misfit(tensor: Tensor, source: Source) -> str:
    name = printable(tensor.stored_name)
    if tensor.shape != source.shape:
        return f"{name} is {shown(list(tensor.shape))}, expected {list(source.shape)}"
    return f"{name} is {tensor.dtype}, expected BF16, F16 or F32"


def _missing(missing: Sequence[Source], checkpoint: Checkpoint) -> list[str]:
    """What to say of sources that the checkpoint lacks; a part that it lacks whole is one line."""
    lines = []
    for prefix in OPTIONAL_PREFIXES:
        rest = [s for s in missing if not s.name.startswith(prefix)]
        if len(rest) < len(missing) and not any(n.startswith(prefix) for n in checkpoint.tensors):
            lines.append(f"missing {prefix}*: the checkpoint has no draft head; load without draft")
            missing = rest
    stated = [f"missing {s.name} {list(s.shape)}" for s in missing]
    return lines + _first(stated, "more are missing")


def _first(lines: list[str], what: str) -> list[str]:
    more = len(lines) - MOST_LISTED
    return lines if more <= 0 else [*lines[:MOST_LISTED], f"and {more:,} {what}"]


def load(
    rules: Sequence[WeightRule],
    checkpoint: Checkpoint,
    sink: Sink,
    progress: Progress | None = None,
) -> LoadReport:
    """Feed the sink with the logical array of each rule, in rule order.

    Matrices come as their region stores them, bfloat16 as bits and codes as planes, in chunks of
    about CHUNK_NBYTES whose first row is a multiple of CHUNK_ROWS; everything else comes whole, as
    float32, first row 0. Raises CheckpointError, before the first call of the sink if the
    tensors do not fit (see `check_sources`).
    """
    check_sources(rules, checkpoint)
    total = sum(s.nbytes for s in _all_stored(rules, checkpoint))
    reader = _Reader(checkpoint, total, progress, xxhash.xxh3_128())
    try:
        for rule in rules:
            if rule.is_matrix:
                for first_row, rows in _matrix_chunks(rule, reader):
                    sink(rule.region, first_row, rows)
            else:
                sink(rule.region, 0, _float_array(rule, reader))
    finally:
        checkpoint.close()
    return LoadReport(reader.hash.hexdigest(), reader.total_nbytes)


def fill_weights(
    rules: Sequence[WeightRule],
    checkpoint: Checkpoint,
    arena: Arena,
    progress: Progress | None = None,
) -> LoadReport:
    """`load` into the weights of an arena, as its backend stores them."""
    if isinstance(arena.backend, DirectBackend):
        check_sources(rules, checkpoint)
        total = sum(s.nbytes for s in _all_stored(rules, checkpoint))
        if total >= _LEAST_DIRECT_NBYTES:
            return _Direct(checkpoint, arena, arena.backend, total, progress).filled(rules)
    slots, base = {s.region: s for s in arena.weights.slots}, arena.weight_memory.address
    staging: Bytes = np.empty(0, np.uint8)

    def sink(region: Region, first_row: int, rows: Rows) -> None:
        nonlocal staging
        part, slot = replace(region, shape=rows.shape), slots[region]
        nbytes = arena.backend.storage(part).nbytes
        if staging.nbytes < nbytes:
            staging = np.empty(nbytes, np.uint8)
        arena.backend.pack(part, rows, staging[:nbytes])
        at = base + slot.offset + first_row * slot.storage.lead_nbytes
        arena.backend.write(at, staging[:nbytes])

    return load(rules, checkpoint, sink, progress)


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


class _Reader:
    """Reads of tensors: hashed and reported as they go by."""

    def __init__(
        self, checkpoint: Checkpoint, total_nbytes: int, progress: Progress | None, hash_: _Hash
    ) -> None:
        self.checkpoint = checkpoint
        self.total_nbytes = total_nbytes
        self.hash = hash_
        self._done_nbytes = 0
        self._progress = progress
        self._names = {tensor: name for name, tensor in checkpoint.tensors.items()}
        self._begun: set[Tensor] = set()

    def begin(self, tensor: Tensor) -> None:
        """Before the first bytes of a tensor; once or several times."""
        if tensor not in self._begun:
            self._begun.add(tensor)
            name = self._names.get(tensor, tensor.stored_name)
            self.hash.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())

    def read(self, tensor: Tensor, first_byte: int, out: memoryview) -> None:
        """Fill memory with bytes of a tensor: a `formats.stored.Reader`."""
        self.begin(tensor)
        self.checkpoint.read_into(tensor, first_byte, out)
        self.hash.update(out)
        self.was_read(len(out))

    def was_read(self, nbytes: int) -> None:
        """So many bytes more."""
        self._done_nbytes += nbytes
        if self._progress is not None:
            self._progress("weights", self._done_nbytes, self.total_nbytes)


class _Direct:
    """`fill_weights` for a backend that reads files itself. What it cannot read, as matrices that
    are quantised on the way, is read here and packed where it is to lie.

    Parts wait until many can be read by one call. It is the hash of a `_Reader`: what is read here
    waits, as bytes, for its turn among the parts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        arena: Arena,
        backend: DirectBackend,
        total_nbytes: int,
        progress: Progress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._arena = arena
        self._backend = backend
        self._slots = {s.region: s for s in arena.weights.slots}
        self._hash = backend.new_hash()
        self._reader = _Reader(checkpoint, total_nbytes, progress, self)
        self._before = bytearray()
        self._parts: list[tuple[FilePart, Tensor, int]] = []  # its tensor, and first byte there
        self._waiting_nbytes = 0

    def filled(self, rules: Sequence[WeightRule]) -> LoadReport:
        """See `fill_weights`."""
        try:
            for rule in rules:
                if rule.is_matrix:
                    self._fill_matrix(rule)
                else:
                    self._pack(rule.region, 0, _float_array(rule, self._reader))
            self._flush()
        finally:
            self._checkpoint.close()
        return LoadReport(self._hash.hexdigest(), self._reader.total_nbytes)

    def update(self, data: bytes | memoryview) -> None:
        """Bytes that come before the next part."""
        self._before += data
        if len(self._before) > _PART_NBYTES:
            self._flush()

    def hexdigest(self) -> str:
        """See _Hash."""
        self._flush()
        return self._hash.hexdigest()

    def _pack(self, region: Region, first_row: int, rows: Rows) -> None:
        part = replace(region, shape=rows.shape)
        backend = self._arena.backend
        at = self._address(region, first_row)
        backend.pack(part, rows, self._backend.room(at, backend.storage(part).nbytes))

    def _address(self, region: Region, first_row: int) -> int:
        slot = self._slots[region]
        base = self._arena.weight_memory.address + slot.offset
        return base + first_row * slot.storage.lead_nbytes

    def _fill_matrix(self, rule: WeightRule) -> None:
        start = 0
        for sources in _whole_panels(rule.sources):
            n_rows = sum(source.shape[0] for source in sources)
            if len(sources) > 1 or not self._add_matrix(rule.region, start, sources[0]):
                region = replace(rule.region, shape=(n_rows, rule.region.shape[1]))
                part = replace(rule, region=region, sources=sources)
                for first_row, rows in _matrix_chunks(part, self._reader):
                    self._pack(rule.region, start + first_row, rows)
            start += n_rows

    def _add_matrix(self, region: Region, start: int, source: Source) -> bool:
        """Parts for all rows of a source; False, and none, where the backend cannot read them."""
        matrix = _matrix(source, self._checkpoint)
        assert matrix is not None  # check_sources saw it
        pieces = _pieces(matrix)
        if pieces is None:
            return False
        stored, runs = pieces
        blocks = stored.tensor.dtype if isinstance(stored, BlockMatrix) else ""
        if not _is_as(region, stored) or not self._backend.packs(region, blocks):
            return False
        for first, count, order in runs:
            self._add_part(region, stored, blocks, start, first, count, order)
        return True

    def _add_part(
        self,
        region: Region,
        stored: PlainMatrix | BlockMatrix,
        blocks: str,
        start: int,
        first: int,
        count: int,
        order: NDArray[np.int64] | None,
    ) -> None:
        tensor, at = stored.tensor, first * stored.row_nbytes
        self._reader.begin(tensor)
        nbytes = count * stored.row_nbytes
        try:
            file = self._checkpoint.file_of(tensor)
        except OSError:
            self._checkpoint.read_into(tensor, at, memoryview(bytearray(nbytes)))  # says why
            raise
        part = FilePart(
            bytes(self._before), file, tensor.offset + at, nbytes,
            self._address(region, start + first), region, count, blocks, order,
        )  # fmt: skip
        self._before.clear()
        self._parts.append((part, tensor, at))
        self._waiting_nbytes += nbytes
        if self._waiting_nbytes >= _CALL_NBYTES:
            self._flush()

    def _flush(self) -> None:
        """Read and pack all parts that wait."""
        parts = [part for part, _, _ in self._parts]
        if self._before:
            parts.append(FilePart(bytes(self._before)))
            self._before.clear()
        failed = self._backend.load_parts(parts, self._hash) if parts else None
        if failed is not None:
            part, tensor, at = self._parts[failed[0]]
            self._checkpoint.read_into(tensor, at, memoryview(bytearray(part.nbytes)))  # says why
            raise CheckpointError(
                f"{tensor.path}: cannot read {printable(tensor.stored_name)}: "
                f"{os.strerror(failed[1])}; load it again"
            )
        waited, self._parts, self._waiting_nbytes = self._parts, [], 0
        for part, _, _ in waited:
            self._reader.was_read(part.nbytes)


def _whole_panels(sources: Sequence[Source]) -> Iterator[tuple[Source, ...]]:
    """Sources that are stacked, in runs that each begin at a multiple of CHUNK_ROWS."""
    run: list[Source] = []
    for source in sources:
        run.append(source)
        if sum(s.shape[0] for s in run) % CHUNK_ROWS == 0:
            yield tuple(run)
            run = []
    if run:
        yield tuple(run)


_Piece = tuple[int, int, NDArray[np.int64] | None]  # first row, rows, and their order if any


def _pieces(
    matrix: StoredMatrix,
) -> tuple[PlainMatrix | BlockMatrix, list[_Piece]] | None:
    """What a matrix is stored as, and runs of its rows, each of which lies in one run of those of
    the file; None for a matrix that is not stored by rows.
    """
    order: Order | None = None
    if isinstance(matrix, RowsReordered):
        order, matrix = matrix.order, matrix.stored
    if not isinstance(matrix, PlainMatrix | BlockMatrix):
        return None
    n_rows, unit = matrix.shape[0], CHUNK_ROWS if order is None else _REORDERED_ROWS
    step = max(1, _PART_NBYTES // (matrix.row_nbytes * unit)) * unit
    pieces: list[_Piece] = []
    for first in range(0, n_rows, step):
        count = min(step, n_rows - first)
        inside = None
        if order is not None:
            inside = (order[first : first + count] - first).astype(np.int64)
            if inside.min() < 0 or inside.max() >= count:
                return None
        pieces.append((first, count, inside))
    return matrix, pieces


def _matrix_chunks(rule: WeightRule, reader: _Reader) -> Iterator[tuple[int, Rows]]:
    """Rows of a rule's sources, stacked. A chunk ends where a source does, if it may."""
    region = rule.region
    n_rows, n_columns = region.shape
    row_nbytes = max(1, n_columns * region.dtype.bits // 8)
    step = max(1, CHUNK_NBYTES // (row_nbytes * CHUNK_ROWS)) * CHUNK_ROWS
    parts: list[Rows] = []
    start = stop = 0  # of the rows in `parts`
    for source in rule.sources:
        matrix = _matrix(source, reader.checkpoint)
        assert matrix is not None  # check_sources saw it
        first = 0
        while first < source.shape[0]:
            count = min(source.shape[0] - first, step - (stop - start))
            parts.append(_as_region(region, matrix, matrix.read(first, count, reader.read)))
            first, stop = first + count, stop + count
            if stop % CHUNK_ROWS == 0 or stop == n_rows:
                yield start, parts[0] if len(parts) == 1 else _stacked(parts)
                parts, start = [], stop


def _as_region(region: Region, matrix: StoredMatrix, rows: Rows) -> Rows:
    """Rows as the region has them: as they are stored, or widened to float32."""
    if _is_as(region, matrix):
        return rows
    if region.dtype is not DType.F32:
        raise PlanError(
            f"region {region.name!r} is {region.dtype}, its source {matrix.description}: rules "
            "were not made for this checkpoint (see weights.rules.as_stored)"
        )
    return dequantise(matrix.dtype, matrix.groups, rows)


def _stacked(parts: Sequence[Rows]) -> Rows:
    """Rows of one format, one below the other."""
    planes = [p for p in parts if isinstance(p, Planes)]
    if not planes:
        return np.concatenate([p for p in parts if not isinstance(p, Planes)])
    scales = zip(*(p.scales for p in planes), strict=True)
    return Planes(
        np.concatenate([p.codes for p in planes]), tuple(np.concatenate(s) for s in scales)
    )


def _float_array(rule: WeightRule, reader: _Reader) -> NDArray[np.float32]:
    if rule.constant:
        return np.array(rule.constant, np.float32).reshape(rule.region.shape)
    parts = []
    for source in rule.sources:
        array = reader.checkpoint.array(source.name)
        assert array is not None  # check_sources saw it
        values = array.read(reader.read)
        if source.rows is not None:
            values = values[source.rows.order()]
        parts.append(_transformed(values, Transform.NONE if array.is_final else rule.transform))
    whole = np.ascontiguousarray(np.concatenate(parts), np.float32).reshape(rule.region.shape)
    return whole if rule.factor == 1.0 else whole * np.float32(rule.factor)


def _transformed(values: NDArray[np.float32], transform: Transform) -> NDArray[np.float32]:
    match transform:
        case Transform.ONE_PLUS:
            return np.float32(1) + values
        case Transform.TAPS_FIRST:
            return values[:, 0, :].T
        case Transform.NONE:
            return values
