"""Tiny random models of the dense family, and what they compute: numpy in float64.

IS: configs of every model type and kind of rotary scaling, a writer of their checkpoints, and the
forward pass from the equations of the models' papers and of transformers, for all positions at
once. IS NOT: the product's: it shares no line with flashrt.models, nor its op references.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Config = dict[str, Any]
VOCAB = 512

_BASE: Config = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS: dict[str, Config] = {
    "llama": _BASE | {  # of Llama 3.1: mixed frequencies, with a boundary inside the tiny context
        "model_type": "llama", "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    },
    "llama-biased": _BASE | {
        "model_type": "llama", "attention_bias": True, "head_dim": 24, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4,
                            "partial_rotary_factor": 0.5},
    },
    "qwen2": _BASE | {  # biases on q, k, v; an odd group of query heads
        "model_type": "qwen2", "hidden_size": 56, "num_attention_heads": 7,
        "num_key_value_heads": 1, "rope_theta": 1e6, "use_sliding_window": False,
        "sliding_window": 8, "tie_word_embeddings": True,
    },
    "qwen3": _BASE | {  # head norms; yarn
        "model_type": "qwen3", "head_dim": 32, "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                         "original_max_position_embeddings": 128},
    },
    "smollm3": _BASE | {  # layers without rotary positions
        "model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0],
        "rope_theta": 5e6, "tie_word_embeddings": True, "num_key_value_heads": 4,
    },
    "mistral": _BASE | {
        "model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "head_dim": None,
    },
}  # fmt: skip


def head_dim_of(c: Config) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model."""
    H, D = c["hidden_size"], head_dim_of(c)
    rows = {
        "q_proj": c["num_attention_heads"] * D, "k_proj": c["num_key_value_heads"] * D,
        "v_proj": c["num_key_value_heads"] * D,
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], H)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for name, n in rows.items():
            found[f"{at}.self_attn.{name}.weight"] = (n, H)
            if c["model_type"] == "qwen2" or c.get("attention_bias"):
                found[f"{at}.self_attn.{name}.bias"] = (n,)
        found[f"{at}.self_attn.o_proj.weight"] = (H, rows["q_proj"])
        if c.get("attention_bias"):
            found[f"{at}.self_attn.o_proj.bias"] = (H,)
        if c["model_type"] == "qwen3":
            found |= {f"{at}.self_attn.{n}_norm.weight": (D,) for n in "qk"}
        for name in ("gate_proj", "up_proj"):
            found[f"{at}.mlp.{name}.weight"] = (c["intermediate_size"], H)
        found[f"{at}.mlp.down_proj.weight"] = (H, c["intermediate_size"])
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = (H,)
    found["model.norm.weight"] = (H,)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], H)
    return found


def weights_of(c: Config, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random values that bfloat16 holds; norms around 1."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes(c).items():
        x = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
        elif name.endswith("bias"):
            x = 0.5 * x
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            x = x * (2.5 / math.sqrt(shape[1]))
        else:
            x = x * (1.5 / math.sqrt(shape[1]))
        found[name] = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    return found


def write(folder: Path, c: Config, seed: int = 0) -> Path:
    """A checkpoint directory of a config, tensors in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    header: dict[str, object] = {}
    data = b""
    for name, x in weights_of(c, seed).items():
        raw = x.astype(ml_dtypes.bfloat16).tobytes()
        header[name] = {
            "dtype": "BF16", "shape": x.shape, "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


# ---- the forward pass ----


def frequencies(c: Config) -> tuple[Array, float]:
    """Radians per position of each pair, and what cosine and sine are multiplied by."""
    rope = {"rope_theta": 10000.0, **c, **(c.get("rope_parameters") or {})}
    rope |= c.get("rope_scaling") or {}
    dims = int(head_dim_of(c) * rope.get("partial_rotary_factor", 1.0))
    theta, kind = rope["rope_theta"], rope.get("rope_type", "default")
    w = theta ** -(np.arange(0, dims, 2) / dims)
    if kind == "linear":
        return w / rope["factor"], 1.0
    if kind == "llama3":
        n, low, high = (
            rope[f"{x}"]
            for x in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        turns = n * w / (2 * np.pi)  # within the trained positions
        mix = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - mix) * w / rope["factor"] + mix * w, 1.0
    if kind == "yarn":
        n = rope["original_max_position_embeddings"]

        def pair(turns: float) -> float:
            """The index, in dims, of what turns so often."""
            return dims * math.log(n / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), dims - 1)
        ramp = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
        return w * (1 - ramp) + w / rope["factor"] * ramp, 0.1 * math.log(rope["factor"]) + 1
    return w, 1.0


def logits(c: Config, weights: dict[str, NDArray[np.float32]], tokens: list[int]) -> Array:
    """[tokens, vocabulary]"""
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    D, Nq, Nk = head_dim_of(c), c["num_attention_heads"], c["num_key_value_heads"]
    omega, scale = frequencies(c)
    angle = np.arange(len(tokens))[:, None] * omega
    cos, sin = (np.concatenate([f(angle), f(angle)], 1)[:, None] * scale for f in (np.cos, np.sin))

    def norm(x: Array, name: str) -> Array:
        y: Array = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c["rms_norm_eps"]) * w[name]
        return y

    def product(x: Array, name: str) -> Array:
        y: Array = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def turned(x: Array) -> Array:
        part, rest = x[..., : 2 * len(omega)], x[..., 2 * len(omega) :]
        a, b = np.split(part, 2, axis=-1)
        return np.concatenate([part * cos + np.concatenate([-b, a], -1) * sin, rest], -1)

    x = w["model.embed_tokens.weight"][tokens]
    hidden = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (
            product(h, f"{at}.self_attn.{n}_proj").reshape(len(tokens), heads, D)
            for n, heads in (("q", Nq), ("k", Nk), ("v", Nk))
        )
        if f"{at}.self_attn.q_norm.weight" in w:
            q, k = (norm(y, f"{at}.self_attn.{n}_norm.weight") for y, n in ((q, "q"), (k, "k")))
        if c.get("no_rope_layers", [1] * (i + 1))[i]:
            q, k = turned(q), turned(k)
        k, v = (np.repeat(y, Nq // Nk, axis=1) for y in (k, v))
        score = np.einsum("thd,shd->hts", q, k) / math.sqrt(D) + hidden
        p = np.exp(score - score.max(-1, keepdims=True))
        mixed: Array = np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v)
        x = x + product(mixed.reshape(len(tokens), -1), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (product(h, f"{at}.mlp.{n}_proj") for n in ("gate", "up"))
        x = x + product(gate / (1 + np.exp(-gate)) * up, f"{at}.mlp.down_proj")
    head = "model.embed_tokens" if c["tie_word_embeddings"] else "lm_head"
    return product(norm(x, "model.norm.weight"), head)
