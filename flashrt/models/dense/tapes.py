"""Tapes of dense decoders: a forward pass over rows of tokens, and sampling.

IS: how the family puts blocks together; formulas as in transformers' modeling_llama and its kin.
IS NOT: the blocks themselves (models/blocks), or the regions of a lane (model). It exists because
the order of launches fixes the bits of every result.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.core.region import Operand, Region
from flashrt.core.tape import Tape
from flashrt.models.blocks import TokenRecorder
from flashrt.models.dense.config import DenseConfig
from flashrt.models.dense.weights import EMBED, FINAL_NORM, HEAD, layer_name
from flashrt.ops import table as ops


class DenseRecorder(TokenRecorder):
    """Records one tape."""

    def __init__(self, config: DenseConfig, regions: Mapping[str, Region], tape: Tape) -> None:
        super().__init__(regions, tape, config.eps, config.rotation.magnitude)
        self.config = config
        self.head_weight = EMBED if config.is_tied else HEAD

    def forward(self, tokens: Operand) -> Operand:
        """Rows of tokens through all layers: leaves the last hidden state, moves the cursor.

        The last layer's keys and values are of every row; the rest of it is computed for the last
        row alone, or the row of each lane that shares the tape. Returns hidden states of those.
        """
        c, regions, cursor = self.config, self.regions, self.cursor
        x = self.scratch("x", c.hidden)
        self.launch(ops.EMBED, tokens=tokens, table=regions[EMBED], journal=regions["journal"], x=x)
        last_row_only = self.rows > 1 and not self.is_shared
        h: Operand = self.activation(f"{layer_name(0)}.h", c.hidden)
        self.rmsnorm(x, f"{layer_name(0)}.input_norm", h)
        for i, is_turned in enumerate(c.turned):
            at, is_last = layer_name(i), i + 1 == c.n_layers
            narrows = is_last and last_row_only
            keys, values = (
                regions[name].span(i * c.kv_heads, c.kv_heads) for name in ("keys", "values")
            )
            if narrows:
                x = self.last_of(x)
            mixed = self.attention(
                at, h, keys, values, c.query_heads, last_row_only=narrows, is_turned=is_turned
            )
            r = self.mlp(at, x, mixed)
            if is_last:
                h = regions["last_hidden"] if last_row_only else self.activation("h", c.hidden)
                self.add_rmsnorm(x, r, FINAL_NORM, h)
            else:
                following = layer_name(i + 1)
                h = self.activation(f"{following}.h", c.hidden)
                self.add_rmsnorm(x, r, f"{following}.input_norm", h)
        if not last_row_only:
            self.launch(ops.LAST_ROW, x=h, y=regions["last_hidden"])
        self.tape.record(ops.ADVANCE, cursor=cursor)
        return h
