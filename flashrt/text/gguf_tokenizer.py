"""The tokenizer and the chat template that a GGUF file keeps in its metadata.

IS: `tokenizer.ggml.*` written as the tokenizer.json that says the same, so that one class encodes
for both; its template; the ids that end a turn. IS NOT: a reader of GGUF files: it is given their
metadata as a mapping.

Two kinds are known. `gpt2`: byte-level BPE; the file names the rule that cuts a text into words,
and the rule itself is in the table here. `llama`: SentencePiece's BPE; the file holds scores in
place of merges, and bytes stand for what has no token. Rules after the converter of llama.cpp and
the tokenizer.json files that the names were made from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.text.template import ChatTemplate
from flashrt.text.tokenizer import Tokenizer

MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
SCORES, MERGES = "tokenizer.ggml.scores", "tokenizer.ggml.merges"
ADD_BOS, ADD_SPACE = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"
TEMPLATE, TEMPLATE_NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"
DEFAULT_TEMPLATE = "default"

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # token_type
_LONGEST = 512  # characters of a token that may be made by merging; known ones have under 100
_SPACE = "▁"  # a space, in the tokens of SentencePiece
_WAY_OUT = "use the model's original, with its tokenizer.json, or convert it again"
_SPECIAL = {  # what a template calls a token, by the name that GGUF has for it
    "bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "seperator": "sep_token",
    "padding": "pad_token", "cls": "cls_token", "mask": "mask_token",
}  # fmt: skip
# Files often name only the token that ends a document, and these end a turn wherever they exist.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|return|>")

_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)  # fmt: skip
_DIGITS_GPT2 = (r"\p{N}", *_GPT2)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANK = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANK}",
)
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANK}",
)
_LLAMA3 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANK}",
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*",
)
_TEKKEN = (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANK}",)
_GPT4O = (
    rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANK}",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class _Rule:
    """How a byte-level tokenizer cuts a text into words before it merges.

    Each expression cuts what the ones before it left. `is_whole`: a word that is a token is that
    token, whatever the merges say. `is_nfc`: the text is composed first.
    """

    expressions: tuple[str, ...]
    is_whole: bool = False
    is_nfc: bool = False


_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(("gpt-2", "phi-2", "trillion", "granite-docling"), _Rule(_GPT2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone"), _Rule(_DIGITS_GPT2)),
    "command-r": _Rule(_DIGITS_GPT2, is_nfc=True),
    "qwen2": _Rule(_QWEN2, is_nfc=True),
    "deepseek-r1-qwen": _Rule(_QWEN2),
    "qwen35": _Rule(_QWEN35, is_nfc=True),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2"),
        _Rule(_LLAMA3, is_whole=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Rule(_LLAMA3)),
    "tekken": _Rule(_TEKKEN, is_whole=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Rule(_GPT4O)),
    "default": _Rule(_DEFAULT),
}


@dataclass(frozen=True, slots=True)
class GgufText:
    """What a GGUF file says about text. `template` is None where it has none.

    stop_tokens: ids that end a turn or a document. bos_token: the id that begins a text;
    `adds_bos`: whether a text without a template is to begin with it.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    stop_tokens: tuple[int, ...]
    bos_token: int | None
    adds_bos: bool


def text_of_gguf(metadata: Mapping[str, object], path: Path) -> GgufText | None:
    """All of it; None for a file without a tokenizer. `path` is named in errors.

    Raises CheckpointError for a tokenizer that is not known here, or is damaged.
    """
    if MODEL not in metadata:
        return None
    vocabulary = _Vocabulary(metadata, path)
    bos = vocabulary.special_id("bos")
    adds_bos = metadata.get(ADD_BOS, vocabulary.is_sentencepiece)
    return GgufText(
        tokenizer=Tokenizer(path, json.dumps(_document(vocabulary, metadata, path))),
        template=template_of_gguf(metadata, path),
        stop_tokens=vocabulary.stop_tokens(),
        bos_token=bos,
        adds_bos=bool(adds_bos) and bos is not None,
    )


def template_of_gguf(
    metadata: Mapping[str, object], path: Path, name: str = DEFAULT_TEMPLATE
) -> ChatTemplate | None:
    """A chat template by name, such as `tool_use`; None if the file has none of that name.

    Raises CheckpointError for a source that is no template.
    """
    key = TEMPLATE if name == DEFAULT_TEMPLATE else f"{TEMPLATE}.{name}"
    source = metadata.get(key, metadata.get(f"{TEMPLATE}.{name}"))
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{path}: {key} is {shown(source)}; expected a text")
    tokens = _Vocabulary(metadata, path).special_tokens() if MODEL in metadata else {}
    try:
        return ChatTemplate(source, tokens)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {key}: {error}") from error


def template_names(metadata: Mapping[str, object]) -> tuple[str, ...]:
    """Names that `template_of_gguf` takes."""
    others = sorted(
        k.removeprefix(f"{TEMPLATE}.") for k in metadata if k.startswith(f"{TEMPLATE}.")
    )
    return tuple(dict.fromkeys(([DEFAULT_TEMPLATE] if TEMPLATE in metadata else []) + others))


