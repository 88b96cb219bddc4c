"""Write a trained policy as a checkpoint folder: config.json and model.safetensors.

IS: the names and layouts that flashrt loads. IS NOT the card: evaluate.py measures first, then
writes README.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from network import TIME_FREQUENCIES, Policy
from safetensors.torch import save_file
from torch import Tensor


def export(policy: Policy, folder: Path, training: dict[str, float]) -> None:
    """`training` goes into config.json under "training": how it was made."""
    shape = policy.shape
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "flashrt_policy",
        "observation_dim": shape.observation_dim,
        "action_dim": shape.action_dim,
        "encoder_dim": shape.width,
        "memory": "gru",
        "memory_dim": shape.width,
        "chunk_size": shape.chunk_size,
        "n_action_steps": shape.n_deployed_steps,
        "num_inference_steps": shape.num_inference_steps,
        "head_dim": shape.head_dim,
        "head_blocks": shape.head_blocks,
        "time_features": 2 * len(TIME_FREQUENCIES),
        "fps": shape.fps,
        "environment": shape.name,
        "training": {name: round(value, 1) for name, value in training.items()},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = folder / "model.safetensors"
    save_file(tensors(policy), weights)
    weights.chmod(0o644)


def tensors(policy: Policy) -> dict[str, Tensor]:
    """Names and arrays of the checkpoint, float32."""
    low, high = torch.tensor(policy.shape.low), torch.tensor(policy.shape.high)
    named = {
        "stats.observation.mean": policy.mean,
        "stats.observation.std": policy.std,
        "stats.action.scale": (high - low) / 2,
        "stats.action.offset": (high + low) / 2,
    }
    for name, value in policy.named_parameters():
        if name.startswith("probe."):
            continue
        named[name.removesuffix("_l0")] = value
    return {name: value.detach().contiguous().float() for name, value in named.items()}
