"""Decoders: an embedding, layers of a mixer and an MLP on one residual stream, a norm, a head.

IS: the model and the recorder of such a family, but for its mixers. IS NOT: config fields, weight
names or state, which each family has; nor drafting. It exists so that a family says no more than
what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flashrt.base.errors import PlanError
from flashrt.core.region import DType, Operand, Region, Role
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.models.blocks import TokenRecorder, bias_name
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
from flashrt.weights.rules import Source, WeightRule, as_stored

EMBED, HEAD, FINAL_NORM = "embed", "head", "final_norm"


def layer_name(index: int) -> str:
    """Prefix of the weight and scratch regions of a layer."""
    return f"layers.{index}"


def bias_rule(of: str, *sources: tuple[str, int]) -> WeightRule:
    """The bias of a matrix or a convolution, from (tensor name, size) pairs, stacked as its rows
    are.
    """
    size = sum(rows for _, rows in sources)
    region = Region(bias_name(of), (size,), DType.F32, Role.WEIGHT)
    return WeightRule(region, tuple(Source(name, (rows,)) for name, rows in sources))


class DecoderRecorder(TokenRecorder):
    """Records one tape. Weights of a layer: input_norm, those of its mixer, and those of `mlp`.

    A family whose layers are other than a mixer and an MLP says so in `layer`, and in `narrows_at`
    where layers without a state come last.
    """

    def __init__(
        self,
        regions: Mapping[str, Region],
        tape: Tape,
        n_layers: int,
        eps: float,
        magnitude: float = 1.0,
        embedding_factor: float = 1.0,
    ) -> None:
        """`magnitude`: of rotated heads; `embedding_factor`: of rows of the table. The head is the
        embedding where it has no region.
        """
        super().__init__(regions, tape, eps, magnitude)
        self.n_layers = n_layers
        self.embedding_factor = embedding_factor
        self.head_weight = HEAD if HEAD in regions else EMBED

    def mix(self, layer: int, h: Operand, *, last_row_only: bool) -> Region:
        """The layer's mixer of tokens, over its normalised input.

        `last_row_only`: every row changes the state, then the last valid one alone goes on.
        """
        raise NotImplementedError

    def layer(self, index: int, x: Region, h: Operand, *, last_row_only: bool) -> Region:
        """All of a layer, from the residual stream x and its norm h: what is to be added to x next;
        what came before may be added in place.
        """
        return self.mlp(layer_name(index), x, self.mix(index, h, last_row_only=last_row_only))

    def input_dtype(self, index: int) -> DType:
        """Of a layer's normalised input."""
        del index
        return DType.ACT

    @property
    def narrows_at(self) -> int:
        """The last layer with a state: from there on, one row of a prompt is enough."""
        return self.n_layers - 1

    def forward(self, tokens: Operand) -> Operand:
        """Rows of tokens through all layers: leaves the last hidden state, moves the cursor.

        Every row changes the state of the layer `narrows_at`; what follows is computed for the last
        row alone, or the row of each lane that shares the tape. Returns hidden states of those.
        """
        regions, cursor = self.regions, self.cursor
        hidden = regions[EMBED].shape[1]
        x = self.scratch("x", hidden)
        self.launch(ops.EMBED, tokens=tokens, table=regions[EMBED], journal=regions["journal"], x=x)
        if self.embedding_factor != 1.0:
            self.launch(ops.SCALE_ROWS, x=x, factor=self.embedding_factor)
        last_row_only = self.rows > 1 and not self.is_shared
        h: Operand = self.activation(f"{layer_name(0)}.h", hidden, self.input_dtype(0))
        self.rmsnorm(x, f"{layer_name(0)}.input_norm", h)
        for i in range(self.n_layers):
            narrows = last_row_only and i == self.narrows_at
            if narrows:
                x = self.last_of(x)
            r = self.layer(i, x, h, last_row_only=narrows)
            if i + 1 == self.n_layers:
                h = regions["last_hidden"] if last_row_only else self.activation("h", hidden)
                self.add_rmsnorm(x, r, FINAL_NORM, h)
            else:
                following = layer_name(i + 1)
                h = self.activation(f"{following}.h", hidden, self.input_dtype(i + 1))
                self.add_rmsnorm(x, r, f"{following}.input_norm", h)
        if not last_row_only:
            self.launch(ops.LAST_ROW, x=h, y=regions["last_hidden"])
        self.tape.record(ops.ADVANCE, cursor=cursor)
        return h


class Decoder:
    """One model at one context length. See `models.model.Model`."""

    def __init__(
        self,
        name: str,
        rules: Sequence[WeightRule],
        lane_regions: Sequence[Region],
        recorder: Callable[[Mapping[str, Region], Tape], DecoderRecorder],
        chosen: Choices,
        identity: Mapping[str, object] | None = None,
    ) -> None:
        """`recorder`: of the regions of the lane and of the weights by name, and an empty tape.
        `identity`: see Model; nothing where all of it is in tapes, regions and constants.

        Raises PlanError for a choice that no lane can have.
        """
        check_choices(chosen.max_positions, chosen.kv_dtype, chosen.prefill_rows)
        self.name = name
        self.identity: Mapping[str, object] = identity or {}
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
