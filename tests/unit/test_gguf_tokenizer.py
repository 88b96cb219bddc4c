"""Tokenizers and templates out of GGUF metadata, beside those that they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from flashrt.base.errors import CheckpointError
from flashrt.text.gguf_tokenizer import GgufText, template_names, template_of_gguf, text_of_gguf
from flashrt.text.template import chat_template_of
from flashrt.text.tokenizer import Tokenizer
from flashrt.weights.bundled import bundled_checkpoint

FILE = Path("model.gguf")
ORIGINAL = json.loads((bundled_checkpoint() / "tokenizer.json").read_text())
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
WORDS = "tell me a story about the fox , then it 's 12345 days later . I'VE been thereﬁ e\u0301é"


def of(metadata: Mapping[str, object]) -> GgufText:
    found = text_of_gguf(metadata, FILE)
    assert found is not None
    return found


def byte_level(pre: str, original: Any = ORIGINAL, **others: object) -> dict[str, object]:
    """The metadata that a converter writes for a tokenizer.json, and two ids that fill up."""
    vocabulary: dict[str, int] = original["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    types = [NORMAL] * len(tokens)
    for token in original["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "[PAD1]", "[PAD2]"],
        "tokenizer.ggml.token_type": [*types, UNUSED, UNUSED],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in original["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **others,
    }


# -- byte-level -----------------------------------------------------------------------------------


def cut(expression: str) -> Any:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


DIGITS = pre_tokenizers.Sequence([
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
])  # fmt: skip
ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = cut(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}"
)
ORIGINALS: dict[str, tuple[Any, Any, bool]] = {  # what their tokenizer.json has
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), None, False),
    "smollm": (DIGITS, None, False),
    "starcoder": (DIGITS, None, False),
    "llama-bpe": (LLAMA3, None, True),
    "dbrx": (LLAMA3, None, False),
    "qwen2": (
        cut(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}"
        ),
        normalizers.NFC(),
        False,
    ),
}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_ids_are_those_of_the_original(pre: str) -> None:
    """Red when the rule behind a name is another one, or text is not composed where it should be.

    The vocabulary is the bundled one, with a word that no merges lead to, and two digits in one.
    """
    rule, normalizer, is_whole = ORIGINALS[pre]
    document = json.loads(json.dumps(ORIGINAL))
    for word in ("Ġfoxx", "12"):
        document["model"]["vocab"][word] = len(document["model"]["vocab"])
    document["model"]["merges"].append(["1", "2"])
    document["model"]["ignore_merges"] = is_whole
    library = tokenizers.Tokenizer.from_str(json.dumps(document))
    library.pre_tokenizer = rule
    if normalizer is not None:
        library.normalizer = normalizer
    original = Tokenizer(FILE, library.to_str())
    made = of(byte_level(pre, document)).tokenizer
    assert made.encode(f"a foxx {WORDS}") == original.encode(f"a foxx {WORDS}")
    assert made.vocab_size == original.vocab_size and made.added_tokens == original.added_tokens

    @settings(max_examples=80, deadline=None)
    @given(
        st.lists(
            st.sampled_from(
                [*WORDS.split(), " foxx", "<|im_end|>", "<tool_call>", "\n", "  ", "\t"]
            )
            | st.text(max_size=6)
        )
    )
    def check(parts: list[str]) -> None:
        for text in ("".join(parts), " ".join(parts)):
            ids = made.encode(text)
            assert ids == original.encode(text)
            assert made.decode(ids) == original.decode(ids)

    check()


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("qwen35", ["don", "'T", " sq\u0301x", " ", "1", "2", "3", "4", "!!\n"]),
        ("qwen2", ["don", "'T", " sq", "\u0301x", " ", "1", "2", "3", "4", "!!\n"]),
        ("deepseek-r1-qwen", ["don", "'T", " sq", "\u0301x", " ", "1", "2", "3", "4", "!!\n"]),
        ("smollm", ["don", "'", "T", " sq", "\u0301", "x", " ", "1", "2", "3", "4", "!!", "\n"]),
        ("gpt-2", ["don", "'", "T", " sq", "\u0301", "x", " 1234", "!!", "\n"]),
        ("llama3", ["don", "'T", " sq", "\u0301x", " ", "123", "4", "!!\n"]),
        ("default", ["don", "'", "T", " sq", "\u0301", "x", " ", "123", "4", "!!", "\n"]),
        ("tekken", ["don", "'T", " sq\u0301x", " ", "1", "2", "3", "4", "!!\n"]),
        ("gpt-4o", ["don'T", " sq\u0301x", " ", "123", "4", "!!\n"]),
    ],
)
def test_each_rule_cuts_words_in_its_own_way(pre: str, words: list[str]) -> None:
    """Red when a name stands for the rule of another."""
    library = tokenizers.Tokenizer.from_str(of(byte_level(pre)).tokenizer.to_json())
    text = "don'T sq\u0301x 1234!!\n"
    cuts = [text[i:j] for _, (i, j) in library.pre_tokenizer.pre_tokenize_str(text)]
    assert cuts == words


def test_ids_that_fill_up_stand_for_nothing() -> None:
    """Red when an id of the matrix that no token has comes out as text, or is found in one."""
    made = of(byte_level("qwen2")).tokenizer
    last = len(ORIGINAL["model"]["vocab"])
    assert made.decode([last, last + 1]) == "" and made.token_id("[PAD1]") is None
    assert last not in made.encode("[PAD1]")


# -- SentencePiece --------------------------------------------------------------------------------


def sentencepiece(scores: Mapping[str, float], **others: object) -> dict[str, object]:
    """Metadata as of a `llama` file: unknown, two control tokens, 256 bytes, then words."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *spelled, *scores, "<x>"],
        "tokenizer.ggml.scores": [0.0] * 259 + [*scores.values(), 0.0],
        "tokenizer.ggml.token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
        + [NORMAL] * len(scores) + [USER_DEFINED],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **others,
    }  # fmt: skip


