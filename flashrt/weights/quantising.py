"""A checkpoint whose matrices are quantised while it is loaded, for `weights=` of `flashrt.load`.

IS: a Checkpoint around another one, with the choice of matrices. IS NOT: the quantiser, nor a file
(formats.quantise, formats.write).

Matrices of the layers are quantised as `flashrt quantize` does. Embedding and head, which a file
keeps whole, become int8 whatever the layers are: a third of a small model is in them, and eight
bits lose half a percent. What is stored as codes already stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.base.messages import listed, printable, shown
from flashrt.core.groups import Groups, Planes
from flashrt.core.region import DType
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.quantise import TARGETS, Target, quantise
from flashrt.weights.formats.stored import Reader, StoredArray, StoredMatrix, Tensor
from flashrt.weights.formats.write import is_chosen

_TABLES = ("embed_tokens.weight", "lm_head.weight")
_FOR_TABLES = TARGETS["int8"]


@dataclass(frozen=True, slots=True)
class QuantisedMatrix:
    """A StoredMatrix of values, quantised as its rows are read."""

    source: StoredMatrix
    target: Target

    @property
    def shape(self) -> tuple[int, int]:
        """Of the source."""
        return self.source.shape

    @property
    def dtype(self) -> DType:
        """Of the codes."""
        return self.target.dtype

    @property
    def groups(self) -> Groups:
        """Of the codes."""
        return self.target.groups

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Of the source."""
        return self.source.tensors

    @property
    def nbytes(self) -> int:
        """Of the source, in the file."""
        return self.source.nbytes

    @property
    def description(self) -> str:
        """Both formats."""
        return f"{self.source.description} as {self.dtype}"

    def read(self, first_row: int, n_rows: int, reader: Reader) -> Planes:
        """Rows, quantised. Raises CheckpointError where a value is NaN or infinite."""
        rows = self.source.read(first_row, n_rows, reader)
        try:
            return quantise(dequantise(self.source.dtype, None, rows), self.target)
        except ValueError as error:
            tensor = self.tensors[0]
            raise CheckpointError(
                f"{tensor.path}: {printable(tensor.stored_name)}: {error}, and cannot be "
                "quantised; load it without weights="
            ) from error


@dataclass(slots=True)
class QuantisingCheckpoint(Checkpoint):
    """Another checkpoint, some of its matrices quantised."""

    source: Checkpoint = field(kw_only=True)
    target: Target = field(kw_only=True)

    def matrix(self, name: str) -> StoredMatrix | None:
        """See Checkpoint."""
        stored = self.source.matrix(name)
        if stored is None or stored.groups is not None:
            return stored
        target = _FOR_TABLES if name.endswith(_TABLES) else self.target
        is_table = name.endswith(_TABLES) and stored.shape[1] % target.groups.size == 0
        if is_table or is_chosen(name, stored.shape, target.groups.size):
            return QuantisedMatrix(stored, target)
        return stored

    def array(self, name: str) -> StoredArray | None:
        """See Checkpoint."""
        return self.source.array(name)

    def names_behind(self, name: str) -> Collection[str]:
        """See Checkpoint."""
        return self.source.names_behind(name)

    def read_into(self, tensor: Tensor, first_byte: int, out: memoryview) -> None:
        """See Checkpoint."""
        self.source.read_into(tensor, first_byte, out)

    def file_of(self, tensor: Tensor) -> int:
        """See Checkpoint."""
        return self.source.file_of(tensor)

    def close(self) -> None:
        """See Checkpoint."""
        self.source.close()


def quantising(source: Checkpoint, weights: str) -> Checkpoint:
    """The checkpoint with its weights as `int8` or `int4`. Raises PlanError for another word."""
    target = TARGETS.get(weights) if isinstance(weights, str) else None
    if target is None:
        raise PlanError(f"weights={shown(weights)}; choose one of {listed(TARGETS)}, or None")
    return QuantisingCheckpoint(
        source.path, source.config, source.generation, source.tensors, source.stop_tokens,
        source.notes, source=source, target=target,
    )  # fmt: skip
