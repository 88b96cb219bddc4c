"""Run weight rules: check every name, shape and dtype first, then stream the tensors into a sink.

IS: the one path from checkpoint bytes to logical weight arrays; the process holds one chunk at a
time, never the weights. IS NOT: packing into a backend's storage, which is the sink's work. Called
by: engine (load).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.core.arena import Arena
from flashrt.core.backend import Bytes, Progress
from flashrt.core.region import Region
from flashrt.weights.checkpoint import Checkpoint, Tensor
from flashrt.weights.rules import Source, Transform, WeightRule

CHUNK_NBYTES = 16 << 20  # fits a last-level cache: read, hashed and packed while it is warm
CHUNK_ROWS = (
    32  # chunks begin at multiples of this: the widest panel of any backend's matrix storage
)
OPTIONAL_PREFIXES = (
    "mtp.",
)  # parts that a checkpoint may carry and a model may leave unused, as a whole

Sink = Callable[
    [Region, int, NDArray[np.generic]], None
]  # region, first row, rows; the array is reused afterwards

_NUMPY_DTYPE: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype(np.uint16),  # as bits
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load` did: xxh3-128 of all source tensors in rule order (names, dtypes, shapes, bytes),
    their size, and one note per tensor whose values had to be rounded.
    """

    digest: str
    source_nbytes: int
    notes: tuple[str, ...]


def resolve(rules: Sequence[WeightRule], checkpoint: Checkpoint) -> tuple[str, ...]:
    """Check that the checkpoint holds what the rules need and nothing else; return notes on rounded
    tensors.

    Raises one CheckpointError that names every missing, unused, wrongly shaped and wrongly typed
    tensor.
    """
    problems, notes, used = [], [], set()
    for rule in rules:
        for source in rule.sources:
            used.add(source.name)
            tensor = checkpoint.tensors.get(source.name)
            if tensor is None:
                problems.append(f"missing {source.name} {list(source.shape)}")
            elif tensor.shape != source.shape:
                problems.append(
                    f"{tensor.stored_name} is {list(tensor.shape)}, expected {list(source.shape)}"
                )
            elif tensor.dtype not in _NUMPY_DTYPE:
                problems.append(
                    f"{tensor.stored_name} is {tensor.dtype}, expected BF16, F16 or F32"
                )
            elif rule.is_matrix and tensor.dtype != "BF16":
                notes.append(f"{tensor.stored_name}: {tensor.dtype} rounded to BF16")
    idle = tuple(p for p in OPTIONAL_PREFIXES if not any(name.startswith(p) for name in used))
    unused = [
        t.stored_name
        for name, t in checkpoint.tensors.items()
        if name not in used and not name.startswith(idle)
    ]
    problems += [f"unused {name}" for name in sorted(unused)]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: tensors do not fit the config:\n  " + "\n  ".join(problems)
        )
    return tuple(notes)


def load(
    rules: Sequence[WeightRule],
    checkpoint: Checkpoint,
    sink: Sink,
    progress: Progress | None = None,
) -> LoadReport:
    """Feed the sink with the logical array of each rule, in rule order.

    Matrices come as bfloat16 bits (uint16) [rows, K], in chunks of about CHUNK_NBYTES whose first
    row is a multiple of CHUNK_ROWS; everything else comes whole, as float32, first row 0. An array
    is valid only during the call. Raises CheckpointError, before the first call of the sink if the
    tensors do not fit (see `resolve`).
    """
    notes = resolve(rules, checkpoint)
    sources = [s for rule in rules for s in rule.sources]
    reader = _Reader(checkpoint, sum(checkpoint.tensors[s.name].nbytes for s in sources), progress)
    try:
        for rule in rules:
            if rule.is_matrix:
                for first_row, rows in _matrix_chunks(rule, reader):
                    sink(rule.region, first_row, rows)
            else:
                sink(rule.region, 0, _float_array(rule, reader))
    finally:
        checkpoint.close()
    return LoadReport(reader.hash.hexdigest(), reader.total_nbytes, notes)


