"""SmolVLA policies with random weights, as LeRobot stores them: those of the golden sets, by seed.

IS: folders that LeRobot loads as well as flashrt, the VLM's config and tokenizer in `vlm` within;
tools/smolvla_golden.py and tests draw the same numbers. IS NOT: in need of flashrt, or of torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.policy_files import (
    NORMALIZE,
    RENAME,
    TO_BATCH,
    Step,
    Values,
    features_of,
    random_left_over,
    random_noise,
    random_observation,
    random_tensor,
    tokenizer_step,
    tower_shapes,
    write_policy,
)

TASKS = ("push it left", "go\n", "put the red cup, the blue one too, on the plate that is in front")
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<fake_token_around_image>", "<image>",
    "<global-img>", "<end_of_utterance>",
)  # fmt: skip
_MERGES = ("t h", "th e", "Ġ the", "l e", "o n")
VOCABULARY = 256 + len(_MERGES) + len(SPECIAL)
_OFF = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}


def vlm_config(
    hidden: int = 96, heads: tuple[int, int] = (3, 1), head_dim: int = 32, ff: int = 160,
    layers: int = 4, vision: tuple[int, int, int, int] = (64, 4, 128, 2),
    image: tuple[int, int, int] = (64, 8, 2),
) -> dict[str, Any]:  # fmt: skip
    """A VLM's config.json. `vision`: hidden, heads, ff, layers; `image`: side, patch, scale."""
    return {
        "model_type": "smolvlm", "image_token_id": VOCABULARY - 3, "scale_factor": image[2],
        "pad_token_id": VOCABULARY - 6, "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama", "hidden_size": hidden, "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1], "head_dim": head_dim, "intermediate_size": ff,
            "num_hidden_layers": layers, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
            "pad_token_id": VOCABULARY - 6, "rope_theta": 100000, "hidden_act": "silu",
            "max_position_embeddings": 8192,
        },
        "vision_config": {
            "model_type": "smolvlm_vision", "hidden_size": vision[0],
            "num_attention_heads": vision[1], "intermediate_size": vision[2],
            "num_hidden_layers": vision[3], "image_size": image[0], "patch_size": image[1],
            "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
        },
    }  # fmt: skip


def smolvla_config(
    cameras: Mapping[str, tuple[int, int]], state: int, action: int, side: int = 64,
    modes: Mapping[str, str] = _OFF, **fields: object,
) -> dict[str, Any]:  # fmt: skip
    """A config.json, of images of (height, width)."""
    return {
        "type": "smolvla", "n_obs_steps": 1, **features_of(cameras, action, state),
        "normalization_mapping": dict(modes), "device": "cpu", "chunk_size": 10,
        "n_action_steps": 5, "max_state_dim": 32, "max_action_dim": 32,
        "resize_imgs_with_padding": [side, side], "tokenizer_max_length": 48, "num_steps": 10,
        "num_vlm_layers": 4, "num_expert_layers": -1, "self_attn_every_n_layers": 2,
        "expert_width_multiplier": 0.75, "load_vlm_weights": True, "attention_mode": "cross_attn",
        **fields,
    }  # fmt: skip


_GUIDED = {
    "enabled": True, "prefix_attention_schedule": "LINEAR", "max_guidance_weight": 10.0,
    "execution_horizon": 6,
}  # fmt: skip
_LIMITS = {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "QUANTILES"}

# Of each: the policy's config, its VLM's, and a seed.
SETS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "plain": (  # what people train, but small; one camera, and LeRobot in float32 from the start
        smolvla_config({"top": (48, 60)}, state=6, action=6, load_vlm_weights=False),
        vlm_config(layers=5), 1,
    ),
    "three-cameras": (  # of sizes that nothing divides; heads that are not hidden / their number
        smolvla_config({"top": (33, 47), "left": (64, 20), "wrist": (48, 48)}, state=5, action=3,
                       side=48, modes=_LIMITS, chunk_size=7, n_action_steps=4, num_steps=4,
                       max_state_dim=9, max_action_dim=16, self_attn_every_n_layers=3,
                       expert_width_multiplier=0.5, tokenizer_max_length=20),
        vlm_config(hidden=80, heads=(6, 2), head_dim=24, ff=72, vision=(48, 3, 72, 1),
                   image=(48, 4, 3)),
        2,
    ),
    "guided": (  # real-time chunking; the expert sees itself in every layer
        smolvla_config({"top": (40, 40), "wrist": (31, 64)}, state=4, action=4, num_vlm_layers=2,
                       attention_mode="self_attn", rtc_config=_GUIDED, num_steps=5,
                       n_action_steps=6, expert_width_multiplier=1.0),
        vlm_config(hidden=64, heads=(2, 2), ff=96, layers=2), 3,
    ),
    "few-experts": (  # a layer of the expert for every other one of the VLM
        smolvla_config({"top": (64, 64)}, state=3, action=2, chunk_size=12, n_action_steps=12,
                       num_expert_layers=2, self_attn_every_n_layers=4, num_steps=3),
        vlm_config(hidden=64, heads=(4, 2), head_dim=16, ff=64, vision=(32, 2, 48, 1)), 4,
    ),
    "tiny": (  # small enough for everything else that is tested
        smolvla_config({"top": (16, 16), "wrist": (9, 20)}, state=3, action=2, side=16,
                       chunk_size=8, n_action_steps=4, max_state_dim=4, max_action_dim=6,
                       num_vlm_layers=2, num_steps=3, tokenizer_max_length=12,
                       expert_width_multiplier=0.5, rtc_config=_GUIDED),
        vlm_config(hidden=32, heads=(2, 1), head_dim=16, ff=24, layers=2, vision=(24, 2, 32, 1),
                   image=(16, 4, 1)),
        5,
    ),
}  # fmt: skip


