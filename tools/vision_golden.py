"""Writes golden sets of models that see: tiny random checkpoints, and what transformers computes.

IS: for each set a folder in tests/golden/vision with config.json, preprocessor_config.json,
model.safetensors in bfloat16, the images as PNG files, and from transformers in float32: hashes of
the patches of its image processor, the embeddings of each image, the logits after each prompt, 48
greedy tokens behind it and the logits that chose the last one. A prompt is a list of tokens and of
names of images. IS NOT: run by the tests, which have neither torch nor transformers.

    pip install torch transformers safetensors pillow
    python tools/vision_golden.py qwen35 qwen35-odd
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

FOLDER = Path(__file__).parents[1] / "tests" / "golden" / "vision"
N_GREEDY = 48
LEAST_MARGIN = 4e-3  # of the best token over the next: four times the tolerance of logits
IMAGES = {"wide": (75, 190), "tall": (333, 61), "small": (20, 23)}  # height, width
PROMPTS: tuple[tuple[int | str, ...], ...] = (  # of numbers: so many tokens
    (5, "wide", 7), ("small", 3), (2, "tall", 3, "wide", 1, "small", 9), (4, "wide", "wide", 2),
)  # fmt: skip
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "mrope_interleaved": True, "mrope_section": [3, 3, 2],
    },
}  # fmt: skip
VISION: dict[str, Any] = {
    "model_type": "qwen3_5_vision", "depth": 2, "hidden_size": 64, "num_heads": 4,
    "intermediate_size": 96, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "out_hidden_size": 64, "num_position_embeddings": 36, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
TOKENS = {
    "image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}  # fmt: skip
SETS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen35": (TEXT, VISION, {"shortest_edge": 1024, "longest_edge": 8192}),
    "qwen35-odd": (  # merges of 3, heads of 12, an odd table, sections that do not fill the pairs
        TEXT
        | {
            "hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 3,
            "num_key_value_heads": 1, "head_dim": 24,
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "rope_parameters": TEXT["rope_parameters"] | {"mrope_section": [3, 2, 1]},
        },
        VISION
        | {
            "depth": 3, "hidden_size": 36, "num_heads": 3, "intermediate_size": 50,
            "patch_size": 5, "spatial_merge_size": 3, "out_hidden_size": 72,
            "num_position_embeddings": 25,
        },
        {"shortest_edge": 2000, "longest_edge": 12000},
    ),
}  # fmt: skip


def build(text: dict[str, Any], vision: dict[str, Any], seed: int) -> torch.nn.Module:
    """A model of random weights that bfloat16 holds, each sublayer of the size of its input."""
    config = transformers.AutoConfig.for_model(
        "qwen3_5", text_config=text, vision_config=vision, **TOKENS,
        tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.Qwen3_5ForConditionalGeneration(config).float().eval()
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            x = torch.randn(weight.shape, generator=draws)
            inputs = math.prod(weight.shape[1:])
            if "norm" in name and name.endswith("weight") and "visual" not in name:
                x = 0.2 * x + (1 if "linear_attn.norm" in name else 0)
            elif "norm" in name and name.endswith("weight"):
                x = 1 + 0.2 * x
            elif name.endswith("A_log"):
                x = torch.log(0.02 + torch.rand(weight.shape, generator=draws))
            elif name.endswith("dt_bias"):
                x = x - 0.5
            elif name.endswith("bias"):
                x = 0.3 * x
            elif "pos_embed" in name:
                x = 0.7 * x
            elif "embed_tokens" in name:
                x = 2.5 * x / math.sqrt(inputs)
            else:
                x = 1.5 * x / math.sqrt(inputs)
            weight.copy_(x.bfloat16().float())
    return model


def picture(name: str) -> Image.Image:
    """Waves and noise, of a size off every grid."""
    height, width = IMAGES[name]
    rng = np.random.default_rng(len(name) * height)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (3 + 2 * c) + y / (5 + c)) * 90 + 128 for c in range(3)]
    noise = rng.integers(-30, 31, (height, width, 3))
    return Image.fromarray(np.clip(np.stack(waves, 2) + noise, 0, 255).astype(np.uint8))


def prompt(parts: tuple[int | str, ...]) -> list[int | str]:
    """Tokens without a period, and names of images."""
    made: list[int | str] = []
    for part in parts:
        if isinstance(part, str):
            made += [TOKENS["vision_start_token_id"], part, TOKENS["vision_end_token_id"]]
        else:
            made += [(7 * i * i + 11 * len(made) + 3 * i) % 300 for i in range(part)]
    return made


@torch.no_grad()
def expected(
    model: torch.nn.Module, processor: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """The two files of a set; None where a greedy token is not clear."""
    merge = model.config.vision_config.spatial_merge_size
    arrays: dict[str, torch.Tensor] = {}
    seen: dict[str, Any] = {}
    for name in IMAGES:
        made = processor(images=[picture(name)], return_tensors="pt")
        patches, grid = made["pixel_values"], made["image_grid_thw"]
        found = model.model.get_image_features(patches, grid, return_dict=True).pooler_output[0]
        arrays[f"embeddings.{name}"] = found
        seen[name] = (patches, grid, int(grid.prod()) // merge**2)
    prompts = [prompt(parts) for parts in PROMPTS]
    last, last_greedy, greedy, margin = [], [], [], math.inf
    for tokens in prompts:
        names = [token for token in tokens if isinstance(token, str)]
        text: list[int] = []
        for token in tokens:
            text += (
                [token] if isinstance(token, int) else [TOKENS["image_token_id"]] * seen[token][2]
            )
        inputs = {
            "pixel_values": torch.cat([seen[n][0] for n in names]),
            "image_grid_thw": torch.cat([seen[n][1] for n in names]),
        }
        ids, cache = (
            torch.tensor([text]),
            transformers.DynamicCache(config=model.config.text_config),
        )
        types = (ids == TOKENS["image_token_id"]).int()
        given = inputs | {"mm_token_type_ids": types}
        for n in range(N_GREEDY):
            logits = model(ids, cache=cache, use_cache=True, **given).logits[0, -1]
            if n == 0:
                last.append(logits)
            best = logits.topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            if margin < LEAST_MARGIN:
                return None
            text.append(int(best.indices[0]))
            ids, given = torch.tensor([text[-1:]]), {}
        greedy.append(text[-N_GREEDY:])
        last_greedy.append(logits)
    arrays |= {"logits_last": torch.stack(last), "greedy_logits_last": torch.stack(last_greedy)}
    info = {
        "transformers": transformers.__version__, "torch": torch.__version__, "margin": margin,
        "prompts": prompts, "greedy": greedy,
        "grids": {name: s[1][0].tolist() for name, s in seen.items()},
        "patches": {
            name: hashlib.sha256(s[0].numpy().tobytes()).hexdigest() for name, s in seen.items()
        },
    }  # fmt: skip
    return info, {name: x.contiguous().clone() for name, x in arrays.items()}


def write(name: str) -> None:
    """One set, of the first seed whose greedy tokens are clear."""
    text, vision, size = SETS[name]
    settings = {
        "size": size, "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"], "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }  # fmt: skip
    processor = Qwen2VLImageProcessorPil(**settings)
    for seed in range(1000):
        model = build(text, vision, seed)
        if (made := expected(model, processor)) is not None:
            break
    else:
        raise SystemExit(f"{name}: no seed below 1000 has clear greedy tokens")
    info, arrays = made
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for image in IMAGES:
        picture(image).save(folder / f"{image}.png")
    weights = {n: w.bfloat16().clone() for n, w in model.state_dict().items()}
    weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors")
    save_file(arrays, folder / "expected.safetensors")
    config = {
        "model_type": "qwen3_5", "text_config": text, "vision_config": vision, **TOKENS,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "expected.json").write_text(json.dumps(info) + "\n")
    std = float(arrays["logits_last"].std())
    print(f"{name}: seed {seed}, least margin {info['margin']:.3f}, logits of std {std:.2f}")


if __name__ == "__main__":
    for chosen_name in sys.argv[1:]:
        write(chosen_name)
