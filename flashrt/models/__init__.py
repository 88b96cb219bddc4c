"""Rank 3: model families, chosen by the `model_type` of config.json; none imports a backend."""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.base.errors import CheckpointError
from flashrt.core.region import DType
from flashrt.models.model import Model
from flashrt.models.qwen35.config import MODEL_TYPES, parse_config
from flashrt.models.qwen35.model import Qwen35

__all__ = ["Model", "model_for"]


def model_for(
    config: Mapping[str, object],
    *,
    max_positions: int,
    kv_dtype: DType = DType.BF16,
    has_draft_head: bool = False,
    is_tied: bool | None = None,
) -> Model:
    """The model that a config.json describes.

    `is_tied` says whether the checkpoint lacks lm_head.weight, which decides over the config; None
    believes the config. Raises CheckpointError for an unknown architecture, or naming all that is
    wrong with the config.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise CheckpointError(
            f"config.json: model_type {model_type!r} is unknown; supported: {known}"
        )
    return Qwen35(
        parse_config(config, is_tied),
        max_positions=max_positions,
        kv_dtype=kv_dtype,
        has_draft_head=has_draft_head,
    )
