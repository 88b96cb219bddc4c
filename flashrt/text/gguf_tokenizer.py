"""The tokenizer and the chat template that a GGUF file keeps in its metadata.

IS: `tokenizer.ggml.*` as the library's object that the tokenizer.json which says the same would
become, so that one class encodes for both; its template; the ids that end a turn. IS NOT: a reader
of GGUF files: it is given their metadata as a mapping.

Two kinds are known. `gpt2`: byte-level BPE; the file names the rule that cuts a text into words,
and the rule itself is in the table here. `llama`: SentencePiece's BPE; the file holds scores in
place of merges, and bytes stand for what has no token. Rules after the converter of llama.cpp and
the tokenizer.json files that the names were made from.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.text.template import ChatTemplate
from flashrt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

MODEL, PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
SCORES, MERGES = "tokenizer.ggml.scores", "tokenizer.ggml.merges"
TABLES = (TOKENS, TYPES, SCORES, MERGES)  # of a vocabulary: most of a file's metadata
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
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2", "pixtral"),
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
        tokenizer=_tokenizer(vocabulary, metadata, path),
        template=_template(metadata, path, DEFAULT_TEMPLATE, vocabulary),
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
    return _template(metadata, path, name, None)


def _template(
    metadata: Mapping[str, object], path: Path, name: str, vocabulary: _Vocabulary | None
) -> ChatTemplate | None:
    key = TEMPLATE if name == DEFAULT_TEMPLATE else f"{TEMPLATE}.{name}"
    source = metadata.get(key, metadata.get(f"{TEMPLATE}.{name}"))
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{path}: {key} is {shown(source)}; expected a text")
    if vocabulary is None and MODEL in metadata:
        vocabulary = _Vocabulary(metadata, path)
    tokens = {} if vocabulary is None else vocabulary.special_tokens()
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

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by token. Unused ones fill up a matrix and stand for nothing; of two tokens that are
        spelled alike a text gets the first.
        """
        last_first = zip(reversed(self.tokens), range(len(self.tokens) - 1, -1, -1), strict=True)
        if _UNUSED not in self.types:
            return dict(last_first)
        return {token: i for token, i in last_first if self.types[i] != _UNUSED}

    def added(self) -> list[tuple[str, bool]]:
        """Tokens that a text may spell out, and whether they are special, in the order of ids."""
        special = {_CONTROL, _UNKNOWN}
        wanted = {*special, _USER_DEFINED}
        places = [i for i, kind in enumerate(self.types) if kind in wanted]
        return [
            (token, self.types[i] in special)
            for i in places
            if (token := self.tokens[i]) and self.ids[token] == i
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
        known = self.ids
        spelled = [known.get(text) for text in _TURN_ENDS]
        control = [i for i in spelled if i is not None and self.types[i] == _CONTROL]
        return tuple(dict.fromkeys([i for i in named if i is not None] + control))


def _tokenizer(vocabulary: _Vocabulary, metadata: Mapping[str, object], path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json which says the same would become.

    The library is given the tables as they are: to write and parse a file of that many tokens
    takes several times as long, and twice the memory.
    """
    parts = _sentencepiece if vocabulary.is_sentencepiece else _byte_level
    rules, model = parts(vocabulary, metadata, path)

    def library() -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models

        empty = {"type": "BPE", "vocab": {}, "merges": []}
        document = {"version": "1.0", "added_tokens": [], "model": empty, **rules}
        made = tokenizers.Tokenizer.from_str(json.dumps(document))
        made.model = models.BPE(**model)
        for is_special, run in itertools.groupby(vocabulary.added(), lambda added: added[1]):
            tokens = [
                tokenizers.AddedToken(token, special=is_special, normalized=False)
                for token, _ in run
            ]
            (made.add_special_tokens if is_special else made.add_tokens)(tokens)
        return made

    return Tokenizer(path, library)


# What goes around a model, as tokenizer.json has it; and the arguments of the library's BPE.
_Parts = tuple[dict[str, object], dict[str, Any]]


def _byte_level(vocabulary: _Vocabulary, metadata: Mapping[str, object], path: Path) -> _Parts:
    name = metadata.get(PRE)
    rule = _RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        said = f"{PRE} is {shown(name)}" if PRE in metadata else f"there is no {PRE}"
        raise CheckpointError(
            f"{path}: {said}, so the rule that cuts a text into words is not known here "
            f"(known are {', '.join(sorted(_RULES))}): {_WAY_OUT}"
        )
    merges = _pairs(_texts(metadata, MERGES, path), path)
    cuts = [
        {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
        for text in rule.expressions
    ]
    level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    rules: dict[str, object] = {
        "normalizer": {"type": "NFC"} if rule.is_nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, level]},
        "decoder": level,
    }
    return rules, {"vocab": vocabulary.ids, "merges": merges, "ignore_merges": rule.is_whole}


def _sentencepiece(vocabulary: _Vocabulary, metadata: Mapping[str, object], path: Path) -> _Parts:
    scores = _numbers(metadata, SCORES, path, len(vocabulary.tokens), None)
    ids, types = vocabulary.ids, vocabulary.types
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
    rules: dict[str, object] = {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": joined},
    }
    return rules, {
        "vocab": ids, "merges": _merges(words, scores),
        "unk_token": None if unknown is None else vocabulary.tokens[unknown],
        "fuse_unk": True, "byte_fallback": _BYTE in types,
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


def _pairs(merges: list[str], path: Path) -> list[tuple[str, str]]:
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    if not {*map(len, pairs)} <= {2} or not all(map(all, pairs)):
        wrong = next(m for m, p in zip(merges, pairs, strict=True) if len(p) != 2 or "" in p)
        raise CheckpointError(f"{path}: {MERGES} has {shown(wrong)}; expected two tokens")
    return pairs


def _are(kinds: tuple[type, ...], values: Sequence[object]) -> bool:
    """Whether all values are of these types. A few types are looked at, not each value."""
    return all(issubclass(kind, kinds) for kind in {*map(type, values)})


def _texts(metadata: Mapping[str, object], key: str, path: Path) -> list[str]:
    """An array of texts. Raises CheckpointError if it is none, or not there."""
    value = metadata.get(key)
    if value is None:
        raise CheckpointError(f"{path}: {key} is missing, the file is damaged: {_WAY_OUT}")
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if found is None or not _are((str,), found):
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
    if not _are((int, float), found) or (
        float in {*map(type, found)} and not all(map(math.isfinite, found))
    ):
        raise CheckpointError(f"{path}: {key} is {shown(value)}; expected a list of numbers")
    if len(found) != count:
        raise CheckpointError(
            f"{path}: {key} has {len(found):,} entries for {count:,} tokens, the file is damaged: "
            f"{_WAY_OUT}"
        )
    return found
