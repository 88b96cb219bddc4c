"""Run weight rules: check every name, shape and dtype first, then stream the tensors into a sink.

IS: the one path from checkpoint bytes to logical weight arrays; the process holds one chunk at a
time, never the weights. IS NOT: packing into a backend's storage, which is the sink's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.base.messages import MOST_LISTED, printable, shown
from flashrt.core.arena import Arena
from flashrt.core.backend import Bytes, Progress
from flashrt.core.groups import Planes
from flashrt.core.region import DType, Region
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.stored import Rows, StoredArray, StoredMatrix, Tensor
from flashrt.weights.rules import Source, Transform, WeightRule

CHUNK_NBYTES = 16 << 20  # fits a last-level cache: read, hashed and packed while it is warm
# Chunks begin at multiples of this: the widest panel of any backend's matrix storage.
CHUNK_ROWS = 32
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
            stored = _stored(rule, source, checkpoint)
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


def _stored(
    rule: WeightRule, source: Source, checkpoint: Checkpoint
) -> StoredMatrix | StoredArray | None:
    return (checkpoint.matrix if rule.is_matrix else checkpoint.array)(source.name)


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
    stored = [_stored(rule, source, checkpoint) for rule in rules for source in rule.sources]
    reader = _Reader(checkpoint, sum(s.nbytes for s in stored if s is not None), progress)
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


class _Reader:
    """Reads of tensors: hashed and reported as they go by."""

    def __init__(
        self, checkpoint: Checkpoint, total_nbytes: int, progress: Progress | None
    ) -> None:
        self.checkpoint = checkpoint
        self.total_nbytes = total_nbytes
        self.hash = xxhash.xxh3_128()
        self._done_nbytes = 0
        self._progress = progress
        self._names = {tensor: name for name, tensor in checkpoint.tensors.items()}
        self._begun: set[Tensor] = set()

    def read(self, tensor: Tensor, first_byte: int, out: memoryview) -> None:
        """Fill memory with bytes of a tensor: a `formats.stored.Reader`."""
        if tensor not in self._begun:
            self._begun.add(tensor)
            name = self._names.get(tensor, tensor.stored_name)
            self.hash.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        self.checkpoint.read_into(tensor, first_byte, out)
        self.hash.update(out)
        self._done_nbytes += len(out)
        if self._progress is not None:
            self._progress("weights", self._done_nbytes, self.total_nbytes)


def _matrix_chunks(rule: WeightRule, reader: _Reader) -> Iterator[tuple[int, Rows]]:
    """Rows of a rule's sources, stacked. A chunk ends where a source does, if it may."""
    region = rule.region
    n_rows, n_columns = region.shape
    row_nbytes = max(1, n_columns * region.dtype.bits // 8)
    step = max(1, CHUNK_NBYTES // (row_nbytes * CHUNK_ROWS)) * CHUNK_ROWS
    parts: list[Rows] = []
    start = stop = 0  # of the rows in `parts`
    for source in rule.sources:
        matrix = reader.checkpoint.matrix(source.name)
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
    if (matrix.dtype, matrix.groups) == (region.dtype, region.groups):
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
        parts.append(_transformed(values, Transform.NONE if array.is_final else rule.transform))
    return np.ascontiguousarray(np.concatenate(parts), np.float32).reshape(rule.region.shape)


def _transformed(values: NDArray[np.float32], transform: Transform) -> NDArray[np.float32]:
    match transform:
        case Transform.ONE_PLUS:
            return np.float32(1) + values
        case Transform.TAPS_FIRST:
            return values[:, 0, :].T
        case Transform.NONE:
            return values
