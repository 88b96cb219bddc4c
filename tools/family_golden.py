"""Writes golden sets of model families: tiny random checkpoints, and what transformers computes.

IS: for each set a folder in tests/golden/families with config.json, model.safetensors in bfloat16,
and from transformers in float32: the logits after six prompts of 1 to 600 tokens, 48 greedy tokens
behind each and the logits that chose the last one, the logits of every position of a short prompt,
and the state after a prompt. Every token is the end of a whole forward pass without a cache, since
transformers' steps with one leave the limits of a time step out. IS NOT: run by the tests, which
have neither torch nor transformers.

    pip install torch transformers safetensors
    python tools/family_golden.py lfm2 lfm2-odd
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "families"
LENGTHS = (1, 5, 64, 65, 200, 600)
SHORT, CACHED = 1, 3  # the prompt with logits of every position, and the one with states
N_GREEDY = 48
LEAST_MARGIN = 4e-3  # of the best token over the next: four times the tolerance of logits
LAYERS = ["conv", "conv", "full_attention", "conv"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lfm2": {  # as released, but for sizes: tied, no bias, the last layer is a convolution
        "model_type": "lfm2", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 120,
        "block_multiple_of": 32, "layer_types": LAYERS, "rope_theta": 1e6,
    },
    "lfm2-odd": {  # biases, four taps, sizes off every grid, a head of its own
        "model_type": "lfm2", "vocab_size": 517, "hidden_size": 66, "num_hidden_layers": 3,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24,
        "block_ff_dim": 129, "block_multiple_of": 3, "block_ffn_dim_multiplier": 1.3,
        "full_attn_idxs": [0, 2], "rope_theta": 5e4, "conv_bias": True, "conv_L_cache": 4,
        "norm_eps": 3e-5, "tie_embedding": False,
    },
    "granite": {  # as released, but for sizes: one group, no rotary positions, tied, multipliers
        "model_type": "granitemoehybrid", "vocab_size": 512, "hidden_size": 64,
        "shared_intermediate_size": 96, "num_hidden_layers": 4, "num_local_experts": 0,
        "num_experts_per_tok": 0, "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "attention_multiplier": 0.11, "embedding_multiplier": 0.5, "residual_multiplier": 0.4,
        "logits_scaling": 0.35, "position_embedding_type": "nope", "tie_word_embeddings": True,
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 32,
        "mamba_d_conv": 4, "mamba_expand": 2,
    },
    "granite-odd": {  # groups, biases, rotary positions, limits of a step, attention comes last
        "model_type": "granitemoehybrid", "vocab_size": 512, "hidden_size": 72,
        "shared_intermediate_size": 88, "num_hidden_layers": 3, "num_local_experts": 0,
        "num_experts_per_tok": 0, "layer_types": ["mamba", "mamba", "attention"],
        "num_attention_heads": 3, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
        "logits_scaling": 0.9, "position_embedding_type": "rope", "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "mamba_n_heads": 9, "mamba_d_head": 24, "mamba_n_groups": 3, "mamba_d_state": 20,
        "mamba_d_conv": 3, "mamba_expand": 3, "mamba_chunk_size": 64, "mamba_proj_bias": True,
        "attention_bias": True, "time_step_limit": [0.02, 1.5],
    },
    "nemotron": {  # as released, but for sizes: groups, no limit, two MLPs of three are the last
        "model_type": "nemotron_h", "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 6,
        "hybrid_override_pattern": "M-M*M-", "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 160, "mamba_num_heads": 8, "mamba_head_dim": 16,
        "n_groups": 2, "ssm_state_size": 32, "conv_kernel": 4, "time_step_limit": [0.0, math.inf],
    },
    "nemotron-odd": {  # biases but for the convolution's, limits of a step, sizes off every grid
        "model_type": "nemotron_h", "vocab_size": 517, "hidden_size": 66,
        "layers_block_type": ["mlp", "attention", "mamba", "mlp", "attention"],
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24,
        "intermediate_size": 129, "mamba_num_heads": 9, "mamba_head_dim": 20, "n_groups": 3,
        "ssm_state_size": 20, "conv_kernel": 3, "chunk_size": 64, "use_conv_bias": False,
        "use_bias": True, "mlp_bias": True, "attention_bias": True, "layer_norm_epsilon": 3e-5,
        "time_step_limit": [0.02, 1.5],
    },
}  # fmt: skip


def build(given: dict[str, Any], seed: int) -> torch.nn.Module:
    """A model of random weights that bfloat16 holds, each sublayer of the size of its input."""
    config = transformers.AutoConfig.for_model(**given)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    if config.model_type == "nemotron_h":
        as_nvidia_has_it(model)
    scale = 2.5 * getattr(config, "logits_scaling", 1.0)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            x = torch.randn(weight.shape, generator=draws)
            inputs = math.prod(weight.shape[1:])
            if "norm" in name:
                x = 1 + 0.2 * x
            elif name.endswith("A_log"):  # decay rates from very slow to fast
                x = torch.log(0.02 + torch.rand(weight.shape, generator=draws))
            elif name.endswith("dt_bias"):
                x = x - 0.5
            elif name.endswith(("bias", ".D")):
                x = 0.5 * x
            elif "embed" in name or "lm_head" in name:
                x = scale * x / math.sqrt(inputs)
            else:
                x = 1.5 * x / math.sqrt(inputs)
            weight.copy_(x.bfloat16().float())
    return model


def as_nvidia_has_it(model: torch.nn.Module) -> None:
    """Nemotron-H's limits of a time step and biases of attention, which transformers' classes leave
    out: the limits are those of time_step_limit, not time_step_min.
    """
    config = model.config
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = tuple(config.time_step_limit)
        elif layer.block_type == "full_attention" and config.attention_bias:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                linear = getattr(layer.mixer, name)
                linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))


def prompt(n: int, vocab_size: int) -> list[int]:
    """Tokens without a period."""
    return [(7 * i * i + 11 * n + 3 * i) % vocab_size for i in range(n)]


@torch.no_grad()
def expected(model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """The two files of a set; None where a greedy token is not clear."""
    vocab_size = model.config.vocab_size
    prompts = [prompt(n, vocab_size) for n in LENGTHS]
    arrays: dict[str, torch.Tensor] = {}
    last, last_greedy, greedy, margin = [], [], [], math.inf
    for i, tokens in enumerate(prompts):
        text = list(tokens)
        for n in range(N_GREEDY):
            logits = model(torch.tensor([text]), use_cache=False).logits[0]
            if n == 0:
                last.append(logits[-1])
                if i == SHORT:
                    arrays["logits_all"] = logits
            best = logits[-1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            if margin < LEAST_MARGIN:
                return None
            text.append(int(best.indices[0]))
        greedy.append(text[len(tokens) :])
        last_greedy.append(logits[-1])
    cache = transformers.DynamicCache(config=model.config)
    model(torch.tensor([prompts[CACHED]]), use_cache=True, cache=cache)
    arrays |= states(cache, model.config)
    arrays["logits_last"] = torch.stack(last)
    arrays["greedy_logits_last"] = torch.stack(last_greedy)
    info = {
        "transformers": transformers.__version__, "torch": torch.__version__, "margin": margin,
        "short": SHORT, "cached": CACHED, "prompts": prompts, "greedy": greedy,
    }  # fmt: skip
    return info, {name: x.contiguous().clone() for name, x in arrays.items()}


def states(cache: Any, config: Any) -> dict[str, torch.Tensor]:
    """What each layer keeps, by its number: keys and values [Nk, positions, D], windows [W, C],
    states [Hv, dk, dv]. Keys are multiplied as flashrt's are, where attention has a multiplier.
    """
    found: dict[str, torch.Tensor] = {}
    for i, kind in enumerate(config.layer_types):
        layer = cache.layers[i]
        if kind == "full_attention":
            keys = layer.keys[0]
            if hasattr(config, "attention_multiplier"):
                keys = keys * math.sqrt(config.attention_multiplier * math.sqrt(keys.shape[-1]))
            found |= {f"{i}.keys": keys, f"{i}.values": layer.values[0]}
        elif kind != "mlp":
            rows = layer.conv_states[0][0].T  # [K, C], oldest first
            found[f"{i}.window"] = rows[1:]
            if kind == "linear_attention":
                found[f"{i}.state"] = layer.recurrent_states[0][0].transpose(1, 2)
    return found


def write(name: str) -> None:
    """One set, of the first seed whose greedy tokens are clear."""
    for seed in range(1000):
        model = build(CONFIGS[name], seed)
        if (made := expected(model)) is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed below 1000 has clear greedy tokens")
    info, arrays = made
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: w.bfloat16().clone() for n, w in model.state_dict().items()}
    if name == "nemotron":  # as released, and as transformers writes it
        weights = {re.sub("^model", "backbone", n): w for n, w in weights.items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    save_file(arrays, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name], indent=2) + "\n")
    (folder / "expected.json").write_text(json.dumps(info) + "\n")
    std = float(arrays["logits_last"].std())
    print(f"{name}: seed {seed}, least margin {info['margin']:.3f}, logits of std {std:.2f}")


if __name__ == "__main__":
    for chosen_name in sys.argv[1:]:
        write(chosen_name)
