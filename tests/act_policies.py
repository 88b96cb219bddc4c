"""ACT policies with random weights, as LeRobot stores them: those of the golden sets, by seed.

IS: config.json files, and a directory that LeRobot loads as well as flashrt; tools/act_golden.py
and tests draw the same numbers. IS NOT: in need of flashrt, or of torch.

A resnet18 has 45 MB, so what is recorded in tests/golden/act is names, shapes and what a policy
answered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.policy_files import (
    DEVICE,
    NORMALIZE,
    RENAME,
    TO_BATCH,
    features_of,
    random_observation,
    random_tensor,
    write_policy,
)

_GOLDEN = Path(__file__).parent / "golden" / "act"
MEAN_STD = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}


def act_config(
    cameras: Mapping[str, tuple[int, int]], state: int = 0, environment: int = 0, action: int = 3,
    modes: Mapping[str, str] = MEAN_STD, **fields: object,
) -> dict[str, Any]:  # fmt: skip
    """A config.json, of images of (height, width)."""
    return {
        "type": "act", "n_obs_steps": 1, **features_of(cameras, action, state, environment),
        "normalization_mapping": dict(modes), "device": "cpu", "vision_backbone": "resnet18",
        "pretrained_backbone_weights": None, "replace_final_stride_with_dilation": False,
        "feedforward_activation": "relu", "pre_norm": False, "n_encoder_layers": 2,
        "n_decoder_layers": 1, "use_vae": True, "latent_dim": 8, "n_vae_encoder_layers": 1,
        "temporal_ensemble_coeff": None, **fields,
    }  # fmt: skip


# Of each: its config and a seed. `plain` is what people train, but small.
SETS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": (
        act_config({"top": (64, 64)}, state=7, action=7, chunk_size=20, n_action_steps=10,
                   dim_model=32, n_heads=4, dim_feedforward=48),
        1,
    ),
    "two-cameras": (  # of one size, then a third of another; sizes that no stride divides
        act_config({"left": (33, 47), "right": (33, 47), "wrist": (40, 31)}, state=5, action=3,
                   modes={"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
                   chunk_size=7, n_action_steps=7, dim_model=36, n_heads=3, dim_feedforward=41,
                   n_decoder_layers=2, latent_dim=5),
        2,
    ),
    "pre-norm": (
        act_config({"top": (32, 32)}, environment=4, action=2, pre_norm=True, use_vae=False,
                   modes={"VISUAL": "MEAN_STD", "ENV": "QUANTILES", "ACTION": "QUANTILES"},
                   chunk_size=9, n_action_steps=4, dim_model=24, n_heads=2, dim_feedforward=30,
                   n_decoder_layers=2),
        3,
    ),
    "ensemble": (
        act_config({}, state=3, environment=5, action=2, chunk_size=6, n_action_steps=1,
                   temporal_ensemble_coeff=0.3, dim_model=16, n_heads=2, dim_feedforward=20,
                   n_encoder_layers=1),
        5,
    ),
    "no-camera": (  # small enough for everything else that is tested
        act_config({}, state=6, environment=3, action=2, chunk_size=8, n_action_steps=4,
                   dim_model=16, n_heads=2, dim_feedforward=20, n_encoder_layers=1),
        4,
    ),
}  # fmt: skip


def observation_of(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Random: images [H, W, 3] in uint8."""
    return random_observation(config, seed)


def tensors_of(name: str) -> dict[str, list[int]]:
    """Names and shapes of a set's weights, as they were recorded from LeRobot."""
    recorded = json.loads((_GOLDEN / f"{name}.json").read_text())
    found: dict[str, list[int]] = recorded["tensors"]
    return found


def write_set(name: str, folder: str | os.PathLike[str]) -> Path:
    """The policy of a set; `folder` is made."""
    config, seed = SETS[name]
    return write_random_act(folder, config, tensors_of(name), seed)


def write_random_act(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    seed: int,
) -> Path:
    """A policy of this config.json, with tensors of these names and shapes. `folder` is made."""
    weights = {name: random_tensor(name, tuple(shape), seed) for name, shape in tensors.items()}
    steps = (RENAME, TO_BATCH, DEVICE, NORMALIZE)
    return write_policy(Path(folder), config, weights, steps, seed, has_image_statistics=True)