class _Vocabulary:
    """Tokens and their types, checked."""

    def __init__(self, metadata: Mapping[str, object], path: Path) -> None:
        self._metadata, self._path = metadata, path
        kind = metadata.get(MODEL)
        if kind not in ("gpt2", "llama"):
            raise CheckpointError(
                f"{path}: {MODEL} is {shown(kind)}; flashrt knows gpt2 (byte-level BPE) and llama "
                f"(SentencePiece): {_WAY_OUT}"
            )
        self.is_sentencepiece = kind == "llama"
        self.tokens = _texts(metadata, TOKENS, path)
        self.types = _numbers(metadata, TYPES, path, len(self.tokens), _NORMAL)

    def ids(self) -> dict[str, int]:
        """Ids by token. Unused ones fill up a matrix and stand for nothing; of two tokens that are
        spelled alike a text gets the first.
        """
        found: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            if self.types[i] != _UNUSED:
                found.setdefault(token, i)
        return found

    def added(self) -> list[tuple[int, str, bool]]:
        """Tokens that a text may spell out, and whether they are special."""
        special = (_CONTROL, _UNKNOWN)
        return [
            (i, token, self.types[i] in special)
            for token, i in self.ids().items()
            if token and self.types[i] in (*special, _USER_DEFINED)
        ]

    def special_id(self, name: str) -> int | None:
        """The id of `tokenizer.ggml.NAME_token_id`; None if the file does not say."""
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"{self._path}: {key} is {shown(value)}; expected a token id")
        if value >= len(self.tokens):  # some converters write 2^32 - 1 for none
            return None
        return value

    def special_tokens(self) -> dict[str, str]:
        """The spellings that a template asks for by name."""
        ids = {called: self.special_id(name) for name, called in _SPECIAL.items()}
        return {called: self.tokens[i] for called, i in ids.items() if i is not None}

    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a turn or a document."""
        named = [self.special_id(name) for name in ("eos", "eot", "eom")]
        known = self.ids()
        spelled = [known.get(text) for text in _TURN_ENDS]
        control = [i for i in spelled if i is not None and self.types[i] == _CONTROL]
        return tuple(dict.fromkeys([i for i in named if i is not None] + control))


def _document(
    vocabulary: _Vocabulary, metadata: Mapping[str, object], path: Path
) -> dict[str, object]:
    """The tokenizer.json that says the same."""
    parts = _sentencepiece if vocabulary.is_sentencepiece else _byte_level
    added = [
        {
            "id": i, "content": token, "special": is_special, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False,
        }
        for i, token, is_special in vocabulary.added()
    ]  # fmt: skip
    return {"version": "1.0", "added_tokens": added, **parts(vocabulary, metadata, path)}


def _byte_level(
    vocabulary: _Vocabulary, metadata: Mapping[str, object], path: Path
) -> dict[str, object]:
    name = metadata.get(PRE)
    rule = _RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        said = f"{PRE} is {shown(name)}" if PRE in metadata else f"there is no {PRE}"
        raise CheckpointError(
            f"{path}: {said}, so the rule that cuts a text into words is not known here "
            f"(known are {', '.join(sorted(_RULES))}): {_WAY_OUT}"
        )
    merges = [_pair(merge, path) for merge in _texts(metadata, MERGES, path)]
    cuts = [
        {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
        for text in rule.expressions
    ]
    level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    return {
        "normalizer": {"type": "NFC"} if rule.is_nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "decoder": level,
        "model": {
            "type": "BPE", "vocab": vocabulary.ids(), "merges": merges,
            "ignore_merges": rule.is_whole,
        },
    }  # fmt: skip


def _sentencepiece(
    vocabulary: _Vocabulary, metadata: Mapping[str, object], path: Path
) -> dict[str, object]:
    scores = _numbers(metadata, SCORES, path, len(vocabulary.tokens), None)
    ids, types = vocabulary.ids(), vocabulary.types
    words = {token: i for token, i in ids.items() if types[i] in (_NORMAL, _USER_DEFINED)}
    unknown = vocabulary.special_id("unknown")
    if unknown is None and _UNKNOWN in types:
        unknown = list(types).index(_UNKNOWN)
    is_prefixed = bool(metadata.get(ADD_SPACE, True))
    prefix = [{"type": "Prepend", "prepend": _SPACE}] * is_prefixed
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    shown_spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * is_prefixed
    joined = [shown_spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": joined},
        "model": {
            "type": "BPE", "vocab": ids, "merges": _merges(words, scores),
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "fuse_unk": True, "byte_fallback": _BYTE in types,
        },
    }  # fmt: skip


def _merges(words: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that make a token, the best one's first.

    SentencePiece joins the pair whose token has the best score, of equals the one further left; so
    of two pairs that make one token, the one with the longer left part goes first.
    """
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for word, i in words.items():
        for cut in range(1, len(word) if len(word) <= _LONGEST else 0):
            left, right = word[:cut], word[cut:]
            if left in words and right in words:
                found.append((-scores[i], i, -cut, (left, right)))
    found.sort()
    return [pair for *_, pair in found]


def _pair(merge: str, path: Path) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right) or " " in right:
        raise CheckpointError(f"{path}: {MERGES} has {shown(merge)}; expected two tokens")
    return left, right


def _texts(metadata: Mapping[str, object], key: str, path: Path) -> list[str]:
    """An array of texts. Raises CheckpointError if it is none, or not there."""
    value = metadata.get(key)
    if value is None:
        raise CheckpointError(f"{path}: {key} is missing, the file is damaged: {_WAY_OUT}")
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if found is None or not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"{path}: {key} is {shown(value)}; expected a list of texts")
    return found


def _numbers(
    metadata: Mapping[str, object], key: str, path: Path, count: int, default: int | None
) -> list[Any]:
    """As many numbers as there are tokens. default: all of them where the file has none."""
    if key not in metadata and default is not None:
        return [default] * count
    value = metadata.get(key)
    found = list(value) if isinstance(value, Sequence) else []
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in found):
        raise CheckpointError(f"{path}: {key} is {shown(value)}; expected a list of numbers")
    if len(found) != count:
        raise CheckpointError(
            f"{path}: {key} has {len(found):,} entries for {count:,} tokens, the file is damaged: "
            f"{_WAY_OUT}"
        )
    return found
