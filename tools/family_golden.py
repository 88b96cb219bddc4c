"""Writes golden sets of model families: tiny random checkpoints, and what transformers computes.

IS: for each set a folder in tests/golden/families with config.json, model.safetensors in bfloat16,
and from transformers in float32: the logits after six prompts of 1 to 600 tokens, 48 greedy tokens
behind each and the logits that chose the last one, the logits of every position of a short prompt,
and the state after a prompt. IS NOT: run by the tests, which have neither torch nor transformers.

    pip install torch transformers safetensors
    python tools/family_golden.py lfm2 lfm2-odd
"""

from __future__ import annotations

import json
import math
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
}  # fmt: skip


def build(given: dict[str, Any], seed: int) -> torch.nn.Module:
    """A model of random weights that bfloat16 holds, each sublayer of the size of its input."""
    config = transformers.AutoConfig.for_model(**given)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            x = torch.randn(weight.shape, generator=draws)
            inputs = math.prod(weight.shape[1:])
            if "norm" in name:
                x = 1 + 0.2 * x
            elif name.endswith("bias"):
                x = 0.5 * x
            elif "embed_tokens" in name or "lm_head" in name:
                x = 2.5 * x / math.sqrt(inputs)
            else:
                x = 1.5 * x / math.sqrt(inputs)
            weight.copy_(x.bfloat16().float())
    return model


def prompt(n: int, vocab_size: int) -> list[int]:
    """Tokens without a period."""
    return [(7 * i * i + 11 * n + 3 * i) % vocab_size for i in range(n)]


@torch.no_grad()
def expected(model: torch.nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The two files of a set, and the least margin of a greedy token among the first of them."""
    vocab_size = model.config.vocab_size
    prompts = [prompt(n, vocab_size) for n in LENGTHS]
    arrays: dict[str, torch.Tensor] = {}
    last, last_greedy, greedy, margin = [], [], [], math.inf
    for i, tokens in enumerate(prompts):
        cache = transformers.DynamicCache(config=model.config)
        kept = {"use_cache": True, "cache": cache}
        logits = model(torch.tensor([tokens]), **kept).logits[0]
        last.append(logits[-1])
        if i == SHORT:
            arrays["logits_all"] = logits
        if i == CACHED:
            arrays |= states(cache, model.config)
        chosen: list[int] = []
        while True:
            best = logits[-1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            chosen.append(int(best.indices[0]))
            if len(chosen) == N_GREEDY:
                break
            logits = model(torch.tensor([chosen[-1:]]), **kept).logits[0]
        greedy.append(chosen)
        last_greedy.append(logits[-1])
    arrays["logits_last"] = torch.stack(last)
    arrays["greedy_logits_last"] = torch.stack(last_greedy)
    info = {
        "transformers": transformers.__version__, "torch": torch.__version__, "margin": margin,
        "short": SHORT, "cached": CACHED, "prompts": prompts, "greedy": greedy,
    }  # fmt: skip
    return info, {name: x.contiguous().clone() for name, x in arrays.items()}


def states(cache: Any, config: Any) -> dict[str, torch.Tensor]:
    """What each layer keeps, by its number: keys and values [Nk, positions, D], windows [W, C]."""
    found: dict[str, torch.Tensor] = {}
    for i, kind in enumerate(config.layer_types):
        layer = cache.layers[i]
        if kind == "full_attention":
            found |= {f"{i}.keys": layer.keys[0], f"{i}.values": layer.values[0]}
        else:
            rows = layer.conv_states[0][0].T  # [K, C], oldest first
            found[f"{i}.window"] = rows[1 - config.conv_L_cache :]
    return {name: x.clone() for name, x in found.items()}  # decoding changes them in place


def write(name: str) -> None:
    """One set, of the first seed whose greedy tokens are clear."""
    for seed in range(1000):
        model = build(CONFIGS[name], seed)
        info, arrays = expected(model)
        if info["margin"] >= LEAST_MARGIN:
            break
    else:
        raise SystemExit(f"{name}: no seed below 1000 has clear greedy tokens")
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: w.bfloat16().clone() for n, w in model.state_dict().items()}
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
