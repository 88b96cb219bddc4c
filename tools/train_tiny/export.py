"""A training checkpoint as a Hugging Face folder that transformers and flashrt load.

    python export.py run/final.pt FOLDER

IS: config.json, bfloat16 safetensors (embeddings tied, `mtp.*` included), tokenizer.json, chat
template, generation config. IS NOT: the model card (docs/model-card.md is copied as README.md).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
import vocabulary
from model import Model, load
from safetensors.torch import save_file

from flashrt.text.template import ChatTemplate
from flashrt.worlds import building, mixed

CARD = Path(__file__).parents[2] / "docs" / "model-card.md"
TRAINING_ONLY = ("position_head.", "topic_head.")


def write_weights(model: Model, folder: Path) -> None:
    """model.safetensors: what the architecture has, nothing of training."""
    tensors = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(TRAINING_ONLY)
    }
    path = folder / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)


def write_config(model: Model, folder: Path, turn_end: int, pad: int) -> None:
    """config.json and generation_config.json."""
    config = model.config.to_dict() | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "dtype": "bfloat16",
        "eos_token_id": turn_end,
        "pad_token_id": pad,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "attn_output_gate": True,
    }
    write_json(folder / "config.json", config)
    generation = {"eos_token_id": turn_end, "pad_token_id": pad, "do_sample": False}
    write_json(folder / "generation_config.json", generation)


def write_tokenizer(folder: Path) -> tuple[int, int]:
    """tokenizer.json, its config, the template; the ids of the end of a turn and of padding."""
    tokenizer = vocabulary.build()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": vocabulary.TEMPLATE,
            "eos_token": vocabulary.TURN_END,
            "pad_token": vocabulary.PAD,
            "model_max_length": 8192,
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(vocabulary.TEMPLATE, encoding="utf-8")
    return tokenizer.token_to_id(vocabulary.TURN_END), tokenizer.token_to_id(vocabulary.PAD)


def check_template() -> None:
    """The template, applied by flashrt, gives the text that training used."""
    template = ChatTemplate(vocabulary.TEMPLATE)
    for document in (mixed.document(0, 4, 4, 8), building.Building(0, 8).document(8)):
        messages = [message.as_dict() for message in document.messages]
        shown = template.render(messages, add_generation_prompt=False)
        if shown != vocabulary.render(document.messages):
            raise ValueError("the chat template does not give the text of training")


def write_json(path: Path, value: object) -> None:
    """Indented, for people."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Write the folder, say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    a = parser.parse_args()
    check_template()
    a.folder.mkdir(parents=True, exist_ok=True)
    model = load(a.checkpoint)
    turn_end, pad = write_tokenizer(a.folder)
    write_config(model, a.folder, turn_end, pad)
    write_weights(model, a.folder)
    if CARD.exists():
        shutil.copy(CARD, a.folder / "README.md")
    size = sum(file.stat().st_size for file in a.folder.iterdir())
    print(f"{a.folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
