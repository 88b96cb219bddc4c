"""Random policy checkpoints: for tests, benchmarks and demonstrations without training.

IS: config.json and model.safetensors of a robot policy, the same bytes for the same seed, scaled so
that every layer hands on O(1). IS NOT: a trained policy, or knowledge that the loader uses.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.weights.folder import CONFIG_FILE, WEIGHTS_FILE

# observation, action, encoder, memory, chunk, executed, Euler steps, head, blocks
SHAPES: Mapping[str, tuple[int, ...]] = {
    "tiny": (5, 2, 32, 32, 8, 4, 3, 32, 1),
    "small": (12, 4, 128, 128, 16, 8, 8, 128, 2),
    "base": (32, 8, 256, 256, 16, 8, 10, 256, 3),
}
_SIZES = (
    "observation_dim", "action_dim", "encoder_dim", "memory_dim", "chunk_size", "n_action_steps",
    "num_inference_steps", "head_dim", "head_blocks",
)  # fmt: skip
FPS = 50.0


def write_random_policy(path: str | Path, shape: str = "tiny", *, seed: int = 0) -> Path:
    """Write a checkpoint directory; it appears under its name when it is whole. Returns its path.

    Raises CheckpointError if the path is taken, the shape is unknown or the disk refuses.
    """
    target, config = Path(path), policy_config(shape)
    if target.exists():
        raise CheckpointError(f"{target}: already exists; remove it or give another path")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        safetensors.numpy.save_file(random_tensors(config, seed), partial / WEIGHTS_FILE)
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def policy_config(shape: str) -> dict[str, object]:
    """The config.json of a shape. Raises CheckpointError if it is unknown."""
    if shape not in SHAPES:
        raise CheckpointError(f"unknown shape {shape!r}; shapes: {', '.join(SHAPES)}")
    sizes = dict(zip(_SIZES, SHAPES[shape], strict=True))
    return {
        "model_type": "flashrt_policy",
        **sizes,
        "memory": "gru",
        "time_features": 8,
        "fps": FPS,
    }


def random_tensors(config: Mapping[str, object], seed: int) -> dict[str, NDArray[np.float32]]:
    """All tensors of a policy; each has a generator of its own, keyed by (seed, name)."""
    return {name: _draw(name, shape, seed) for name, shape in tensor_shapes(config)}


def tensor_shapes(config: Mapping[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in file order."""
    observation, action, encoder, memory, chunk, _, _, head, blocks = (
        int(str(config[name])) for name in _SIZES
    )
    yield from _layer("encoder.0", encoder, observation + action)
    yield from _layer("encoder.1", encoder, encoder)
    for name, inputs in (("ih", encoder), ("hh", memory)):
        yield f"memory.weight_{name}", (3 * memory, inputs)
        yield f"memory.bias_{name}", (3 * memory,)
    yield from _layer("head.condition", head, memory + encoder)
    yield "head.time.weight", (head, 8)
    yield "head.input.weight", (head, chunk * (action + 1))
    for block in range(blocks):
        for layer in range(2):
            yield from _layer(f"head.blocks.{block}.{layer}", head, head)
    yield from _layer("head.output", chunk * action, head)
    for name in ("mean", "std"):
        yield f"stats.observation.{name}", (observation,)
    for name in ("scale", "offset"):
        yield f"stats.action.{name}", (action,)


def _layer(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _draw(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, *name.encode()])))
    if name.endswith(("std", "scale")):
        return rng.uniform(0.5, 2.0, shape).astype(np.float32)
    gain = 1.5 / math.sqrt(shape[1]) if len(shape) == 2 else 0.2
    return (gain * rng.standard_normal(shape)).astype(np.float32)
