"""Tapes of dense decoders: which attention a layer has.

IS: the mixer of the family; formulas as in transformers' modeling_llama and its kin. IS NOT: the
order of layers (models/decoder), the blocks themselves (models/blocks), or the regions of a lane
(model).
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.core.region import Operand, Region
from flashrt.core.tape import Tape
from flashrt.models.decoder import DecoderRecorder, layer_name
from flashrt.models.dense.config import DenseConfig


class DenseRecorder(DecoderRecorder):
    """Records one tape."""

    def __init__(self, config: DenseConfig, regions: Mapping[str, Region], tape: Tape) -> None:
        super().__init__(regions, tape, config.n_layers, config.eps, config.rotation.magnitude)
        self.config = config

    def mix(self, layer: int, h: Operand, *, last_row_only: bool) -> Region:
        """Attention, in some layers without rotary positions."""
        c = self.config
        keys, values = (
            self.regions[name].span(layer * c.kv_heads, c.kv_heads) for name in ("keys", "values")
        )
        return self.attention(
            layer_name(layer), h, keys, values, c.query_heads, last_row_only=last_row_only,
            is_turned=c.turned[layer],
        )  # fmt: skip
