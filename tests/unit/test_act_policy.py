"""ACT: what its files have beside what every family's have, see test_policy_families."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.numpy

import flashrt
from flashrt.base.errors import CheckpointError
from flashrt.models.act.config import parse_config
from flashrt.models.act.weights import scaling_of
from flashrt.weights.checkpoint import open_checkpoint
from tests.act_policies import act_config
from tests.policy_families import ACT, FAMILIES


def test_every_problem_of_a_config_is_named() -> None:
    config = act_config(
        {"top": (64, 64)}, state=3, dim_model=30, n_heads=4, n_action_steps=9,
        feedforward_activation="gelu", vision_backbone="resnet50", temporal_ensemble_coeff=0.01,
        replace_final_stride_with_dilation=True, pre_norm="no",
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        parse_config(config)
    for said in (
        "no multiple of n_heads 4", "n_action_steps is 9: with temporal_ensemble_coeff it is 1",
        "feedforward_activation is 'gelu'", "replace_final_stride_with_dilation is True",
        "vision_backbone is 'resnet50'; supported: resnet18, resnet34", "pre_norm is 'no'",
    ):  # fmt: skip
        assert said in str(caught.value), said
    sizes = act_config({"top": (64, 64)}, state=3, dim_model=30, n_heads=3)
    with pytest.raises(CheckpointError, match="dim_model 30 is no multiple of 4, as images need"):
        parse_config(sizes)
    with pytest.raises(CheckpointError, match=r"need an image, or observation\.environment_state"):
        parse_config(act_config({}, state=3))


def test_features_without_statistics_stay_as_they_are(tmp_path: Path) -> None:
    """As LeRobot has it; red where statistics are asked for that nobody computed."""
    folder = FAMILIES[ACT].write(tmp_path)
    statistics = folder / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    tensors = safetensors.numpy.load_file(statistics)
    rest = {n: v for n, v in tensors.items() if not n.startswith("observation.state.")}
    safetensors.numpy.save_file(rest, statistics)
    source = open_checkpoint(folder)
    scaling = scaling_of(source, parse_config(source.config))
    assert str(scaling.modes["observation.state"]) == "IDENTITY"
    flashrt.load_policy(folder, device="cpu").close()
