"""Tapes of LFM2: which mixer a layer has.

IS: the mixers of the family; formulas as in transformers' modeling_lfm2 (Lfm2ShortConv,
Lfm2Attention). IS NOT: the order of layers (models/decoder), the blocks themselves (models/blocks),
or the regions of a lane (model).
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.core.region import Operand, Region
from flashrt.core.tape import Tape
from flashrt.models.decoder import DecoderRecorder, layer_name
from flashrt.models.lfm2.config import LayerKind, Lfm2Config


class Lfm2Recorder(DecoderRecorder):
    """Records one tape."""

    def __init__(self, config: Lfm2Config, regions: Mapping[str, Region], tape: Tape) -> None:
        n_layers = len(config.layers)
        super().__init__(regions, tape, n_layers, config.eps, config.rotation.magnitude)
        self.config = config
        self.routing = None if config.experts is None else config.experts.routing

    def mix(self, layer: int, h: Operand, *, last_row_only: bool) -> Region:
        """Attention or a gated convolution. Regions of state count the layers of each kind."""
        c, regions, at = self.config, self.regions, layer_name(layer)
        kind = c.layers[layer]
        index = c.layers[:layer].count(kind)
        if kind is LayerKind.CONV:
            window = regions["window"].at(index)
            return self.gated_conv(at, h, window, last_row_only=last_row_only)
        keys, values = (
            regions[name].span(index * c.kv_heads, c.kv_heads) for name in ("keys", "values")
        )
        return self.attention(at, h, keys, values, c.query_heads, last_row_only=last_row_only)
