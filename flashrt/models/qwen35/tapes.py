"""Tapes of Qwen3.5: a forward pass over rows of tokens, and sampling.

IS: how the family puts blocks together; formulas as in transformers' modeling_qwen3_5. IS NOT:
the blocks themselves (models/blocks), the regions of a lane (model), or drafting and verifying
(draft). It exists because the order of launches fixes the bits of every result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flashrt.core.region import DType, Operand, Region, as_view
from flashrt.core.tape import Tape
from flashrt.models.blocks import DeltaInputs, TokenRecorder
from flashrt.models.model import PREFILL, STEP
from flashrt.models.qwen35.config import LayerKind, Qwen35Config
from flashrt.models.qwen35.weights import DRAFT_HEAD, EMBED, FINAL_NORM, HEAD, layer_name
from flashrt.models.sight import DELTA, GROWTH, OFFSETS, SEEN
from flashrt.ops import table as ops

DRAFT_SHIFT = 1  # a row of the draft head belongs to the position before it


class Qwen35Recorder(TokenRecorder):
    """Records one tape.

    `kept` makes every delta rule leave its state alone (see `BlockRecorder.delta_rule`): it gives
    the regions for the linear layer of an index, counted among linear layers.
    """

    def __init__(
        self,
        config: Qwen35Config,
        regions: Mapping[str, Region],
        tape: Tape,
        kept: Callable[[int], DeltaInputs] | None = None,
    ) -> None:
        super().__init__(regions, tape, config.eps, config.rotation.magnitude)
        self.config = config
        self.routing = None if config.experts is None else config.experts.routing
        self.has_draft_head = f"{DRAFT_HEAD}.fc" in regions
        self.sections = config.sections
        self.head_weight = EMBED if config.is_tied else HEAD
        self._kept = kept

    def forward(self, tokens: Operand) -> Operand:
        """Rows of tokens through all layers: leaves the last hidden state, moves the cursor.

        Every row needs the state that the last layer leaves. The rest of that layer is computed for
        the last row alone, unless a draft head needs all hidden states, or lanes share the tape.
        Returns the hidden states that were computed.
        """
        last, cursor = self.regions["last_hidden"], self.cursor
        h: Operand = last
        if self.rows == 1 or self.has_draft_head or self.is_shared:
            h = self.activation("h", self.config.hidden)
            self.layers(tokens, h)
            self.launch(ops.LAST_ROW, x=h, y=last)
        else:
            self.layers(tokens, last, last_row_only=True)
        self.tape.record(ops.ADVANCE, cursor=cursor)
        return h

    def layers(self, tokens: Operand, out: Operand, *, last_row_only: bool = False) -> None:
        """Rows of tokens through all layers and the final norm, into `out`; and the draft head's
        rows for them, if there is one. `last_row_only`: `out` gets the last row only.
        """
        c, regions = self.config, self.regions
        x = self.scratch("x", c.hidden)
        self._embed(tokens, x)
        h: Operand = self.activation(f"{layer_name(0)}.h", c.hidden, input_dtype(c, 0))
        self.rmsnorm(x, f"{layer_name(0)}.input_norm", h)
        for i in range(len(c.layers)):
            at, is_last = layer_name(i), i + 1 == len(c.layers)
            narrows = is_last and last_row_only
            if narrows:
                x = self.last_of(x)
            r = self.mlp(at, x, self._mix(i, h, last_row_only=narrows))
            if is_last:
                h = out
                self.add_rmsnorm(x, r, FINAL_NORM, h)
            else:
                following = layer_name(i + 1)
                h = self.activation(f"{following}.h", c.hidden, input_dtype(c, i + 1))
                self.add_rmsnorm(x, r, f"{following}.input_norm", h)
        if self.has_draft_head:
            self.draft_keys(tokens, hidden=h, last=regions["last_hidden"])

    def _embed(self, tokens: Operand, x: Region) -> None:
        """Rows of the table, and where there may be images, theirs among them, and the places of
        all. A row that was sampled is no image's.
        """
        regions = self.regions
        into = {"tokens": tokens, "table": regions[EMBED], "journal": regions["journal"], "x": x}
        if SEEN not in regions:
            self.launch(ops.EMBED, **into)
            return
        self.place_rows()
        if self.is_prompt:
            self.launch(ops.EMBED_SEEN, seen=regions[SEEN].span(0, self.tape.run_rows), **into)
        else:
            self.launch(ops.EMBED, **into)

    @property
    def is_prompt(self) -> bool:
        """Whether rows may be those of images, where there may be images."""
        return self.tape.phase in (PREFILL, STEP)

    def place_rows(self) -> None:
        """The places of all rows, where there may be images."""
        regions = self.regions
        if SEEN not in regions:
            return
        self.places = self.tape.scratch("places", self.rows, 3, dtype=DType.I32)
        self.launch(
            ops.PLACE_ROWS, offsets=regions[OFFSETS].span(0, self.tape.run_rows),
            growth=regions[GROWTH], delta=regions[DELTA], places=self.places,
            given=int(self.is_prompt),
        )  # fmt: skip

    def draft_keys(
        self, tokens: Operand, hidden: Operand, last: Operand
    ) -> tuple[Region, Region | None, Region]:
        """The draft head's input, its projections and its queries; new rows of its keys and values.

        Row r holds what the model's authors call slot r - 1: the token at r and the hidden state
        at r - 1, turned by the angle of r - 1. Row 0 has no hidden state before it; it is written
        like any other (from zeros) but never attended to. So rows go with positions. Where there
        may be images, a row turns by its place - 1: at text that is the place of the row before.
        """
        c, weights, at = self.config, self.regions, f"{DRAFT_HEAD}.layer"
        y = self.activation(f"{DRAFT_HEAD}.input", 2 * c.hidden)
        seen: dict[str, Operand] = {}
        if SEEN in weights and self.is_prompt:
            seen = {"seen": weights[SEEN].span(0, self.tape.run_rows)}
        self.launch(
            ops.DRAFT_INPUT_SEEN if seen else ops.DRAFT_INPUT, tokens=tokens, table=weights[EMBED],
            hidden=hidden, last=last, w_token=weights[f"{DRAFT_HEAD}.embedding_norm"],
            w_hidden=weights[f"{DRAFT_HEAD}.hidden_norm"], y=y, eps=c.eps, **seen,
        )  # fmt: skip
        x = self.linear(f"{DRAFT_HEAD}.x", y, f"{DRAFT_HEAD}.fc")
        h = self.activation(f"{at}.h", c.hidden)
        self.rmsnorm(x, f"{at}.input_norm", h)
        keys, values = as_view(weights["draft_keys"]), as_view(weights["draft_values"])
        u, q = self.append_keys(at, h, keys, values, c.query_heads, DRAFT_SHIFT)
        return x, u, q

    def _mix(self, layer: int, h: Operand, *, last_row_only: bool) -> Region:
        """The layer's attention or delta rule. Regions of state count the layers of each kind."""
        c, regions, at = self.config, self.regions, layer_name(layer)
        kind = c.layers[layer]
        index = c.layers[:layer].count(kind)
        if kind is LayerKind.FULL:
            keys, values = (
                regions[name].span(index * c.kv_heads, c.kv_heads) for name in ("keys", "values")
            )
            return self.attention(at, h, keys, values, c.query_heads, last_row_only=last_row_only)
        state, window = regions["state"].at(index), regions["window"].at(index)
        kept = self._kept(index) if self._kept else None
        return self.delta_rule(
            at, h, state, window, c.key_heads, kept=kept, last_row_only=last_row_only
        )


def input_dtype(c: Qwen35Config, layer: int) -> DType:
    """Of a layer's normalised input; the MLP's and what the delta rule gives are wide throughout.

    A delta rule with few tokens behind it writes o = beta v (k . q), where k . q may cancel, and
    the norm that follows amplifies what is left: 0.2 % of error in the inputs of these layers has
    become 14 % of the logits. So what is rounded on its way there makes most of a model's error:
    the input itself, and what these layers and the MLPs add to the residual stream. Attention, in
    one layer of four, and the head take bfloat16; that moves logits by 0.2 to 0.5 % of their rms.
    """
    return DType.ACT_WIDE if c.layers[layer] is LayerKind.LINEAR else DType.ACT
