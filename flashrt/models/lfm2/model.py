"""LFM2 and LFM2.5 models: gated short convolutions with attention among them.

IS: the regions of a lane, put together with the weights and the tapes. IS NOT: config fields
(config), weight names (weights) or the launches of a tape (tapes).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from flashrt.core.region import DType, Region, Role
from flashrt.models.decoder import Decoder
from flashrt.models.lane import Choices, lane_regions
from flashrt.models.lfm2.config import Lfm2Config, parse_config
from flashrt.models.lfm2.tapes import Lfm2Recorder
from flashrt.models.lfm2.weights import weight_rules


def build(config: Mapping[str, object], chosen: Choices) -> Decoder:
    """See `models.model_for`; models of this family have no draft head."""
    c = parse_config(config, chosen.lacks_head, chosen.max_positions)
    rows = (c.n_full * c.kv_heads, chosen.max_positions, c.head_dim)
    lane = lane_regions(
        c.vocab_size, c.hidden, rows, chosen.kv_dtype, _windows(c), chosen.prefill_rows
    )
    return Decoder("lfm2", weight_rules(c), lane, partial(Lfm2Recorder, c), chosen)


def _windows(c: Lfm2Config) -> list[Region]:
    """The last rows of b * x of every convolution: all of its state."""
    if not c.n_conv:
        return []
    shape = (c.n_conv, c.conv_taps - 1, c.hidden)
    return [Region("window", shape, DType.F32, Role.FIXED, is_digested=True)]
