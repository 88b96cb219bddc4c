"""pi0.5 policies with random weights, as LeRobot stores them: those of the golden sets, by seed.

IS: config.json and processor files, a tokenizer, and the tensors of a small model; tools and tests
draw the same numbers. IS NOT: in need of flashrt, or of torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tests.policy_files import (
    DEVICE,
    NORMALIZE,
    RENAME,
    TO_BATCH,
    Step,
    Values,
    features_of,
    random_left_over,
    random_noise,
    random_observation,
    tokenizer_step,
    tower_shapes,
    uniform,
    write_policy,
)

PREFIX = "model.paligemma_with_expert"
VOCABULARY = 300
_WORDS = ("Task: ", ", State: ", ";\nAction: ", "128 ", "pick up", "the ")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the parts of a policy that its config.json does not tell."""

    hidden: int
    intermediate: int
    depth: int
    heads: int
    head_dim: int
    expert_hidden: int
    expert_intermediate: int
    vision_hidden: int
    vision_depth: int
    vision_intermediate: int
    patch: int = 14


def pi05_config(
    cameras: Mapping[str, tuple[int, int]], state: int, action: int, **fields: object
) -> dict[str, Any]:
    """A config.json, of images of (height, width)."""
    modes = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    return {
        "type": "pi05", "n_obs_steps": 1, **features_of(cameras, action, state),
        "normalization_mapping": modes, "device": "cpu", "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m", "dtype": "float32", "min_period": 4e-3,
        "max_period": 4.0, "empty_cameras": 0, "rtc_config": None, **fields,
    }  # fmt: skip


GUIDED = {
    "enabled": True, "prefix_attention_schedule": "LINEAR", "max_guidance_weight": 5.0,
    "execution_horizon": 6,
}  # fmt: skip
SETS: dict[str, tuple[dict[str, Any], Sizes, int]] = {
    "two-cameras": (
        pi05_config({"top": (32, 40), "wrist": (42, 42)}, state=5, action=4, chunk_size=6,
                    n_action_steps=4, max_state_dim=8, max_action_dim=7, num_inference_steps=10,
                    image_resolution=[42, 42], tokenizer_max_length=100),
        Sizes(48, 80, 3, 4, 16, 32, 56, 72, 2, 88),
        1,
    ),
    "three-cameras": (  # heads whose columns are not those of the model; with real-time chunking
        pi05_config({"a": (17, 61), "b": (50, 20), "c": (56, 30)}, state=3, action=3, chunk_size=9,
                    n_action_steps=9, max_state_dim=5, max_action_dim=5, num_inference_steps=4,
                    rtc_config=GUIDED,
                    image_resolution=[56, 56], tokenizer_max_length=64),
        Sizes(64, 96, 2, 2, 32, 40, 72, 144, 1, 100),
        2,
    ),
    "one-camera": (  # small enough for everything else that is tested
        pi05_config({"top": (20, 30)}, state=2, action=2, chunk_size=8, n_action_steps=4,
                    max_state_dim=3, max_action_dim=4, num_inference_steps=3,
                    image_resolution=[42, 42], tokenizer_max_length=60),
        Sizes(64, 128, 2, 4, 16, 64, 128, 72, 1, 64),
        3,
    ),
}  # fmt: skip
TASKS = ("pick up the red_cube ", "wait\nfor me", "")


