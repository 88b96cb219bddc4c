"""Decoders: an embedding, layers of a mixer and an MLP on one residual stream, a norm, a head.

IS: the model and the recorder of such a family, but for its mixers. IS NOT: config fields, weight
names or state, which each family has; nor drafting. It exists so that a family says no more than
what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from flashrt.base.errors import PlanError
from flashrt.core.region import Operand, Region
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.models.blocks import TokenRecorder
from flashrt.models.lane import Choices, check_choices
from flashrt.models.model import (
    DECODE,
    PREFILL,
    SAMPLE,
    buckets_up_to,
    shared_tape,
    token_shared_phases,
)
from flashrt.ops import table as ops
from flashrt.weights.rules import WeightRule, as_stored

EMBED, HEAD, FINAL_NORM = "embed", "head", "final_norm"


def layer_name(index: int) -> str:
    """Prefix of the weight and scratch regions of a layer."""
    return f"layers.{index}"


class DecoderRecorder(TokenRecorder):
    """Records one tape. Weights of a layer: input_norm, those of its mixer, and those of `mlp`."""

    def __init__(
        self,
        regions: Mapping[str, Region],
        tape: Tape,
        n_layers: int,
        eps: float,
        magnitude: float = 1.0,
    ) -> None:
        """`magnitude`: of rotated heads. The head is the embedding where it has no region."""
        super().__init__(regions, tape, eps, magnitude)
        self.n_layers = n_layers
        self.head_weight = HEAD if HEAD in regions else EMBED

    def mix(self, layer: int, h: Operand, *, last_row_only: bool) -> Region:
        """The layer's mixer of tokens, over its normalised input.

        `last_row_only`: every row changes the state, then the last valid one alone goes on.
        """
        raise NotImplementedError

    def forward(self, tokens: Operand) -> Operand:
        """Rows of tokens through all layers: leaves the last hidden state, moves the cursor.

        Every row changes the state of the last layer; the rest of it is computed for the last row
        alone, or the row of each lane that shares the tape. Returns hidden states of those.
        """
        regions, cursor = self.regions, self.cursor
        hidden = regions[EMBED].shape[1]
        x = self.scratch("x", hidden)
        self.launch(ops.EMBED, tokens=tokens, table=regions[EMBED], journal=regions["journal"], x=x)
        last_row_only = self.rows > 1 and not self.is_shared
        h: Operand = self.activation(f"{layer_name(0)}.h", hidden)
        self.rmsnorm(x, f"{layer_name(0)}.input_norm", h)
        for i in range(self.n_layers):
            at, is_last = layer_name(i), i + 1 == self.n_layers
            narrows = is_last and last_row_only
            if narrows:
                x = self.last_of(x)
            r = self.mlp(at, x, self.mix(i, h, last_row_only=narrows))
            if is_last:
                h = regions["last_hidden"] if last_row_only else self.activation("h", hidden)
                self.add_rmsnorm(x, r, FINAL_NORM, h)
            else:
                following = layer_name(i + 1)
                h = self.activation(f"{following}.h", hidden)
                self.add_rmsnorm(x, r, f"{following}.input_norm", h)
        if not last_row_only:
            self.launch(ops.LAST_ROW, x=h, y=regions["last_hidden"])
        self.tape.record(ops.ADVANCE, cursor=cursor)
        return h


class Decoder:
    """One model at one context length. See `models.model.Model`."""

    identity: ClassVar[Mapping[str, object]] = {}  # all of it is in tapes, regions and constants

    def __init__(
        self,
        name: str,
        rules: Sequence[WeightRule],
        lane_regions: Sequence[Region],
        recorder: Callable[[Mapping[str, Region], Tape], DecoderRecorder],
        chosen: Choices,
    ) -> None:
        """`recorder`: of the regions of the lane and of the weights by name, and an empty tape.

        Raises PlanError for a choice that no lane can have.
        """
        check_choices(chosen.max_positions, chosen.kv_dtype, chosen.prefill_rows)
        self.name = name
        self.buckets = buckets_up_to(chosen.prefill_rows)
        self.phases: tuple[tuple[str, int], ...] = (
            *((PREFILL, rows) for rows in self.buckets),
            (DECODE, 1),
            (SAMPLE, 1),
        )
        self.weights = as_stored(rules, chosen.stored)
        self.lane_regions = tuple(lane_regions)
        self._recorder = recorder
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }
        self.vocab_size = self._regions[EMBED].shape[0]

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """See Model."""
        return token_shared_phases(lanes)

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of a phase. Raises PlanError for a pair that is in neither list."""
        shared = self.shared_phases(MAX_RUNS)
        known = (*self.phases, *shared)
        if (phase, rows) not in known:
            raise PlanError(f"{self.name} has no phase {phase!r} of {rows} rows; phases: {known}")
        tape = shared_tape(phase, rows) if (phase, rows) in shared else Tape(phase, rows)
        self._recorder(self._regions, tape).record()
        return tape
