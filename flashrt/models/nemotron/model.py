"""Nemotron-H models without experts: Mamba-2, attention or an MLP in each layer.

IS: the regions of a lane, put together with the weights and the tapes. IS NOT: config fields
(config), weight names (weights) or the launches of a tape (tapes).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from flashrt.models.decoder import Decoder
from flashrt.models.lane import Choices, lane_regions
from flashrt.models.nemotron.config import LayerKind, parse_config
from flashrt.models.nemotron.tapes import NemotronRecorder
from flashrt.models.nemotron.weights import weight_rules


def build(config: Mapping[str, object], chosen: Choices) -> Decoder:
    """See `models.model_for`; models of this family have no draft head."""
    c = parse_config(config, chosen.lacks_head)
    rows = (c.count(LayerKind.ATTENTION) * c.kv_heads, chosen.max_positions, c.head_dim)
    state = c.ssm.state(c.count(LayerKind.MAMBA))
    lane = lane_regions(c.vocab_size, c.hidden, rows, chosen.kv_dtype, state, chosen.prefill_rows)
    return Decoder("nemotron_h", weight_rules(c), lane, partial(NemotronRecorder, c), chosen)
