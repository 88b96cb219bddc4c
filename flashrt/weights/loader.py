"""Run weight rules: check every name, shape and dtype first, then stream the tensors into a sink.

IS: the one path from checkpoint bytes to logical weight arrays; the process holds one chunk at a
time, never the weights. IS NOT: packing into a backend's storage, which is the sink's work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import MOST_LISTED, printable, shown
from flashrt.core.arena import Arena
from flashrt.core.backend import Bytes, Progress
from flashrt.core.region import Region
from flashrt.weights.checkpoint import Checkpoint, Tensor
from flashrt.weights.rules import Source, Transform, WeightRule

CHUNK_NBYTES = 16 << 20  # fits a last-level cache: read, hashed and packed while it is warm
# Chunks begin at multiples of this: the widest panel of any backend's matrix storage.
CHUNK_ROWS = 32
# Parts that a checkpoint may carry and a model may leave unused, as a whole.
OPTIONAL_PREFIXES = ("mtp.",)

# Takes a region, a first row and rows; the array is reused afterwards.
Sink = Callable[[Region, int, NDArray[np.generic]], None]

_NUMPY_DTYPE: dict[str, np.dtype[np.generic]] = {
    "BF16": np.dtype(np.uint16),  # as bits
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load` did: xxh3-128 of all source tensors in rule order (names, dtypes, shapes, bytes),
    their size, and what a user should know about them (see `check_sources`).
    """

    digest: str
    source_nbytes: int
    notes: tuple[str, ...]


def check_sources(rules: Sequence[WeightRule], checkpoint: Checkpoint) -> tuple[str, ...]:
    """Check that the checkpoint holds what the rules need and nothing else, by its headers alone.

    Returns notes for the user: at most one, on matrices that will be rounded to bfloat16. Raises
    one CheckpointError on all tensors that are missing, unused, or have a wrong shape or dtype.
    """
    missing, misfits, rounded, used = [], [], [], set()
    for rule in rules:
        for source in rule.sources:
            used.add(source.name)
            tensor = checkpoint.tensors.get(source.name)
            if tensor is None:
                missing.append(source)
            elif tensor.shape != source.shape:
                misfits.append(
                    f"{printable(tensor.stored_name)} is {shown(list(tensor.shape))}, expected "
                    f"{list(source.shape)}"
                )
            elif tensor.dtype not in _NUMPY_DTYPE:
                misfits.append(
                    f"{printable(tensor.stored_name)} is {tensor.dtype}, expected BF16, F16 or F32"
                )
            elif rule.is_matrix and tensor.dtype != "BF16":
                rounded.append(tensor)
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
    return _note_on_rounding(rounded)


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


def _note_on_rounding(rounded: Sequence[Tensor]) -> tuple[str, ...]:
    if not rounded:
        return ()
    counts = Counter(t.dtype for t in rounded)
    stored = " and ".join(f"{count:,} matrices stored as {d}" for d, count in counts.items())
    return (
        f"{stored} are rounded to bfloat16, {printable(rounded[0].stored_name)} among them; logits "
        "differ from those of the stored weights, by some tenths in models that were tried",
    )


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
    tensors do not fit (see `check_sources`).
    """
    notes = check_sources(rules, checkpoint)
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
    # rows where sources begin, and the end
    bounds = np.cumsum([0, *(s.shape[0] for s in rule.sources)]).tolist()
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
