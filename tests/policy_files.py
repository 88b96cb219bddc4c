"""What the random policies of all families are made of: numbers by a seed, and LeRobot's files.

IS: values, observations and noise as functions of a name and a seed; config.json, tensors and both
processor files in a folder. IS NOT: a family (act_policies, smolvla_policies, pi05_policies), or in
need of flashrt or torch: tools record golden sets with it beside LeRobot.

Values are words of Philox, whose stream numpy does not change.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

Values = NDArray[np.float32]
Image = NDArray[np.uint8]
Step = tuple[str, dict[str, Any]]  # of a processor: its name in LeRobot's registry, its config
Shapes = dict[str, tuple[int, ...]]

RENAME: Step = ("rename_observations_processor", {"rename_map": {}})
TO_BATCH: Step = ("to_batch_processor", {})
DEVICE: Step = ("device_processor", {"device": "cpu"})
NORMALIZE: Step = ("normalizer_processor", {})  # its config and its statistics are written for it
_UNNORMALIZE: Step = ("unnormalizer_processor", {})


# -- numbers --------------------------------------------------------------------------------------


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


def random_observation(
    config: Mapping[str, Any], seed: int, tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """Images [H, W, 3] in uint8, vectors in float32, and one of the tasks if there are any."""
    seen: dict[str, Any] = {"task": tasks[seed % len(tasks)]} if tasks else {}
    for name, about in config["input_features"].items():
        if about["type"] == "VISUAL":
            _, height, width = about["shape"]
            pixels = uniform(f"pixels of {name}", (height, width, 3), seed)
            seen[name] = ((pixels + 1) * 128).astype(np.uint8)
        else:
            seen[name] = uniform(f"numbers of {name}", tuple(about["shape"]), seed) * 2
    return seen


def random_noise(config: Mapping[str, Any], seed: int) -> Values:
    """[chunk_size, max_action_dim], about as large as normal noise is."""
    return uniform("noise", (config["chunk_size"], config["max_action_dim"]), seed) * 2


def random_left_over(config: Mapping[str, Any], rows: int, seed: int) -> Values:
    """Rows of a chunk before, [rows, action_dim], as a model has them."""
    (action,) = config["output_features"]["action"]["shape"]
    return uniform("left over", (rows, action), seed)


# -- files ----------------------------------------------------------------------------------------


def features_of(
    cameras: Mapping[str, tuple[int, int]], action: int, state: int = 0, environment: int = 0
) -> dict[str, Any]:
    """Both lists of features of a config.json; images are of (height, width)."""
    inputs: dict[str, Any] = {
        f"observation.images.{name}": {"type": "VISUAL", "shape": [3, *size]}
        for name, size in cameras.items()
    }
    if state:
        inputs["observation.state"] = {"type": "STATE", "shape": [state]}
    if environment:
        inputs["observation.environment_state"] = {"type": "ENV", "shape": [environment]}
    outputs = {"action": {"type": "ACTION", "shape": [action]}}
    return {"input_features": inputs, "output_features": outputs}


def tower_shapes(
    tower: str, hidden: int, depth: int, intermediate: int, patch: int, places: int
) -> Shapes:
    """Of the tensors of a SigLIP tower, under the name `tower`."""
    found: Shapes = {
        f"{tower}.embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (hidden,),
        f"{tower}.embeddings.position_embedding.weight": (places, hidden),
        f"{tower}.post_layernorm.weight": (hidden,),
        f"{tower}.post_layernorm.bias": (hidden,),
    }
    parts: Shapes = dict.fromkeys(
        (f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), (hidden, hidden)
    )
    parts |= {"mlp.fc1": (intermediate, hidden), "mlp.fc2": (hidden, intermediate)}
    parts |= {"layer_norm1": (hidden,), "layer_norm2": (hidden,)}
    for i in range(depth):
        for name, shape in parts.items():
            found[f"{tower}.encoder.layers.{i}.{name}.weight"] = shape
            found[f"{tower}.encoder.layers.{i}.{name}.bias"] = shape[:1]
    return found


def tokenizer_step(most: int, padding: str, name: str) -> Step:
    """That which reads a task: `most` tokens of it, by the tokenizer of that name."""
    config = {
        "max_length": most, "task_key": "task", "padding_side": "right", "padding": padding,
        "truncation": True, "tokenizer_name": name,
    }  # fmt: skip
    return ("tokenizer_processor", config)


def write_policy(
    root: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    steps: Sequence[Step],
    seed: int,
    *,
    has_image_statistics: bool = False,
) -> Path:
    """A policy as LeRobot stores it; `root` is made. `steps`: of the preprocessor, NORMALIZE among
    them. The postprocessor's are those of every family.
    """
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config, indent=1))
    safetensors.numpy.save_file(dict(tensors), root / "model.safetensors")
    features = config["input_features"] | config["output_features"]
    statistics: dict[str, Values] = {}
    for feature, about in features.items():
        is_image = about["type"] == "VISUAL"
        if not is_image or has_image_statistics:
            shape = (3, 1, 1) if is_image else tuple(about["shape"])
            found = random_statistics(feature, shape, seed)
            statistics |= {f"{feature}.{name}": values for name, values in found.items()}
    settings = {"eps": 1e-8, "features": features, "norm_map": config["normalization_mapping"]}
    processors = {"policy_preprocessor": steps, "policy_postprocessor": (_UNNORMALIZE, DEVICE)}
    for title, listed in processors.items():
        written = []
        for i, (name, about) in enumerate(listed):
            step: dict[str, Any] = {"registry_name": name, "config": about}
            if name in (NORMALIZE[0], _UNNORMALIZE[0]):
                step |= {"config": settings, "state_file": statistics_file(title, i, name)}
                safetensors.numpy.save_file(statistics, root / step["state_file"])
            written.append(step)
        content = {"name": title, "steps": written}
        (root / f"{title}.json").write_text(json.dumps(content, indent=1))
    return root


def statistics_file(title: str, number: int, name: str) -> str:
    """Where the statistics of a processor's step are."""
    return f"{title}_step_{number}_{name}.safetensors"
