"""ACT policies with random weights, as LeRobot stores them: those of the golden sets, by seed.

IS: config.json files, and a directory that LeRobot loads as well as flashrt; tools/act_golden.py
and tests draw the same numbers. IS NOT: in need of flashrt, or of torch.

Values are words of Philox, whose stream numpy does not change. A resnet18 has 45 MB, so what is
recorded in tests/golden/act is names, shapes and what a policy answered.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

Values = NDArray[np.float32]
Image = NDArray[np.uint8]
_STEPS = {"policy_preprocessor": (3, "normalizer_processor"),
          "policy_postprocessor": (0, "unnormalizer_processor")}  # fmt: skip
MEAN_STD = {"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}


def act_config(
    cameras: Mapping[str, tuple[int, int]], state: int = 0, environment: int = 0, action: int = 3,
    modes: Mapping[str, str] = MEAN_STD, **fields: object,
) -> dict[str, Any]:  # fmt: skip
    """A config.json, of images of (height, width)."""
    inputs: dict[str, Any] = {}
    for name, (height, width) in cameras.items():
        inputs[f"observation.images.{name}"] = {"type": "VISUAL", "shape": [3, height, width]}
    if state:
        inputs["observation.state"] = {"type": "STATE", "shape": [state]}
    if environment:
        inputs["observation.environment_state"] = {"type": "ENV", "shape": [environment]}
    return {
        "type": "act", "n_obs_steps": 1, "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [action]}},
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


def observation_of(config: Mapping[str, Any], seed: int) -> dict[str, Values | Image]:
    """Random: images [H, W, 3] in uint8."""
    seen: dict[str, Values | Image] = {}
    for name, about in config["input_features"].items():
        if about["type"] == "VISUAL":
            _, height, width = about["shape"]
            pixels = uniform(f"pixels of {name}", (height, width, 3), seed)
            seen[name] = ((pixels + 1) * 128).astype(np.uint8)
        else:
            seen[name] = uniform(f"numbers of {name}", tuple(about["shape"]), seed) * 2
    return seen


def uniform(name: str, shape: tuple[int, ...], seed: int) -> Values:
    """float32 in [-1, 1), of 24 bits each, by name and seed alone."""
    size = int(np.prod(shape, dtype=np.int64))
    words = np.random.Philox(key=[zlib.crc32(name.encode()), seed]).random_raw(size)
    return ((words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - 1).reshape(shape)


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Values:
    """A tensor of a model by its name: such that values keep their size from layer to layer."""
    values = uniform(name, shape, seed)
    if name.endswith("running_var"):
        return np.float32(1) + values / 2
    if len(shape) == 1:
        is_gain = name.endswith("weight")  # of a norm
        return np.float32(is_gain) + values / 4
    fan_in = int(np.prod(shape[1:], dtype=np.int64))
    gain = 6.0 if "backbone" in name else 3.0  # a relu takes half of it away
    return values * np.float32(np.sqrt(gain / fan_in))


def random_statistics(feature: str, shape: tuple[int, ...], seed: int) -> dict[str, Values]:
    """All of a feature, `min` below `max` and so on."""
    middle, half = (uniform(f"{feature} {what}", shape, seed) for what in ("middle", "half"))
    half = np.float32(0.75) + half / 2
    found = {"mean": middle, "std": half, "min": middle - 2 * half, "max": middle + 2 * half}
    return found | {"q01": middle - half, "q99": middle + half}


def write_random_act(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    seed: int,
) -> Path:
    """A policy of this config.json, with tensors of these names and shapes. `folder` is made."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config, indent=1))
    weights = {name: random_tensor(name, tuple(shape), seed) for name, shape in tensors.items()}
    safetensors.numpy.save_file(weights, root / "model.safetensors")
    features = config["input_features"] | config["output_features"]
    statistics = {
        f"{feature}.{name}": values
        for feature, about in features.items()
        for name, values in random_statistics(
            feature, (3, 1, 1) if about["type"] == "VISUAL" else tuple(about["shape"]), seed
        ).items()
    }
    for title, (number, kind) in _STEPS.items():
        file = f"{title}_step_{number}_{kind}.safetensors"
        safetensors.numpy.save_file(statistics, root / file)
        settings = {
            "eps": 1e-8, "features": features, "norm_map": config["normalization_mapping"],
        }  # fmt: skip
        steps: list[dict[str, Any]] = [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            {"registry_name": "device_processor", "config": {"device": "cpu"}},
        ]
        of_actions = title == "policy_postprocessor"
        steps = steps[2:] if of_actions else steps
        steps.insert(number, {"registry_name": kind, "config": settings, "state_file": file})
        (root / f"{title}.json").write_text(json.dumps({"name": title, "steps": steps}, indent=1))
    return root
