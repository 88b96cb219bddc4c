"""A small checkpoint that sees: the golden one, with a tokenizer of bytes and a chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

import tokenizers

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
