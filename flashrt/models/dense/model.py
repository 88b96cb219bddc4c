"""Dense decoders: Llama, Mistral, Qwen2, Qwen3, SmolLM3; every layer attention and MLP.

IS: the regions of a lane, put together with the weights and the tapes. IS NOT: config fields
(config), weight names (weights) or the launches of a tape (tapes).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from flashrt.models.decoder import Decoder
from flashrt.models.dense.config import parse_config
from flashrt.models.dense.tapes import DenseRecorder
from flashrt.models.dense.weights import weight_rules
from flashrt.models.lane import Choices, lane_regions


def build(config: Mapping[str, object], chosen: Choices) -> Decoder:
    """See `models.model_for`; models of this family have no draft head."""
    c = parse_config(config, chosen.lacks_head, chosen.max_positions)
    rows = (c.n_layers * c.kv_heads, chosen.max_positions, c.head_dim)
    lane = lane_regions(
        c.vocab_size, c.hidden, rows, chosen.kv_dtype, prefill_rows=chosen.prefill_rows
    )
    return Decoder(c.model_type, weight_rules(c), lane, partial(DenseRecorder, c), chosen)
