"""Rank 3: model families, chosen by the `model_type` of config.json; none imports a backend."""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.core.region import DType
from flashrt.models.flow_policy.config import MODEL_TYPE as POLICY_MODEL_TYPE
from flashrt.models.model import Model, TokenModel
from flashrt.models.qwen35.config import MODEL_TYPES, parse_config, text_fields
from flashrt.models.qwen35.model import Qwen35

__all__ = ["Model", "TokenModel", "model_for", "notes_on", "promises_draft_head"]


def model_for(
    config: Mapping[str, object],
    *,
    max_positions: int,
    kv_dtype: DType = DType.BF16,
    has_draft_head: bool = False,
    is_tied: bool | None = None,
) -> TokenModel:
    """The model that a config.json describes.

    `is_tied` says whether the checkpoint lacks lm_head.weight, which a config that ties the head
    must explain; None believes the config. Raises CheckpointError for an unknown architecture, or
    naming all that is wrong with the config.
    """
    model_type = config.get("model_type")
    if model_type == POLICY_MODEL_TYPE:
        raise CheckpointError("config.json is a robot policy's: load it with flashrt.load_policy")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: model_type {shown(model_type)} is unknown; supported: "
            f"{', '.join(MODEL_TYPES)}"
        )
    return Qwen35(
        parse_config(config, is_tied, has_draft_head),
        max_positions=max_positions,
        kv_dtype=kv_dtype,
        has_draft_head=has_draft_head,
    )


def promises_draft_head(config: Mapping[str, object]) -> bool:
    """Whether a config names a draft head; where there are weights, they decide."""
    return text_fields(config).get("mtp_num_hidden_layers") not in (None, 0)


def notes_on(config: Mapping[str, object], max_positions: int) -> tuple[str, ...]:
    """What a user should know before relying on a model at this context length."""
    trained = text_fields(config).get("max_position_embeddings")
    if not isinstance(trained, int) or max_positions <= trained:
        return ()
    return (
        f"max_positions is {max_positions:,}, beyond the {trained:,} of max_position_embeddings: "
        "the model was not made for positions after that, and its text may turn into noise",
    )
