"""Tapes of Nemotron-H: what a layer is.

IS: the blocks of the family; formulas as in transformers' modeling_nemotron_h. IS NOT: the order of
layers (models/decoder), the blocks themselves (models/blocks), or the regions of a lane (model).
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.core.region import DType, Operand, Region
from flashrt.core.tape import Tape
from flashrt.models.decoder import DecoderRecorder, layer_name
from flashrt.models.nemotron.config import LayerKind, NemotronConfig


class NemotronRecorder(DecoderRecorder):
    """Records one tape. A layer is one block behind one norm."""

    def __init__(self, config: NemotronConfig, regions: Mapping[str, Region], tape: Tape) -> None:
        super().__init__(regions, tape, len(config.layers), config.eps)
        self.config = config

    def layer(self, index: int, x: Region, h: Operand, *, last_row_only: bool) -> Region:
        """Its one block."""
        del x
        if self.config.layers[index] is LayerKind.MLP:
            return self.squared_mlp(layer_name(index), h)
        return self.mix(index, h, last_row_only=last_row_only)

    def input_dtype(self, index: int) -> DType:
        """Of Mamba layers wide (see `ssm`), and of MLPs, as in every family."""
        return DType.ACT if self.config.layers[index] is LayerKind.ATTENTION else DType.ACT_WIDE

    @property
    def narrows_at(self) -> int:
        """The last layer that is no MLP."""
        return max(i for i, kind in enumerate(self.config.layers) if kind is not LayerKind.MLP)

    def mix(self, layer: int, h: Operand, *, last_row_only: bool) -> Region:
        """Attention without positions, or Mamba-2. Regions of state count layers of a kind."""
        c, regions, at = self.config, self.regions, layer_name(layer)
        kind = c.layers[layer]
        index = c.layers[:layer].count(kind)
        if kind is LayerKind.ATTENTION:
            keys, values = (
                regions[name].span(index * c.kv_heads, c.kv_heads) for name in ("keys", "values")
            )
            return self.attention(
                at, h, keys, values, c.query_heads, last_row_only=last_row_only, is_turned=False
            )
        state, window = regions["state"].at(index), regions["window"].at(index)
        return self.ssm(
            at, h, state, window, c.ssm.groups, c.ssm.time_limits, c.eps,
            last_row_only=last_row_only,
        )  # fmt: skip