def shapes_of(config: Mapping[str, Any], s: Sizes) -> dict[str, tuple[int, ...]]:
    """Of every tensor that LeRobot stores, by name; of the tied ones, that which it keeps."""
    patches = (config["image_resolution"][0] // s.patch) ** 2
    gemma, expert = f"{PREFIX}.paligemma.model", f"{PREFIX}.gemma_expert"
    tower = f"{gemma}.vision_tower.vision_model"
    found: dict[str, tuple[int, ...]] = {
        f"{PREFIX}.paligemma.lm_head.weight": (VOCABULARY, s.hidden),
        f"{gemma}.language_model.norm.weight": (s.hidden,),
        f"{gemma}.multi_modal_projector.linear.weight": (s.hidden, s.vision_hidden),
        f"{gemma}.multi_modal_projector.linear.bias": (s.hidden,),
        f"{expert}.lm_head.weight": (VOCABULARY, s.expert_hidden),
    }
    found |= tower_shapes(
        tower, s.vision_hidden, s.vision_depth, s.vision_intermediate, s.patch, patches
    )
    inner = s.heads * s.head_dim
    for root, hidden, intermediate in (
        (f"{gemma}.language_model", s.hidden, s.intermediate),
        (f"{expert}.model", s.expert_hidden, s.expert_intermediate),
    ):
        for i in range(s.depth):
            at = f"{root}.layers.{i}"
            found |= {
                f"{at}.self_attn.q_proj.weight": (inner, hidden),
                f"{at}.self_attn.k_proj.weight": (s.head_dim, hidden),
                f"{at}.self_attn.v_proj.weight": (s.head_dim, hidden),
                f"{at}.self_attn.o_proj.weight": (hidden, inner),
                f"{at}.mlp.gate_proj.weight": (intermediate, hidden),
                f"{at}.mlp.up_proj.weight": (intermediate, hidden),
                f"{at}.mlp.down_proj.weight": (hidden, intermediate),
            }
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found |= _norm(f"{at}.{norm}", hidden, is_adaptive=root.startswith(expert))
    found |= _norm(f"{expert}.model.norm", s.expert_hidden, is_adaptive=True)
    sizes = (s.expert_hidden, config["max_action_dim"])
    found |= {
        "model.action_in_proj.weight": sizes, "model.action_in_proj.bias": sizes[:1],
        "model.action_out_proj.weight": sizes[::-1], "model.action_out_proj.bias": sizes[1:],
    }  # fmt: skip
    for name in ("time_mlp_in", "time_mlp_out"):
        found[f"model.{name}.weight"] = (s.expert_hidden, s.expert_hidden)
        found[f"model.{name}.bias"] = (s.expert_hidden,)
    return found


def _norm(name: str, size: int, *, is_adaptive: bool) -> dict[str, tuple[int, ...]]:
    if is_adaptive:
        return {f"{name}.dense.weight": (3 * size, size), f"{name}.dense.bias": (3 * size,)}
    return {f"{name}.weight": (size,)}


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Values:
    """A tensor by its name: such that values keep their size from layer to layer."""
    values = uniform(name, shape, seed)
    if name.endswith("bias") or "position_embedding" in name:
        return values / 2
    if len(shape) == 1:
        is_layer_norm = "vision" in name
        return np.float32(is_layer_norm) + values / 3
    fan_in = int(np.prod(shape[1:], dtype=np.int64))
    gain = 3.0 / fan_in if ".dense." not in name else 0.6 / fan_in
    return values * np.float32(np.sqrt(gain))


def tensors_of(name: str) -> dict[str, Values]:
    """All of a set."""
    config, sizes, seed = SETS[name]
    return {n: random_tensor(n, s, seed) for n, s in shapes_of(config, sizes).items()}


def observation_of(name: str, seed: int) -> dict[str, Any]:
    """Random: images [H, W, 3] in uint8, a state that leaves the quantiles here and there, a task
    of those with characters that are cleaned away.
    """
    return random_observation(SETS[name][0], seed, TASKS)


def noise_of(name: str, seed: int) -> Values:
    """What a chunk starts from: [chunk, max_action_dim]."""
    return random_noise(SETS[name][0], seed)


def left_over_of(name: str, rows: int) -> Values:
    """Rows of a chunk before, as a model has them."""
    config, _, seed = SETS[name]
    return random_left_over(config, rows, seed)


def tokenizer() -> tokenizers.Tokenizer:
    """Characters and some words, a space as in Gemma's, one token before every text."""
    plain = [chr(c) for c in range(33, 127)] + ["\n", "\u2581"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *plain]
    model = tokenizers.models.BPE(
        vocab={n: i for i, n in enumerate(names)}, merges=[], unk_token="<unk>"
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    made.decoder = tokenizers.decoders.Replace("\u2581", " ")
    made.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    made.add_tokens([tokenizers.AddedToken(w, normalized=False) for w in _WORDS])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return made


def write_random_pi05(
    name: str,
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """The policy of a set; `folder` is made. `tensors`: instead of its own."""
    root, (config, _, seed) = Path(folder), SETS[name]
    write_policy(
        root, config, tensors_of(name) if tensors is None else tensors, _steps(config), seed
    )
    tokenizer().save(str(root / "tokenizer.json"))
    return root


def _steps(config: Mapping[str, Any]) -> list[Step]:
    """Of the preprocessor, as LeRobot has them for pi0.5."""
    state = {"max_state_dim": config["max_state_dim"], "task_key": "task"}
    most, model = config["tokenizer_max_length"], "google/paligemma-3b-pt-224"
    return [
        RENAME, TO_BATCH, NORMALIZE, ("pi05_prepare_state_tokenizer_processor_step", state),
        tokenizer_step(most, "max_length", model), DEVICE,
    ]  # fmt: skip
