"""Tapes of Granite-4.0-H: a forward pass over rows of tokens, and sampling.

IS: how the family puts blocks together; formulas as in transformers' modeling_granitemoehybrid,
multipliers as `config` says. IS NOT: the blocks themselves (models/blocks), or the regions of a
lane (model). It exists because the order of launches fixes the bits of every result.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.core.region import Operand, Region
from flashrt.core.tape import Tape
from flashrt.models.blocks import TokenRecorder
from flashrt.models.granite.config import GraniteConfig, LayerKind
from flashrt.models.granite.weights import EMBED, FINAL_NORM, HEAD, layer_name
from flashrt.ops import table as ops


class GraniteRecorder(TokenRecorder):
    """Records one tape."""

    def __init__(self, config: GraniteConfig, regions: Mapping[str, Region], tape: Tape) -> None:
        super().__init__(regions, tape, config.stream_eps, config.rotation.magnitude)
        self.config = config
        self.routing = None if config.experts is None else config.experts.routing
        self.head_weight = EMBED if config.is_tied else HEAD

    def forward(self, tokens: Operand) -> Operand:
        """Rows of tokens through all layers: leaves the last hidden state, moves the cursor.

        Every row changes the last layer's state, or gets keys and values there; the rest of it is
        computed for the last row alone, or the row of each lane that shares the tape. Returns
        hidden states of those.
        """
        c, regions, cursor = self.config, self.regions, self.cursor
        x = self.scratch("x", c.hidden)
        self.launch(ops.EMBED, tokens=tokens, table=regions[EMBED], journal=regions["journal"], x=x)
        if c.embedding_factor != 1.0:
            self.launch(ops.SCALE_ROWS, x=x, factor=c.embedding_factor)
        last_row_only = self.rows > 1 and not self.is_shared
        h: Operand = self.activation(f"{layer_name(0)}.h", c.hidden)
        self.rmsnorm(x, f"{layer_name(0)}.input_norm", h)
        for i in range(len(c.layers)):
            at, is_last = layer_name(i), i + 1 == len(c.layers)
            narrows = is_last and last_row_only
            if narrows:
                x = self.last_of(x)
            r = self.mlp(at, x, self._mix(i, h, last_row_only=narrows))
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

    def _mix(self, layer: int, h: Operand, *, last_row_only: bool) -> Region:
        """The layer's attention or Mamba block. Regions of state count the layers of each kind."""
        c, regions, at = self.config, self.regions, layer_name(layer)
        kind = c.layers[layer]
        index = c.layers[:layer].count(kind)
        if kind is LayerKind.ATTENTION:
            keys, values = (
                regions[name].span(index * c.kv_heads, c.kv_heads) for name in ("keys", "values")
            )
            return self.attention(at, h, keys, values, c.query_heads, last_row_only=last_row_only)
        state, window = regions["state"].at(index), regions["window"].at(index)
        return self.ssm(
            at, h, state, window, c.groups, c.time_limits, c.eps, last_row_only=last_row_only
        )
