"""Granite-4.0-H: layers of Mamba-2 with attention among them, each with an MLP, or experts too.

IS: the regions of a lane, put together with the weights and the tapes. IS NOT: config fields
(config), weight names (weights) or the launches of a tape (tapes).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from flashrt.models.decoder import Decoder
from flashrt.models.granite.config import LayerKind, parse_config
from flashrt.models.granite.tapes import GraniteRecorder
from flashrt.models.granite.weights import weight_rules
from flashrt.models.lane import Choices, lane_regions


def build(config: Mapping[str, object], chosen: Choices) -> Decoder:
    """See `models.model_for`; models of this family have no draft head."""
    c = parse_config(config, chosen.lacks_head, chosen.max_positions)
    rows = (c.count(LayerKind.ATTENTION) * c.kv_heads, chosen.max_positions, c.head_dim)
    state = c.ssm.state(c.count(LayerKind.MAMBA))
    lane = lane_regions(c.vocab_size, c.hidden, rows, chosen.kv_dtype, state, chosen.prefill_rows)
    # the weights of the last norm hold it, and shapes do not show it
    identity = {"logits_scaling": c.logits_scaling}
    return Decoder(
        "granitemoehybrid", weight_rules(c), lane, partial(GraniteRecorder, c), chosen, identity
    )
