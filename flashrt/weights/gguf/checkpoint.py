"""A GGUF file as a checkpoint: the original's names, shapes and orders over the file's tensors.

IS: a Checkpoint whose matrices are blocks, or plain numbers, put back into the original's order.
IS NOT: parsing (file), what metadata mean (config) or which tensor is which (names).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.formats.blocks import BLOCK_TYPES, BlockMatrix
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.reordered import ColumnsReordered, RowsReordered
from flashrt.weights.formats.stored import (
    PLAIN_DTYPES,
    PlainMatrix,
    Reader,
    RowMatrix,
    StoredArray,
    StoredMatrix,
    Tensor,
)
from flashrt.weights.gguf.config import architecture_of, config_of
from flashrt.weights.gguf.file import GgufFile, read_gguf
from flashrt.weights.gguf.names import ROPE_FACTORS, Placement, Values, placements
from flashrt.weights.stop_tokens import FIELD, stop_tokens_of

_STOPS = ("eos", "eot", "eom")  # ends of a text, of a turn, of a message
_NO_TOKEN = 0xFFFFFFFF  # -1 as files write it: there is none


@dataclass(slots=True)
class GgufCheckpoint(Checkpoint):
    """An open GGUF file. `metadata` is all of it: the tokenizer's part is read from there."""

    metadata: Mapping[str, object] = field(default_factory=dict, repr=False)
    placed: Mapping[str, Placement] = field(default_factory=dict, repr=False)

    def matrix(self, name: str) -> StoredMatrix | None:
        """The matrix of a canonical name; None if there is none, or if it is no matrix."""
        placement = self.placed.get(name)
        if placement is None or len(placement.tensor.shape) != 2:
            return None
        stored = _by_rows(placement.tensor)
        if placement.rows is not None:
            return RowsReordered(stored, placement.rows)
        if placement.columns is not None:
            return ColumnsReordered(stored, placement.columns, placement.run)
        return stored

    def array(self, name: str) -> StoredArray | None:
        """The array of a canonical name; None if there is none."""
        placement = self.placed.get(name)
        return None if placement is None else _Array(placement)


@dataclass(frozen=True, slots=True)
class _Array:
    """A StoredArray: values with what the converter did to them undone."""

    placement: Placement

    @property
    def shape(self) -> tuple[int, ...]:
        """As a model expects it."""
        return self.placement.tensor.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one tensor."""
        return (self.placement.tensor,)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.placement.tensor.nbytes

    @property
    def is_final(self) -> bool:
        """Whether 1 is already added."""
        return self.placement.values is Values.ONE_PLUS

    def read(self, reader: Reader) -> NDArray[np.float32]:
        """All values, in the original's order."""
        values = _values(self.placement.tensor, reader)
        if self.placement.rows is not None:
            values = values[self.placement.rows]
        if self.placement.values is Values.LOG_OF_MINUS:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log(-values)
        return values


def open_gguf(path: str | os.PathLike[str]) -> GgufCheckpoint:
    """Read the header of a GGUF file, or of all parts of a split one; no weights are read yet.

    Raises CheckpointError for a file that is cut or contradicts itself, an architecture, a key, a
    tensor or a block type that flashrt does not know.
    """
    file = read_gguf(path)
    architecture = architecture_of(file)
    config = config_of(file, architecture, _rope_factors(file))
    placed = placements(file, architecture, config)
    _check_types(file, placed)
    tensors = {name: placement.tensor for name, placement in placed.items()}
    checkpoint = GgufCheckpoint(
        file.path, config, {}, tensors, _stop_tokens(file, config), metadata=file.metadata,
        placed=placed,
    )  # fmt: skip
    for name in tensors:
        checkpoint.matrix(name)  # raises where the columns of heads cannot be told apart
    return checkpoint


def _rope_factors(file: GgufFile) -> list[float] | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.dtype != "F32" or math.prod(tensor.shape) > 1 << 16:
        raise CheckpointError(
            f"{file.path}: {ROPE_FACTORS} is {tensor.dtype} {list(tensor.shape)}, expected a few "
            "F32; take another file of the model"
        )
    plain = Checkpoint(file.path, {}, {}, {})
    try:
        return [float(v) for v in _values(tensor, plain.read_into).reshape(-1)]
    finally:
        plain.close()


def _by_rows(tensor: Tensor) -> RowMatrix:
    return PlainMatrix(tensor) if tensor.dtype in PLAIN_DTYPES else BlockMatrix(tensor)


def _values(tensor: Tensor, reader: Reader) -> NDArray[np.float32]:
    """Of a tensor of any shape and known type, as float32."""
    columns = tensor.shape[-1]
    rows = math.prod(tensor.shape) // columns
    flat = _by_rows(
        Tensor(
            tensor.stored_name, tensor.dtype, (rows, columns), tensor.path, tensor.offset,
            tensor.nbytes,
        )
    )  # fmt: skip
    raw = np.empty(tensor.nbytes, np.uint8)
    reader(tensor, 0, raw.data)
    return dequantise(flat.dtype, flat.groups, flat.decoded(raw, rows)).reshape(tensor.shape)


def _check_types(file: GgufFile, placed: Mapping[str, Placement]) -> None:
    known = (*PLAIN_DTYPES, *BLOCK_TYPES)
    counts = Counter(p.tensor.dtype for p in placed.values() if p.tensor.dtype not in known)
    if counts:
        what = listed([f"{count:,} of {dtype}" for dtype, count in counts.most_common()])
        raise CheckpointError(
            f"{file.path}: holds tensors in formats that flashrt does not read ({what}); take a "
            f"file of the model in {', '.join(known)}, or write one with llama-quantize"
        )


def _stop_tokens(file: GgufFile, config: Mapping[str, object]) -> tuple[int, ...]:
    values = [file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in _STOPS]
    given = [v for v in values if v is not None and v != _NO_TOKEN]
    if not given:
        return ()
    stated = {FIELD: given, "vocab_size": config["vocab_size"]}
    return stop_tokens_of([(str(file.path), stated)])