def fill_weights(
    rules: Sequence[WeightRule],
    checkpoint: Checkpoint,
    arena: Arena,
    progress: Progress | None = None,
) -> LoadReport:
    """`load` into the weights of an arena, as its backend stores them."""
    slots, base = {s.region: s for s in arena.weights.slots}, arena.weight_memory.address
    staging: Bytes = np.empty(0, np.uint8)

    def sink(region: Region, first_row: int, rows: NDArray[np.generic]) -> None:
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
    """Sequential reads of sources: hashed and reported as they go by."""

    def __init__(
        self, checkpoint: Checkpoint, total_nbytes: int, progress: Progress | None
    ) -> None:
        self.checkpoint = checkpoint
        self.total_nbytes = total_nbytes
        self.done_nbytes = 0
        self.progress = progress
        self.hash = xxhash.xxh3_128()

    def dtype(self, source: Source) -> np.dtype[np.generic]:
        """Of the stored elements; bfloat16 as uint16 bits."""
        return _NUMPY_DTYPE[self.checkpoint.tensors[source.name].dtype]

    def read(self, source: Source, first: int, out: NDArray[np.generic]) -> None:
        """Fill a contiguous array of the stored dtype with elements [first, first + out.size)."""
        tensor: Tensor = self.checkpoint.tensors[source.name]
        if first == 0:
            self.hash.update(f"{source.name} {tensor.dtype} {tensor.shape}\n".encode())
        raw = out.reshape(-1).view(np.uint8).data
        self.checkpoint.read_into(tensor, first * out.itemsize, raw)
        self.hash.update(raw)
        self.done_nbytes += len(raw)
        if self.progress is not None:
            self.progress("weights", self.done_nbytes, self.total_nbytes)


def _matrix_chunks(rule: WeightRule, reader: _Reader) -> Iterator[tuple[int, NDArray[np.uint16]]]:
    n_rows, n_columns = rule.region.shape
    step = max(1, CHUNK_NBYTES // (2 * n_columns * CHUNK_ROWS)) * CHUNK_ROWS
    buffer = np.empty((min(step, n_rows), n_columns), np.uint16)
    bounds = np.cumsum(
        [0, *(s.shape[0] for s in rule.sources)]
    ).tolist()  # rows where sources begin, and the end
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        for source, begin, end in zip(rule.sources, bounds, bounds[1:], strict=False):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                _read_bfloat16(
                    reader, source, (low - begin) * n_columns, buffer[low - start : high - start]
                )
        yield start, buffer[: stop - start]


def _read_bfloat16(reader: _Reader, source: Source, first: int, out: NDArray[np.uint16]) -> None:
    """Elements as bfloat16 bits; wider sources are rounded to nearest, ties to even."""
    dtype = reader.dtype(source)
    if dtype == np.uint16:
        reader.read(source, first, out)
        return
    wide = np.empty(out.shape, dtype)
    reader.read(source, first, wide)
    out[...] = wide.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def _float_array(rule: WeightRule, reader: _Reader) -> NDArray[np.float32]:
    if rule.constant:
        return np.array(rule.constant, np.float32).reshape(rule.region.shape)
    parts = []
    for source in rule.sources:
        stored = np.empty(source.shape, reader.dtype(source))
        reader.read(source, 0, stored)
        is_bfloat16 = stored.dtype == np.uint16
        parts.append(
            (stored.view(ml_dtypes.bfloat16) if is_bfloat16 else stored).astype(np.float32)
        )
    values = np.concatenate(parts)
    match rule.transform:
        case Transform.ONE_PLUS:
            values = np.float32(1) + values
        case Transform.TAPS_FIRST:
            values = values[:, 0, :].T
        case Transform.NONE:
            pass
    return np.ascontiguousarray(values, np.float32).reshape(rule.region.shape)
