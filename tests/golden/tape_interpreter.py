"""Runs recorded tapes with the reference of each op, in float64.

IS: an independent check that a model's regions and tapes compute the model; every element that
nobody wrote is NaN. IS NOT: a backend. Without it, a wrong tape and a wrong kernel could cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from flashrt.core.op import Launch
from flashrt.core.region import DType, Layout, Region, Role, View
from flashrt.core.tape import Tape
from flashrt.models import Model
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.loader import load
from tests.reference import REFERENCE, Operands

Array = NDArray[np.generic]
_INTEGERS = {DType.I32: np.int32, DType.U32: np.uint32}


class TapeInterpreter:
    """One lane of a model."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self.model = model
        self.memory: dict[Region, Array] = {}
        load(model.weights, checkpoint, self._store)
        self.memory |= {region: _blank(region) for region in model.lane_regions}
        self.lane = {region.name: self.memory[region] for region in model.lane_regions}

    def prefill(self, tokens: Sequence[int]) -> None:
        """Feed tokens, in pieces of the largest bucket."""
        rows = max(self.model.buckets)
        for start in range(0, len(tokens), rows):
            piece = tokens[start : start + rows]
            self.lane["tokens"][...] = -1  # rows beyond the piece must not be read
            self.lane["tokens"][: len(piece)] = piece
            self.lane["cursor"][1] = len(piece)
            bucket = min(b for b in self.model.buckets if b >= len(piece))
            self.run(self.model.record("prefill", bucket))

    def sample(self) -> Array:
        """Logits of the next position; the greedy token goes to the cursor."""
        self.run(self.model.record("sample", 1))
        return self.lane["logits"][0].copy()

    def decode(self) -> Array:
        """Feed the token sampled last; logits of the next position."""
        self.lane["cursor"][1] = 1
        self.run(self.model.record("decode", 1))
        return self.lane["logits"][0].copy()

    def greedy(self, n_tokens: int) -> tuple[list[int], Array]:
        """Sample, then decode n_tokens - 1 times: tokens, and the logits that chose the last."""
        logits, tokens = self.sample(), [int(self.lane["cursor"][2])]
        for _ in range(n_tokens - 1):
            logits = self.decode()
            tokens.append(int(self.lane["cursor"][2]))
        return tokens, logits

    def run(self, tape: Tape) -> None:
        """All launches of a tape, its scratch poisoned first."""
        self.memory |= {region: _blank(region) for region in tape.lifetimes()}
        for launch in tape.launches:
            self.launch(launch)

    def launch(self, launch: Launch) -> None:
        """One launch, on memory as it is."""
        attrs = dict(zip([a.name for a in launch.op.attrs], launch.attrs, strict=True))
        arrays = self.operands(launch)
        for name, result in REFERENCE[launch.op.name](Operands(arrays, attrs)).items():
            is_written = ~np.isnan(result)
            arrays[name][is_written] = result[is_written]

    def operands(self, launch: Launch) -> dict[str, Array]:
        """Windows into memory by param name."""
        names = [p.name for p in launch.op.params]
        return dict(zip(names, map(self._array, launch.operands), strict=True))

    def _store(self, region: Region, first_row: int, rows: Array) -> None:
        values = rows.view(ml_dtypes.bfloat16) if region.layout is Layout.MATRIX else rows
        array = self.memory.setdefault(region, np.full(region.shape, np.nan))
        array[first_row : first_row + len(rows)] = values.astype(np.float64)

    def _array(self, view: View) -> Array:
        """A window into memory: the arithmetic of `View`, independent of any backend."""
        array = self.memory[view.region]
        start = view.lead * (array.size // len(array)) + view.col
        strides = [1, view.row_stride][: len(view.shape)]
        for extent in view.shape[-2:0:-1]:
            strides.append(strides[-1] * extent)
        nbytes = [stride * array.itemsize for stride in reversed(strides)]
        return np.lib.stride_tricks.as_strided(array.reshape(-1)[start:], view.shape, nbytes)


def _blank(region: Region) -> Array:
    if region.dtype in _INTEGERS:
        return np.zeros(region.shape, _INTEGERS[region.dtype])
    return np.full(region.shape, 0.0 if region.role is Role.FIXED else np.nan)