def observation_of(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Random: images [H, W, 3] in uint8, and one of the tasks."""
    return random_observation(config, seed, TASKS)


def noise_of(config: Mapping[str, Any], seed: int) -> Values:
    """[chunk_size, max_action_dim], about as large as normal noise is."""
    return random_noise(config, seed)


def left_over_of(config: Mapping[str, Any], rows: int, seed: int) -> Values:
    """Rows of a chunk before, as a model has them."""
    return random_left_over(config, rows, seed)


def tensors_of(config: Mapping[str, Any], vlm: Mapping[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of a policy's weights, as LeRobot has them."""
    text, vision, scale = vlm["text_config"], vlm["vision_config"], vlm["scale_factor"]
    hidden, size, patch = text["hidden_size"], vision["hidden_size"], vision["patch_size"]
    queries, keys = (
        text["head_dim"] * text[f"num_{kind}_heads"] for kind in ("attention", "key_value")
    )
    wide = int(hidden * config["expert_width_multiplier"])
    inner = 256 * -(-int(4 * int(2 * wide / 3)) // 256)
    n_layers = config["num_vlm_layers"]
    n_experts = config["num_expert_layers"] if config["num_expert_layers"] > 0 else n_layers
    own, expert = "model.vlm_with_expert.vlm", "model.vlm_with_expert.lm_expert"
    found: dict[str, list[int]] = {}

    def layer(at: str, width: int, mlp: int, key_width: int) -> None:
        attention = {
            "q": [queries, width], "k": [keys, key_width], "v": [keys, key_width],
            "o": [width, queries],
        }  # fmt: skip
        for part, shape in attention.items():
            found[f"{at}.self_attn.{part}_proj.weight"] = shape
        for part in ("gate", "up"):
            found[f"{at}.mlp.{part}_proj.weight"] = [mlp, width]
        found[f"{at}.mlp.down_proj.weight"] = [width, mlp]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{norm}.weight"] = [width]

    def dense(at: str, rows: int, columns: int) -> None:
        found.update({f"{at}.weight": [rows, columns], f"{at}.bias": [rows]})

    for i in range(n_layers):
        layer(f"{own}.model.text_model.layers.{i}", hidden, text["intermediate_size"], hidden)
    every, is_cross = config["self_attn_every_n_layers"], "cross" in config["attention_mode"]
    for i in range(n_experts):
        crosses = is_cross and not (every > 0 and i % every == 0)
        layer(f"{expert}.layers.{i}", wide, inner, keys if crosses else wide)
    found[f"{own}.model.text_model.embed_tokens.weight"] = [text["vocab_size"], hidden]
    found[f"{own}.lm_head.weight"] = [text["vocab_size"], hidden]
    found |= {f"{own}.model.text_model.norm.weight": [hidden], f"{expert}.norm.weight": [wide]}
    projection = f"{own}.model.connector.modality_projection.proj.weight"
    found[projection] = [hidden, size * scale**2]
    tower = f"{own}.model.vision_model"
    places = (vision["image_size"] // patch) ** 2
    depth, wider = vision["num_hidden_layers"], vision["intermediate_size"]
    shapes = tower_shapes(tower, size, depth, wider, patch, places)
    found |= {name: list(shape) for name, shape in shapes.items()}
    dense("model.state_proj", hidden, config["max_state_dim"])
    dense("model.action_in_proj", wide, config["max_action_dim"])
    dense("model.action_out_proj", config["max_action_dim"], wide)
    dense("model.action_time_mlp_in", wide, 2 * wide)
    dense("model.action_time_mlp_out", wide, wide)
    return found


def tokenizer_json() -> dict[str, Any]:
    """A byte-level tokenizer of few merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = sorted([*map(chr, printable), *(chr(256 + i) for i in range(len(others)))])
    words = [*letters, *(merge.replace(" ", "") for merge in _MERGES)]
    added = [
        {"id": len(words) + i, "content": text, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for i, text in enumerate(SPECIAL)
    ]  # fmt: skip
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": levels, "post_processor": None, "decoder": levels,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "ignore_merges": False, "vocab": {word: i for i, word in enumerate(words)},
                  "merges": [merge.split(" ") for merge in _MERGES]},
    }  # fmt: skip


def write_random_smolvla(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    vlm: Mapping[str, Any],
    seed: int,
    dtype: str = "float32",
) -> Path:
    """A policy of these configs, its tensors float32 or bfloat16. `folder` is made."""
    root = Path(folder)
    (root / "vlm").mkdir(parents=True, exist_ok=True)
    (root / "vlm" / "config.json").write_text(json.dumps(vlm, indent=1))
    (root / "vlm" / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    weights: dict[str, Any] = {
        name: random_tensor(name, tuple(shape), seed).astype(stored)
        for name, shape in tensors_of(config, vlm).items()
    }
    whole = {**config, "vlm_model_name": str(root / "vlm")}
    return write_policy(root, whole, weights, _steps(whole), seed)


def write_set(name: str, folder: str | os.PathLike[str]) -> Path:
    """The policy of a set; `folder` is made."""
    return write_random_smolvla(folder, *SETS[name])


def _steps(config: Mapping[str, Any]) -> list[Step]:
    """Of the preprocessor, as LeRobot has them for SmolVLA."""
    most, vlm = config["tokenizer_max_length"], config["vlm_model_name"]
    return [
        RENAME,
        TO_BATCH,
        ("smolvla_new_line_processor", {}),
        tokenizer_step(most, "longest", vlm),
        ("device_processor", {"device": "cpu", "float_dtype": None}),
        NORMALIZE,
    ]
