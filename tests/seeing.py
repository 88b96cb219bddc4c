"""A small checkpoint that sees: the golden one, with a tokenizer of bytes and a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "golden" / "vision" / "qwen35"
FILE = GOLDEN / "small.png"
TEMPLATE = (  # what Qwen's has of images
    "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
IDS = {
    "<|image_pad|>": 300, "<|vision_start|>": 302, "<|vision_end|>": 303, "<|im_start|>": 304,
    "<|im_end|>": 305,
}  # fmt: skip


def write(folder: Path) -> Path:
    """It, in a folder that is made."""
    shutil.copytree(GOLDEN, folder)
    byte_level = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {c: i for i, c in enumerate(sorted(byte_level))}
    vocab |= {f"<unused {i}>": i for i in range(len(vocab), 300)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    names = {i: name for name, i in IDS.items()}
    for i in range(300, 306):
        made.add_special_tokens([names.get(i, "<|video_pad|>")])
    made.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def with_draft_head(folder: Path) -> Path:
    """The same with a random draft head."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner, heads, kv, size = 64, 96, 4, 2, 32
    at = "mtp.layers.0"
    shapes = {
        "mtp.fc.weight": (hidden, 2 * hidden),
        f"{at}.self_attn.q_proj.weight": (2 * heads * size, hidden),
        f"{at}.self_attn.k_proj.weight": (kv * size, hidden),
        f"{at}.self_attn.v_proj.weight": (kv * size, hidden),
        f"{at}.self_attn.o_proj.weight": (hidden, heads * size),
        f"{at}.self_attn.q_norm.weight": (size,),
        f"{at}.self_attn.k_norm.weight": (size,),
        f"{at}.mlp.gate_proj.weight": (inner, hidden),
        f"{at}.mlp.up_proj.weight": (inner, hidden),
        f"{at}.mlp.down_proj.weight": (hidden, inner),
    } | {
        f"{name}.weight": (hidden,)
        for name in (
            "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm",
            f"{at}.input_layernorm", f"{at}.post_attention_layernorm",
        )
    }  # fmt: skip
    rng, file = np.random.default_rng(11), folder / "model.safetensors"
    tensors = load_file(file)
    for name, shape in shapes.items():
        tensors[name] = (0.2 * rng.standard_normal(shape)).astype(np.float32)
    save_file(tensors, file)
    return folder
