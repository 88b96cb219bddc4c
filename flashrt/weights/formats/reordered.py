"""A matrix whose rows or columns a file has in another order than a model expects.

IS: a StoredMatrix over one that is stored by rows; codes and scales move together, so nothing is
lost. IS NOT: which order a file has (gguf.names).

Rows are read whole with row 0, as bytes where they can be: so every byte is read once, in the order
of the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import printable
from flashrt.core.groups import SIZES, Groups, Planes
from flashrt.core.region import DType
from flashrt.weights.formats.stored import Bytes, Reader, RowMatrix, Rows, StoredMatrix, Tensor

Stored = TypeVar("Stored", bound=StoredMatrix)
Order = NDArray[np.intp]  # the place in the file of each row, or of each run of columns


@dataclass(slots=True)
class _Reordered(Generic[Stored]):
    """What a matrix in another order has in common with what is stored."""

    stored: Stored
    order: Order

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.stored.shape

    @property
    def dtype(self) -> DType:
        """Of values or codes."""
        return self.stored.dtype

    @property
    def groups(self) -> Groups | None:
        """Of codes."""
        return self.stored.groups

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Of what is stored."""
        return self.stored.tensors

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return self.stored.nbytes

    @property
    def description(self) -> str:
        """The format."""
        return self.stored.description


@dataclass(slots=True)
class RowsReordered(_Reordered[RowMatrix]):
    """Row r is row `order[r]` of what is stored."""

    _held: Bytes | None = field(default=None, repr=False)

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Rows:
        """Rows in the order that is wanted; all bytes are held until the last row was read."""
        if first_row == 0:
            held = np.empty(self.nbytes, np.uint8)
            reader(self.tensors[0], 0, held.data)
            self._held = held.reshape(self.shape[0], -1)
        if self._held is None:
            name = printable(self.tensors[0].stored_name)
            raise CheckpointError(f"{name}: rows are to be read in order, from row 0 on")
        last = first_row + n_rows
        raw = self._held[self.order[first_row:last]]
        if last == self.shape[0]:
            self._held = None
        return self.stored.decoded(raw.reshape(-1), n_rows)


@dataclass(slots=True)
class RowsGathered(_Reordered[StoredMatrix]):
    """`RowsReordered` of a matrix in any format: its rows are held as planes, not as bytes."""

    _held: Rows | None = field(default=None, repr=False)

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Rows:
        """Rows in the order that is wanted; all are held until the last one was read."""
        held = self._held
        if first_row == 0 or held is None:
            held = self.stored.read(0, self.shape[0], reader)
        last = first_row + n_rows
        self._held = held if last < self.shape[0] else None
        at = self.order[first_row:last]
        if not isinstance(held, Planes):
            return held[at]
        return Planes(held.codes[at], tuple(plane[at] for plane in held.scales))


@dataclass(slots=True)
class ColumnsReordered(_Reordered[RowMatrix]):
    """Run c of `run` columns is run `order[c]` of what is stored. Where groups are longer than a
    run, their scales are repeated, one for each shorter group.
    """

    run: int

    def __post_init__(self) -> None:
        stored = self.stored.groups
        if stored is not None and math.gcd(stored.size, self.run) not in SIZES:
            name = printable(self.tensors[0].stored_name)
            raise CheckpointError(
                f"{name}: groups of {stored.size} columns cross heads of {self.run}; take a file "
                "that has this tensor in F16 or F32"
            )

    @property
    def groups(self) -> Groups | None:
        """Of codes; no group is longer than a run."""
        stored = self.stored.groups
        if stored is None:
            return None
        size, outer = math.gcd(stored.size, self.run), math.gcd(stored.outer, self.run)
        return replace(stored, size=size, outer=outer if stored.outer else 0)

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Rows:
        """Rows with their columns in the order that is wanted."""
        rows = self.stored.read(first_row, n_rows, reader)
        stored, groups = self.stored.groups, self.groups
        if not isinstance(rows, Planes) or stored is None or groups is None:
            values = rows.codes if isinstance(rows, Planes) else rows
            return self._moved(values)
        pairs = zip(stored.planes, groups.planes, rows.scales, strict=True)
        planes = tuple(
            self._moved(np.repeat(plane, old.size // new.size, axis=1)) if old.size else plane
            for old, new, plane in pairs
        )
        return Planes(self._moved(rows.codes), planes)

    def _moved(self, plane: NDArray[np.generic]) -> NDArray[np.generic]:
        runs = plane.reshape(len(plane), len(self.order), -1)
        return runs[:, self.order].reshape(plane.shape)
