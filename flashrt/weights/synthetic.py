"""A checkpoint that is nowhere: the tensors of a named shape, drawn when they are read.

IS: the same names, shapes and values as `random_checkpoint` writes, without a file; and the
standard deviation of each tensor, for a benchmark that fills matrices on the device. IS NOT: a
format.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flashrt.base.errors import CheckpointError
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.formats.stored import Tensor
from flashrt.weights.random_checkpoint import Draw, Shape, shape_config, sizes_of, tensor_shapes


@dataclass(slots=True)
class SyntheticCheckpoint(Checkpoint):
    """A `Checkpoint` whose bytes are drawn: matrices in bfloat16, vectors in float32.

    A read draws the whole tensor (the last one is kept): meant for vectors and small matrices.
    """

    draw: Draw = field(kw_only=True)
    _name: str = field(default="", init=False, repr=False)
    _bytes: bytes = field(default=b"", init=False, repr=False)

    def read_into(self, tensor: Tensor, first_byte: int, out: memoryview) -> None:
        """See Checkpoint. Raises CheckpointError for a range beyond the tensor."""
        if first_byte + len(out) > tensor.nbytes:
            raise CheckpointError(
                f"{tensor.stored_name}: bytes [{first_byte}, {first_byte + len(out)}) leave its "
                f"{tensor.nbytes}"
            )
        if tensor.stored_name != self._name:
            chunks = list(self.draw.chunks(tensor.stored_name, tensor.shape))
            self._name, self._bytes = tensor.stored_name, np.concatenate(chunks).tobytes()
        out[:] = self._bytes[first_byte : first_byte + len(out)]

    def only(self, names: Collection[str]) -> SyntheticCheckpoint:
        """The same, holding these tensors alone."""
        tensors = {name: self.tensors[name] for name in names}
        return SyntheticCheckpoint(self.path, self.config, self.generation, tensors, draw=self.draw)

    def deviation(self, name: str) -> float:
        """Standard deviation of a tensor's values around zero."""
        return self.draw.moments(name, self.tensors[name].shape)[1]


def synthetic_checkpoint(shape: str | Shape, *, seed: int = 0) -> SyntheticCheckpoint:
    """The checkpoint of a shape; nothing is drawn yet. Raises CheckpointError if it is unknown."""
    sizes = sizes_of(shape)
    name = shape if isinstance(shape, str) else "of its own shape"
    tensors = {}
    for tensor, extents in tensor_shapes(sizes, sizes.is_tied, False):
        dtype, item = ("F32", 4) if len(extents) == 1 else ("BF16", 2)
        nbytes = item * math.prod(extents)
        tensors[tensor] = Tensor(tensor, dtype, extents, Path("synthetic"), 0, nbytes)
    return SyntheticCheckpoint(
        Path(f"synthetic {name}"), shape_config(sizes), {}, tensors,
        draw=Draw(seed, sizes.hidden, sizes.is_tied),
    )  # fmt: skip
