"""Dense decoders of attention and MLP: Llama, Mistral, Qwen2, Qwen3, SmolLM3."""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.models.dense.config import MODEL_TYPES, parse_config, text_fields
from flashrt.models.dense.model import Dense
from flashrt.models.lane import Choices

__all__ = ["MODEL_TYPES", "build", "text_fields"]


def build(config: Mapping[str, object], chosen: Choices) -> Dense:
    """See `models.model_for`; models of this family have no draft head."""
    return Dense(
        parse_config(config, chosen.lacks_head, chosen.max_positions),
        max_positions=chosen.max_positions,
        kv_dtype=chosen.kv_dtype,
        stored=chosen.stored,
    )
