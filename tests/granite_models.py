"""Tiny random models of the granitemoehybrid type.

IS: configs, their weights from a seed, and a writer of their checkpoints. What transformers
computes from them is in tests/golden/granite, made by tools/granite_golden.py. IS NOT: the
product's: it shares no line with flashrt.models.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Config = dict[str, Any]
VOCAB = 512

_BASE: Config = {
    "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid",
    "vocab_size": VOCAB, "num_local_experts": 0, "num_experts_per_tok": 0, "hidden_act": "silu",
    "max_position_embeddings": 4096, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Config] = {
    # of Granite-4.0-H: one group, no rotary positions, a tied head, all multipliers
    "granite": _BASE | {
        "hidden_size": 64, "shared_intermediate_size": 96, "intermediate_size": 96,
        "num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "attention_multiplier": 0.11, "embedding_multiplier": 5.0, "residual_multiplier": 0.4,
        "logits_scaling": 0.35, "position_embedding_type": "nope", "tie_word_embeddings": True,
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 32,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": True,
        "mamba_proj_bias": False, "attention_bias": False,
    },
    # no power of two: groups, biases, rotary positions, limits of a step, a last layer of attention
    "granite-odd": _BASE | {
        "hidden_size": 72, "shared_intermediate_size": 88, "intermediate_size": 88,
        "num_hidden_layers": 3, "layer_types": ["mamba", "mamba", "attention"],
        "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
        "logits_scaling": 0.9, "position_embedding_type": "rope", "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "mamba_n_heads": 9, "mamba_d_head": 24, "mamba_n_groups": 3, "mamba_d_state": 20,
        "mamba_d_conv": 3, "mamba_expand": 3, "mamba_chunk_size": 64, "mamba_conv_bias": True,
        "mamba_proj_bias": True, "attention_bias": True, "time_step_limit": [0.02, 1.5],
    },
}  # fmt: skip
# with experts beside the MLP of all tokens
CONFIGS |= {
    "granite-moe": CONFIGS["granite"] | {
        "num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "num_local_experts": 6,
        "num_experts_per_tok": 2, "intermediate_size": 32,
    },
    "granite-moe-odd": CONFIGS["granite-odd"] | {
        "hidden_size": 96, "mamba_d_head": 32, "num_hidden_layers": 2,
        "layer_types": ["attention", "mamba"], "num_local_experts": 5, "num_experts_per_tok": 4,
        "intermediate_size": 64,
    },
}  # fmt: skip


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model."""
    H, heads, I = c["hidden_size"], c["num_attention_heads"], c["shared_intermediate_size"]  # noqa: E741
    D = H // heads
    query, kv = heads * D, c["num_key_value_heads"] * D
    inner, states = c["mamba_expand"] * H, c["mamba_n_groups"] * c["mamba_d_state"]
    channels = inner + 2 * states
    rows = inner + channels + c["mamba_n_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], H)}
    for i, kind in enumerate(c["layer_types"]):
        at = f"model.layers.{i}"
        if kind == "mamba":
            found |= {
                f"{at}.mamba.in_proj.weight": (rows, H),
                f"{at}.mamba.conv1d.weight": (channels, 1, c["mamba_d_conv"]),
                f"{at}.mamba.conv1d.bias": (channels,),
                f"{at}.mamba.norm.weight": (inner,),
                f"{at}.mamba.out_proj.weight": (H, inner),
            }
            found |= {f"{at}.mamba.{n}": (c["mamba_n_heads"],) for n in ("A_log", "D", "dt_bias")}
            if c["mamba_proj_bias"]:
                found[f"{at}.mamba.in_proj.bias"] = (rows,)
                found[f"{at}.mamba.out_proj.bias"] = (H,)
        else:
            for name, n in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
                found[f"{at}.self_attn.{name}.weight"] = (n, H)
                if c["attention_bias"]:
                    found[f"{at}.self_attn.{name}.bias"] = (n,)
            found[f"{at}.self_attn.o_proj.weight"] = (H, query)
            if c["attention_bias"]:
                found[f"{at}.self_attn.o_proj.bias"] = (H,)
        found |= {
            f"{at}.shared_mlp.input_linear.weight": (2 * I, H),
            f"{at}.shared_mlp.output_linear.weight": (H, I),
            f"{at}.input_layernorm.weight": (H,),
            f"{at}.post_attention_layernorm.weight": (H,),
        }
        if E := c["num_local_experts"]:
            own, inside = f"{at}.block_sparse_moe", c["intermediate_size"]
            found |= {
                f"{own}.router.layer.weight": (E, H),
                f"{own}.input_linear.weight": (E, 2 * inside, H),
                f"{own}.output_linear.weight": (E, H, inside),
            }
    found["model.norm.weight"] = (H,)
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], H)
    return found


def weights_of(c: Config) -> dict[str, NDArray[np.float32]]:
    """Values that bfloat16 holds, uniform, from raw words of PCG64: those are the same in every
    numpy, which its normal variates need not be. Each tensor has a generator of its own.
    """
    found = {}
    for name, shape in shapes(c).items():
        raw = np.random.PCG64(list(name.encode())).random_raw(math.prod(shape))
        x = (raw >> np.uint64(11)) * 2.0**-53  # [0, 1)
        spread = (2 * x - 1) * math.sqrt(3)  # of mean 0 and deviation 1
        if name.endswith("norm.weight"):
            x = 1 + 0.25 * spread
        elif name.endswith("A_log"):
            x = np.log(0.02 + x)  # decay rates from very slow to fast
        elif name.endswith("dt_bias"):
            x = spread - 0.5
        elif name.endswith((".D", ".bias")):
            x = 0.5 * spread
        else:
            gain = 1.6 if "embed" in name or "lm_head" in name else 2.0 if "out" in name else 1.3
            inputs = shape[-1] if "block_sparse_moe" in name else math.prod(shape[1:])
            x = spread * gain / math.sqrt(inputs)
        if name == "model.embed_tokens.weight":
            x = x * (c["logits_scaling"] * 1.5)
        if name == "lm_head.weight":
            x = x * c["logits_scaling"] * 1.5
        found[name] = x.reshape(shape).astype(ml_dtypes.bfloat16).astype(np.float32)
    return found


def write(folder: Path, c: Config) -> Path:
    """A checkpoint directory of a config, tensors in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    header: dict[str, object] = {}
    data = b""
    for name, x in weights_of(c).items():
        raw = x.astype(ml_dtypes.bfloat16).tobytes()
        header[name] = {
            "dtype": "BF16", "shape": x.shape, "data_offsets": [len(data), len(data) + len(raw)],
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def prompts() -> list[list[int]]:
    """Of 1 to 600 tokens: within a tile, at its edge, across buckets and across blocks of keys."""
    return [[(7 * i * i + 3 * i + n) % VOCAB for i in range(n)] for n in (1, 5, 64, 65, 257, 600)]
