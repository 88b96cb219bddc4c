"""Qwen3.5 dense text models: Gated DeltaNet layers with full attention among them."""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.models.lane import Choices
from flashrt.models.qwen35.config import MODEL_TYPES, parse_config, text_fields
from flashrt.models.qwen35.model import Qwen35

__all__ = ["MODEL_TYPES", "build", "text_fields"]


def build(config: Mapping[str, object], chosen: Choices) -> Qwen35:
    """See `models.model_for`."""
    return Qwen35(
        parse_config(config, chosen.lacks_head, chosen.has_draft_head, chosen.max_positions),
        max_positions=chosen.max_positions,
        kv_dtype=chosen.kv_dtype,
        has_draft_head=chosen.has_draft_head,
        stored=chosen.stored,
    )