def joined(text: str, scores: Mapping[str, float]) -> list[str]:
    """SentencePiece's rule: of all neighbours that make a token, the best-scored join; of equals
    the leftmost.
    """
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(parts))]
        known = [(score, at) for score, at in pairs if score is not None]
        if not known:
            return parts
        at = -max(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


PIECES = ["ab", "ba", "aa", "▁a", "▁b", "aab", "▁aa", "abab", "▁▁", "▁▁▁", "bb", "▁ab", "aaaa"]


@settings(max_examples=120, deadline=None)
@given(
    st.permutations(PIECES),
    st.lists(st.text("ab é日", max_size=12), max_size=3),
)
def test_pieces_join_as_sentencepiece_joins_them(
    order: Sequence[str], texts: Sequence[str]
) -> None:
    """Red when merges follow the order of ids in place of the scores, or bytes do not fall back."""
    scores = {piece: -float(order.index(piece)) for piece in PIECES}
    scores |= {character: -100.0 - i for i, character in enumerate("ab▁")}
    made = of(sentencepiece(scores)).tokenizer
    for text in texts:
        ids: list[int] = []
        for piece in joined(text, scores):
            known = made.token_id(piece)
            ids += [3 + b for b in piece.encode()] if known is None else [known]
        assert made.encode(text) == ids
        assert made.decode(ids) == text


def test_sentencepiece_in_pieces() -> None:
    scores = {"▁": -1.0, "a": -2.0, "▁a": -0.5}
    text = of(sentencepiece(scores))
    made = text.tokenizer
    assert (text.bos_token, text.adds_bos, text.stop_tokens) == (1, True, (2,))
    assert made.encode("a<x>a</s>") == [261, 262, 261, 2]
    assert made.byte_tokens == frozenset(range(3, 259)) and made.unknown_id == 0
    stream = made.stream()
    assert "".join(map(stream.push, made.encode("a 日"))) + stream.flush() == "a 日"
    bare = of(sentencepiece(scores, **{"tokenizer.ggml.add_space_prefix": False}))
    assert bare.tokenizer.encode("a") == [260] and bare.tokenizer.decode([261]) == " a"
    silent = of(sentencepiece(scores, **{"tokenizer.ggml.add_bos_token": False}))
    assert not silent.adds_bos


# -- templates, special tokens --------------------------------------------------------------------


def test_the_bundled_template_out_of_metadata() -> None:
    original = chat_template_of(bundled_checkpoint())
    assert original is not None
    metadata = byte_level("qwen2") | {
        "tokenizer.chat_template": original.source,
        "tokenizer.chat_template.tool_use": "{{ bos_token }}{{ eos_token }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    text = of(metadata)
    messages = [{"role": "user", "content": "hello"}]
    assert text.template is not None
    assert text.template.render(messages) == original.render(messages)
    assert template_names(metadata) == ("default", "tool_use")
    other = template_of_gguf(metadata, FILE, "tool_use")
    assert other is not None and other.render([]) == "<|endoftext|><|im_end|>"
    assert (
        template_of_gguf(metadata, FILE, "rag") is None and of(byte_level("qwen2")).template is None
    )


def test_a_turn_ends_where_the_file_forgot_to_say_so() -> None:
    """Red when only `eos_token_id` counts: many files name the end of a document there."""
    metadata = byte_level("qwen2") | {"tokenizer.ggml.eos_token_id": 0}
    assert of(metadata).stop_tokens == (0, 1)
    assert of(metadata | {"tokenizer.ggml.eot_token_id": 5}).stop_tokens == (0, 5, 1)
    no_end = metadata | {"tokenizer.ggml.eos_token_id": 2**32 - 1}
    assert of(no_end).stop_tokens == (1,)
    assert not of(metadata).adds_bos and of(metadata).bos_token == 0
    assert of(metadata | {"tokenizer.ggml.add_bos_token": True}).adds_bos


REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "another rule": ({"pre": "kimi-k2"}, r"pre is 'kimi-k2'.*known are .*qwen35.*tokenizer\.json"),
    "another kind": ({"model": "t5"}, r"model is 't5'; flashrt knows gpt2 .* and llama"),
    "no merges": ({"merges": None}, r"merges is missing"),
    "a merge of three": ({"merges": ["a b c"]}, r"merges has 'a b c'; expected two tokens"),
    "a merge of none": ({"merges": ["zz zz"]}, r"not a usable tokenizer"),
    "few types": ({"token_type": [1]}, r"token_type has 1 entries for 649 tokens"),
    "types of text": ({"token_type": ["1"] * 649}, r"expected a list of numbers"),
    "no tokens": ({"tokens": [1, 2]}, r"tokens is \[1, 2\]; expected a list of texts"),
    "an id of text": ({"eos_token_id": "1"}, r"eos_token_id is '1'; expected a token id"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_is_named(case: str) -> None:
    changes, said = REFUSALS[case]
    changed = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    metadata = {k: v for k, v in (byte_level("qwen2") | changed).items() if v is not None}
    with pytest.raises(CheckpointError, match=rf"^model\.gguf: .*{said}"):
        text_of_gguf(metadata, FILE)


def test_files_without_a_tokenizer_or_with_a_broken_template() -> None:
    assert text_of_gguf({"general.architecture": "llama"}, FILE) is None
    without = byte_level("qwen2")
    del without["tokenizer.ggml.pre"]
    with pytest.raises(CheckpointError, match=r"there is no tokenizer\.ggml\.pre"):
        text_of_gguf(without, FILE)
    for source in ("{% if", 3):
        with pytest.raises(CheckpointError, match=r"^model\.gguf: tokenizer\.chat_template"):
            of(byte_level("qwen2") | {"tokenizer.chat_template": source})
    scores = {"a": float("nan")}
    with pytest.raises(CheckpointError, match=r"scores .* expected a list of numbers"):
        of(sentencepiece(scores))
