"""What a checkpoint hands to the loader: stored matrices and arrays, whatever their format.

IS: the nouns between checkpoints, formats and the loader, and matrices and arrays of plain numbers.
IS NOT: a format of codes (blocks, float8, ...), nor what fills a region (rules).

A format never opens a file: it is given a `Reader`, which the loader hashes and counts. So each
byte of each tensor is read once, while rows are asked for from the first to the last; and the order
in which the bytes of one tensor are read is the same in whatever chunks the rows are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from flashrt.core.groups import Groups, Planes
from flashrt.core.region import DType


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies: bytes [offset, offset + nbytes) of a file. `dtype` is the file's own
    word, e.g. BF16 or Q4_K; `shape` is as a model expects it.
    """

    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


# Fills memory with the bytes of a tensor from one byte on. Raises CheckpointError.
Reader = Callable[[Tensor, int, memoryview], None]
Rows = NDArray[np.generic] | Planes
Bytes = NDArray[np.uint8]


class StoredMatrix(Protocol):
    """A matrix [N, K]. bfloat16 comes as bits (uint16); codes as Planes."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and K, of values."""

    @property
    def dtype(self) -> DType:
        """BF16, F16 or F32, or that of the codes."""

    @property
    def groups(self) -> Groups | None:
        """How codes become values; None for values."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that it is read from."""

    @property
    def nbytes(self) -> int:
        """Of those tensors, in the file."""

    @property
    def description(self) -> str:
        """The format, for people: "GGUF Q4_K"."""

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Rows:
        """Rows [first_row, first_row + n_rows), in memory that belongs to the caller.

        Rows are asked for in order, each once. A matrix that is not stored by rows may read all of
        itself with row 0, and keep it until its last row.
        """


class StoredArray(Protocol):
    """Values that are read whole: norms, biases, taps of convolutions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As a model expects it."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that it is read from."""

    @property
    def nbytes(self) -> int:
        """Of those tensors, in the file."""

    @property
    def is_final(self) -> bool:
        """Whether values are what a region wants: transforms such as 1 + w are done already."""

    def read(self, reader: Reader) -> NDArray[np.float32]:
        """All values."""


# Plain numbers: the words of safetensors and GGUF are the same.
PLAIN_DTYPES = {"BF16": DType.BF16, "F16": DType.F16, "F32": DType.F32}
_NUMPY: dict[DType, np.dtype[np.generic]] = {
    DType.BF16: np.dtype(np.uint16), DType.F16: np.dtype(np.float16),
    DType.F32: np.dtype(np.float32),
}  # fmt: skip


def read_rows(matrix: RowMatrix, first_row: int, n_rows: int, reader: Reader) -> Rows:
    """Rows of a matrix that is stored by rows."""
    raw = np.empty(n_rows * matrix.row_nbytes, np.uint8)
    reader(matrix.tensors[0], first_row * matrix.row_nbytes, raw.data)
    return matrix.decoded(raw, n_rows)


def read_array(
    reader: Reader, tensor: Tensor, first_byte: int, shape: tuple[int, ...], dtype: DTypeLike
) -> NDArray[np.generic]:
    """An array of stored elements, from one byte of a tensor on."""
    out = np.empty(shape, dtype)
    reader(tensor, first_byte, out.reshape(-1).view(np.uint8).data)
    return out


class RowMatrix(StoredMatrix, Protocol):
    """A matrix of one tensor whose rows lie one after another, each of as many bytes."""

    @property
    def row_nbytes(self) -> int:
        """Of a row, in the file."""

    def decoded(self, raw: Bytes, n_rows: int) -> Rows:
        """Rows from their bytes, which may be kept as part of the result."""


@dataclass(frozen=True, slots=True)
class PlainMatrix:
    """A RowMatrix of bfloat16, float16 or float32."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self.tensor.shape
        return rows, columns

    @property
    def dtype(self) -> DType:
        """Of the values."""
        return PLAIN_DTYPES[self.tensor.dtype]

    @property
    def groups(self) -> None:
        """None: they are values."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one tensor."""
        return (self.tensor,)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.tensor.nbytes

    @property
    def description(self) -> str:
        """The dtype."""
        return self.tensor.dtype

    @property
    def row_nbytes(self) -> int:
        """Of a row."""
        return self.shape[1] * self.dtype.nbytes

    def decoded(self, raw: Bytes, n_rows: int) -> Rows:
        """Rows from their bytes."""
        return raw.view(_NUMPY[self.dtype]).reshape(n_rows, -1)

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Rows:
        """Rows, as they are stored."""
        return read_rows(self, first_row, n_rows, reader)


@dataclass(frozen=True, slots=True)
class PlainArray:
    """A StoredArray of one tensor of bfloat16, float16 or float32."""

    tensor: Tensor
    is_final: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.tensor.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The one tensor."""
        return (self.tensor,)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.tensor.nbytes

    def read(self, reader: Reader) -> NDArray[np.float32]:
        """All values."""
        dtype = PLAIN_DTYPES[self.tensor.dtype]
        stored = read_array(reader, self.tensor, 0, (math.prod(self.shape),), _NUMPY[dtype])
        is_bfloat16 = dtype is DType.BF16
        values = stored.view(ml_dtypes.bfloat16) if is_bfloat16 else stored
        return values.astype(np.float32).reshape(self.shape)
