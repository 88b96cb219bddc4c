"""Rank 3: model families, chosen by the `model_type` of config.json; none imports a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.core.region import DType
from flashrt.models.dense import config as dense_config
from flashrt.models.dense import model as dense
from flashrt.models.granite import config as granite_config
from flashrt.models.granite import model as granite
from flashrt.models.lane import Choices, check_choices
from flashrt.models.lfm2 import config as lfm2_config
from flashrt.models.lfm2 import model as lfm2
from flashrt.models.model import USUAL_PREFILL_ROWS, Model, TokenModel
from flashrt.models.nemotron import config as nemotron_config
from flashrt.models.nemotron import model as nemotron
from flashrt.models.policies import is_policy
from flashrt.models.qwen35 import config as qwen35_config
from flashrt.models.qwen35 import model as qwen35
from flashrt.models.rope import reach
from flashrt.weights.rules import Source, Stored, in_bfloat16

__all__ = ["Model", "TokenModel", "model_for", "notes_on", "promises_draft_head"]


@dataclass(frozen=True, slots=True)
class _Family:
    """What is asked of a family before there is a model."""

    build: Callable[[Mapping[str, object], Choices], TokenModel]
    text_fields: Callable[[Mapping[str, object]], Mapping[str, object]]
    has_draft_head: bool  # whether models of the family may have one
    has_images: bool = False  # whether they may see


_QWEN35 = _Family(qwen35.build, qwen35_config.text_fields, has_draft_head=True, has_images=True)
_DENSE = _Family(dense.build, dense_config.text_fields, has_draft_head=False)
_LFM2 = _Family(lfm2.build, lfm2_config.text_fields, has_draft_head=False)
_GRANITE = _Family(granite.build, granite_config.text_fields, has_draft_head=False)
_NEMOTRON = _Family(nemotron.build, nemotron_config.text_fields, has_draft_head=False)
_FAMILIES: Mapping[object, _Family] = {
    **dict.fromkeys(qwen35_config.MODEL_TYPES, _QWEN35),
    **dict.fromkeys(dense_config.MODEL_TYPES, _DENSE),
    **dict.fromkeys(granite_config.MODEL_TYPES, _GRANITE),
    **dict.fromkeys(lfm2_config.MODEL_TYPES, _LFM2),
    **dict.fromkeys(nemotron_config.MODEL_TYPES, _NEMOTRON),
}


def model_for(
    config: Mapping[str, object],
    *,
    max_positions: int,
    kv_dtype: DType = DType.BF16,
    has_draft_head: bool = False,
    is_tied: bool | None = None,
    stored: Callable[[Source], Stored] = in_bfloat16,
    prefill_rows: int = USUAL_PREFILL_ROWS,
    has_images: bool = False,
) -> TokenModel:
    """The model that a config.json describes.

    `is_tied` says whether the checkpoint lacks lm_head.weight, which a config that ties the head
    must explain; None believes the config. `stored` says how it has each matrix. `prefill_rows`: of
    the largest launch of a prompt, one of PREFILL_ROWS; see `engine.buckets`. `has_images`: rows of
    a prompt may be those of images. Raises
    CheckpointError for an unknown architecture, or naming all that is wrong with the config;
    PlanError for a wrong `max_positions`, `kv_dtype` or `prefill_rows`.
    """
    model_type = config.get("model_type")
    if is_policy(config):
        raise CheckpointError("config.json is a robot policy's: load it with flashrt.load_policy")
    family = _family(config)
    if family is None:
        raise CheckpointError(
            f"config.json: model_type {shown(model_type)} is unknown; supported: "
            f"{', '.join(map(str, _FAMILIES))}"
        )
    if has_draft_head and not family.has_draft_head:
        raise CheckpointError(
            f"config.json: models of model_type {shown(model_type)} have no draft head; load "
            "without: draft=False, or --no-draft on the command line"
        )
    if has_images and not family.has_images:
        raise CheckpointError(
            f"config.json: models of model_type {shown(model_type)} see no images; load without "
            "images=True"
        )
    check_choices(max_positions, kv_dtype, prefill_rows)
    chosen = Choices(
        max_positions, kv_dtype, has_draft_head, is_tied, stored, prefill_rows, has_images
    )
    return family.build(config, chosen)


def promises_draft_head(config: Mapping[str, object]) -> bool:
    """Whether a config names a draft head; where there are weights, they decide."""
    family = _family(config)
    if family is None or not family.has_draft_head:
        return False
    return family.text_fields(config).get("mtp_num_hidden_layers") not in (None, 0)


def notes_on(config: Mapping[str, object], max_positions: int) -> tuple[str, ...]:
    """What a user should know before relying on a model at this context length."""
    family = _family(config)
    trained = reach(family.text_fields(config)) if family else None
    if trained is None or max_positions <= trained:
        return ()
    return (
        f"max_positions is {max_positions:,}, beyond the {trained:,} of max_position_embeddings: "
        "the model was not made for positions after that, and its text may turn into noise",
    )


def _family(config: Mapping[str, object]) -> _Family | None:
    model_type = config.get("model_type")
    return _FAMILIES.get(model_type) if isinstance(model_type, str) else None
