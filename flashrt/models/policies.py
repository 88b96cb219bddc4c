"""The choice of a policy's family, by its config.json.

IS: `policy_for`, and `is_policy`. IS NOT: a family, or a backend.
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.base.messages import shown
from flashrt.models.act import config as act_config
from flashrt.models.act.model import Act
from flashrt.models.act.weights import scaling_of
from flashrt.models.actions import ActionModel
from flashrt.models.flow_policy.config import MODEL_TYPE, config_of
from flashrt.models.flow_policy.model import FlowPolicy
from flashrt.models.pi05 import config as pi05_config
from flashrt.models.pi05.model import pi05_of
from flashrt.models.smolvla import config as smolvla_config
from flashrt.models.smolvla.model import smolvla_of
from flashrt.weights.checkpoint import Checkpoint


def is_policy(config: Mapping[str, object]) -> bool:
    """Whether a config.json is a robot policy's, of a family that runs or not: flashrt's own, or
    one as LeRobot stores them.
    """
    is_lerobots = "model_type" not in config and isinstance(config.get("type"), str)
    return is_lerobots or config.get("model_type") == MODEL_TYPE


def policy_for(
    checkpoint: Checkpoint, weights: str | None = None
) -> tuple[ActionModel, Checkpoint]:
    """The model of a policy's checkpoint, and the checkpoint as its weight rules name it.
    `weights`: what its matrices are quantised to, for families that can have it.

    Raises CheckpointError for another model, or naming all that is wrong with the config; PlanError
    for a family whose matrices are float32.
    """
    config = checkpoint.config
    if config.get("type") == pi05_config.TYPE and "model_type" not in config:
        return pi05_of(checkpoint, weights)
    if config.get("type") == smolvla_config.TYPE and "model_type" not in config:
        return smolvla_of(checkpoint, weights)
    if weights is not None:
        raise PlanError(
            f"{checkpoint.path}: weights={shown(weights)} is for policies of type "
            f"{smolvla_config.TYPE} and {pi05_config.TYPE}; load this one without it"
        )
    if "model_type" in config or config.get("type") != act_config.TYPE:
        return FlowPolicy(config_of(checkpoint)), checkpoint
    try:
        sizes = act_config.parse_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    model = Act(sizes, scaling_of(checkpoint, sizes))
    return model, model.filled.read_from(checkpoint)
