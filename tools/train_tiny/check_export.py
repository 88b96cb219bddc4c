"""Compare an exported folder in transformers and in flashrt: python check_export.py FOLDER

IS: tokens of a whole dialogue, and greedy answers, by both, in float32 and in bfloat16 weights as
exported. IS NOT: an evaluation (evaluate).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from evaluate import Chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashrt.worlds import mixed
from flashrt.worlds.document import HELD_OUT, Document

NEW_TOKENS = 24


def compare(folder: Path, document: Document, chat: Chat) -> tuple[int, int]:
    """Answers that agree, of all. Raises ValueError if the tokens of the chat differ."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    agreed = asked = 0
    for i, message in enumerate(document.messages):
        if message.role != "assistant":
            continue
        before = document.messages[:i]
        shown = [m.as_dict() for m in before]
        theirs = tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_dict=True)
        ours = chat.tokens(before, prompt=True)
        if theirs["input_ids"] != ours:
            raise ValueError(f"tokens differ before the assistant's turn {i}")
        made = model.generate(
            torch.tensor([ours]), attention_mask=torch.ones(1, len(ours), dtype=torch.long),
            max_new_tokens=NEW_TOKENS, do_sample=False,
        )  # fmt: skip
        expected = [t for t in made[0, len(ours) :].tolist() if t != chat.stop]
        with chat.engine.session() as session:
            session.prefill(ours)
            answer = list(session.generate(NEW_TOKENS, stop=[chat.stop]))
        agreed += answer == expected
        asked += 1
        if i < 8:
            print(f"{before[-1].content[-60:]!r} -> {chat.tokenizer.decode(answer)!r}")
    return agreed, asked


def main() -> None:
    """Exit with an error if an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    chat = Chat(folder, "cpu")
    counts = [compare(folder, mixed.document(HELD_OUT + i, 10, 5, 12, 3), chat) for i in range(2)]
    agreed, asked = (sum(c[i] for c in counts) for i in range(2))
    print(f"{agreed} of {asked} answers are the same tokens in transformers and in flashrt")
    if agreed != asked:
        raise SystemExit("they differ")


if __name__ == "__main__":
    main()
