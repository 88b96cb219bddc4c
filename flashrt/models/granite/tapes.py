"""Tapes of Granite-4.0-H: which mixer a layer has.

IS: the mixers of the family; formulas as in transformers' modeling_granitemoehybrid, multipliers as
`config` says. IS NOT: the order of layers (models/decoder), the blocks themselves (models/blocks),
or the regions of a lane (model).
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.core.region import DType, Operand, Region
from flashrt.core.tape import Tape
from flashrt.models.decoder import DecoderRecorder, layer_name
from flashrt.models.granite.config import GraniteConfig, LayerKind


class GraniteRecorder(DecoderRecorder):
    """Records one tape."""

    def __init__(self, config: GraniteConfig, regions: Mapping[str, Region], tape: Tape) -> None:
        c = config
        super().__init__(
            regions, tape, len(c.layers), c.stream_eps, c.rotation.magnitude, c.embedding_factor
        )
        self.config = config
        self.routing = None if c.experts is None else c.experts.routing

    def input_dtype(self, index: int) -> DType:
        """Of Mamba layers wide: see `ssm`. In bfloat16, logits were off by 3 % of their rms."""
        return DType.ACT if self.config.layers[index] is LayerKind.ATTENTION else DType.ACT_WIDE

    def mix(self, layer: int, h: Operand, *, last_row_only: bool) -> Region:
        """Attention or Mamba-2. Regions of state count the layers of each kind."""
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
            at, h, state, window, c.ssm.groups, c.ssm.time_limits, c.eps,
            last_row_only=last_row_only,
        )  # fmt: skip
