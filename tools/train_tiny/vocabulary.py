"""The tokenizer of the tiny model: byte-level BPE on the worlds' words, and a Qwen-style template.

IS: `build()` -> a tokenizers.Tokenizer in which every word of the worlds is one token and any other
text falls apart into smaller pieces, down to bytes. IS NOT: a general tokenizer.

A turn opener (`<|im_start|>user` and its line break) is one token: rows of 48 tokens, with which
training starts, then hold a whole dialogue.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from flashrt.worlds import building, inventory, mixed, moves, robot, story, updates
from flashrt.worlds.document import Message
from flashrt.worlds.names import (
    COLORS,
    DIRECTIONS,
    HEROES,
    MOODS,
    NUMBERS,
    PLACES,
    THINGS,
    VERBS,
)

VOCAB_SIZE = 1024
PAD, TURN_END = "<|endoftext|>", "<|im_end|>"
OPENERS = {role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")}
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_SPLIT = (  # how Qwen's tokenizers cut text before merging
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Text of a turn starts with a blank, as words do in the middle of a sentence; tags do not.
TEMPLATE = """\
{%- for message in messages -%}
{%- set content = message.content | trim -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response> ' + content + '</tool_response><|im_end|>' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{{- '' if content.startswith('<') else ' ' -}}
{{- content + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def render(messages: Sequence[Message]) -> str:
    """What TEMPLATE makes of messages; the export checks that they agree."""
    turns = []
    for message in messages:
        content = message.content.strip()
        if message.role == "tool":
            text = f"{OPENERS['user']}<tool_response> {content}</tool_response>"
        else:
            text = OPENERS[message.role] + ("" if content.startswith("<") else " ") + content
        turns.append(text + TURN_END)
    return "".join(turns)


def _corpus() -> list[str]:
    """Every word of the worlds, many times, none much more often than another."""
    told = [
        inventory.Inventory(0, 40, 20).document(3), updates.document(0, 20, 2),
        moves.document(0, 40, 3), building.Building(0, 20).document(20), robot.document(0, 20),
        mixed.document(0, 8, 8, 20), *(story.document(seed, 20) for seed in range(20)),
    ]  # fmt: skip
    words = {
        w for d in told for m in d.messages for w in re.sub(r"<[^>]*>", " ", m.content).split()
    }
    words |= {*COLORS, *THINGS, *PLACES, *NUMBERS, *DIRECTIONS, *HEROES, *MOODS, *VERBS}
    return [f" {word}" for word in sorted(words)] * 8


@cache
def build() -> Tokenizer:
    """The same tokenizer every time. Raises ValueError if a word of the worlds is not one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(text, special=True, normalized=False)
        for text in (PAD, TURN_END, *OPENERS.values())
    ]
    tags = [AddedToken(text, normalized=False) for text in TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=1,
        show_progress=False,
        special_tokens=[*control, *tags],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    corpus = _corpus()
    tokenizer.train_from_iterator(corpus, trainer)
    split = sorted({w for w in corpus if len(tokenizer.encode(w).ids) != 1})
    if split:
        raise ValueError(f"{len(split)} words are not one token; VOCAB_SIZE is too small: {split}")
    return _with_visible_tags(tokenizer)


def _with_visible_tags(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer makes all its own tokens special; tags are text, and must not vanish with the
    control tokens when ids are decoded.
    """
    held = json.loads(tokenizer.to_str())
    for token in held["added_tokens"]:
        token["special"] = token["content"] not in TAGS
    return Tokenizer.from_str(json.dumps(held))
