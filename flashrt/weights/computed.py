"""A checkpoint with matrices and arrays that are computed from those that it stores.

IS: a Checkpoint around another one: what is in its table is computed when it is read (rows of a
matrix, a convolution with its batch norm folded in), all else is as it is stored. IS NOT: the
formulas, which are a model family's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import printable, shown
from flashrt.core.region import DType, Region
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.formats.stored import PlainArray, Reader, StoredArray, StoredMatrix, Tensor
from flashrt.weights.rules import Source, WeightRule

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Formula:
    """Values of a shape from stored tensors, which are given by name with their shapes; `compute`
    gets them in that order.
    """

    shape: tuple[int, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    compute: Callable[..., NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class ComputedArray:
    """A StoredArray of a formula."""

    formula: Formula
    tensors: Sequence[Tensor]
    is_final: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.formula.shape

    @property
    def nbytes(self) -> int:
        """Of all tensors behind it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def read(self, reader: Reader) -> Values:
        """All values."""
        parts = [PlainArray(tensor).read(reader) for tensor in self.tensors]
        values = np.asarray(self.formula.compute(*parts), np.float32)
        return np.ascontiguousarray(values).reshape(self.shape)


class ComputedMatrix:
    """A StoredMatrix of a formula: computed with row 0, and kept until its last row was read."""

    dtype, groups = DType.F32, None

    def __init__(self, formula: Formula, tensors: Sequence[Tensor]) -> None:
        self._array = ComputedArray(formula, tensors)
        self._values: Values | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        rows, columns = self._array.shape
        return rows, columns

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All behind it."""
        return self._array.tensors

    @property
    def nbytes(self) -> int:
        """Of those tensors."""
        return self._array.nbytes

    @property
    def description(self) -> str:
        """For people."""
        return "F32, computed"

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Values:
        """Rows."""
        if self._values is None:
            self._values = self._array.read(reader)
        rows = self._values[first_row : first_row + n_rows]
        if first_row + n_rows == self.shape[0]:
            self._values = None
        return rows


@dataclass(slots=True)
class ComputingCheckpoint(Checkpoint):
    """Another checkpoint, with values that are computed, by name."""

    source: Checkpoint = field(kw_only=True)
    formulas: Mapping[str, Formula] = field(kw_only=True)

    def matrix(self, name: str) -> StoredMatrix | None:
        """See Checkpoint."""
        formula = self.formulas.get(name)
        if formula is None:
            return Checkpoint.matrix(self, name)
        return ComputedMatrix(formula, self._behind(formula))

    def array(self, name: str) -> StoredArray | None:
        """See Checkpoint."""
        formula = self.formulas.get(name)
        if formula is None:
            return Checkpoint.array(self, name)
        return ComputedArray(formula, self._behind(formula))

    def names_behind(self, name: str) -> Collection[str]:
        """See Checkpoint."""
        formula = self.formulas.get(name)
        if formula is None:
            return self.source.names_behind(name)
        return [source for source, _ in formula.sources]

    def read_into(self, tensor: Tensor, first_byte: int, out: memoryview) -> None:
        """See Checkpoint."""
        self.source.read_into(tensor, first_byte, out)

    def file_of(self, tensor: Tensor) -> int:
        """See Checkpoint."""
        return self.source.file_of(tensor)

    def close(self) -> None:
        """See Checkpoint."""
        self.source.close()

    def _behind(self, formula: Formula) -> list[Tensor]:
        """The tensors of a formula. Raises CheckpointError for one that is missing or another."""
        tensors = []
        for name, shape in formula.sources:
            tensor = self.tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{self.path}: tensors do not fit the config:\n  missing {printable(name)} "
                    f"{list(shape)}"
                )
            if tensor.shape != shape or Checkpoint.array(self, name) is None:
                raise CheckpointError(
                    f"{tensor.path}: tensors do not fit the config:\n  {printable(name)} is "
                    f"{tensor.dtype} {shown(list(tensor.shape))}, expected BF16, F16 or F32 "
                    f"{list(shape)}"
                )
            tensors.append(tensor)
        return tensors


def computed(region: Region) -> WeightRule:
    """The rule of a region that a formula fills: that of its name."""
    return WeightRule(region, (Source(region.name, region.shape),))


def computing(
    source: Checkpoint, tensors: Mapping[str, Tensor], formulas: Mapping[str, Formula]
) -> Checkpoint:
    """A checkpoint whose tensors are these, of which formulas compute others."""
    return ComputingCheckpoint(
        source.path, source.config, source.generation, tensors, source.stop_tokens, source.notes,
        source=source, formulas=formulas,
    )  # fmt: skip
