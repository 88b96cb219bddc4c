"""Tokenizer, stream decoder and chat templates."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from flashrt.base.errors import CheckpointError, TokenError
from flashrt.text.stops import StopStrings
from flashrt.text.template import ChatError, ChatTemplate, chat_template_of
from flashrt.text.tokenizer import Tokenizer, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE without merges: one token per byte, so every character of two bytes or more is
    cut; and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|im_end|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save(str(folder / "tokenizer.json"))
    found = tokenizer_of(folder)
    assert found is not None
    return found


def test_encode_and_decode(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 257 and tokenizer.token_id("<|im_end|>") == 256
    assert tokenizer.token_id("<|nothing|>") is None
    ids = tokenizer.encode("né<|im_end|>")
    assert len(ids) == 4 and ids[-1] == 256
    assert tokenizer.decode(ids) == "né"
    assert tokenizer.decode(ids, skip_special=False) == "né<|im_end|>"
    with pytest.raises(TokenError, match="token ids"):
        tokenizer.decode([-1])


def test_stream_holds_back_half_characters(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(t) for t in tokenizer.encode("a🙂é")]
    assert pieces == ["a", "", "", "", "🙂", "", "é"]
    assert stream.flush() == ""


def test_stream_lets_go_of_bytes_that_are_no_character(tokenizer: Tokenizer) -> None:
    stream, half = tokenizer.stream(), tokenizer.encode("é")[:1]
    pieces = [stream.push(half[0]) for _ in range(200)]
    assert "".join(pieces).count("\ufffd") == 199
    assert stream.flush() == "\ufffd"


def test_a_hidden_token_swallows_no_space(tmp_path: Path) -> None:
    """Red when a special or unknown id is kept as what came before: what follows is taken for the
    first token, whose space is stripped.
    """
    words = built(tmp_path, ["▁Hello", "▁world"], decoders.Metaspace())
    special = words.token_id("<|s|>")
    assert special is not None
    for hidden in (special, 1000):
        stream = words.stream()
        assert [stream.push(t) for t in (0, hidden, 1)] == ["Hello", "", " world"]


def test_tokens_that_end_inside_characters_do_no_damage(tmp_path: Path) -> None:
    """Red when tokens are counted instead of bytes: each of these ends inside a character."""
    alphabet = _byte_alphabet()
    text = "日" * 40
    data = text.encode()
    cuts = [data[:1], *(data[i : i + 3] for i in range(1, len(data) - 2, 3)), data[-2:]]
    pieces = ["".join(alphabet[b] for b in cut) for cut in cuts]
    tokens = built(tmp_path, list(dict.fromkeys(pieces)), decoders.ByteLevel())
    ids = [token for piece in pieces if (token := tokens.token_id(piece)) is not None]
    stream = tokens.stream()
    given = [stream.push(token) for token in ids]
    assert len(ids) == 41 and "".join(given) + stream.flush() == tokens.decode(ids) == text
    assert given[1:] == ["日"] * 40


WORDS = [
    "▁a", "b", "▁", "▁▁", "▁▁▁", "c▁", "##d", "##", "é", "日", "\ufffd", "x</w>", ".", ",", " n't",
    "|", "<pad>", " ",
]  # fmt: skip
DECODERS = {
    "Metaspace": decoders.Metaspace(),
    "Metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "WordPiece": decoders.WordPiece(),
    "WordPiece without cleanup": decoders.WordPiece(cleanup=False),
    "BPEDecoder": decoders.BPEDecoder(),
    "CTC": decoders.CTC(),
    "Strip": decoders.Strip("▁", 1, 0),
    "Fuse": decoders.Fuse(),
    "Replace, Fuse, Strip": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "ByteLevel": decoders.ByteLevel(),
    "none": None,
}


@pytest.mark.parametrize("name", DECODERS)
def test_stream_equals_decode_whatever_the_decoder(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any ids, hidden and unknown ones too."""
    vocabulary = WORDS if name != "ByteLevel" else [*_byte_alphabet(), "ÃŃ", "æĹ¥æ", "Ĺ¥", "Ģæ"]
    tokens = built(tmp_path_factory.mktemp("words"), vocabulary, DECODERS[name])

    @settings(max_examples=60, deadline=None)
    @given(ids=st.lists(st.integers(0, len(vocabulary) + 3), max_size=60))
    def check(ids: list[int]) -> None:
        stream = tokens.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokens.decode(ids)

    check()


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["▁a", "z", "▁", "é", "日", "🙂", " ", "\n"]), max_size=30))
def test_stream_of_byte_tokens_equals_decode(byte_fallback: Tokenizer, words: list[str]) -> None:
    ids = list[int]()
    for word in words:
        known = byte_fallback.token_id(word)
        ids += list(word.encode()) if known is None else [known]
    stream = byte_fallback.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == byte_fallback.decode(ids)


def test_a_broken_run_of_byte_tokens_keeps_its_whole_characters(byte_fallback: Tokenizer) -> None:
    stream = byte_fallback.stream()
    given = [stream.push(byte) for byte in (*"日".encode(), 0xE5, *"🙂".encode())]
    assert "".join(given) == "日\ufffd🙂" and stream.flush() == ""


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2 has it: ids 0 to 255 are bytes."""
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    return built(tmp_path_factory.mktemp("bytes"), [*spelled, "▁a", "z", "▁"], decoder)


def built(folder: Path, vocabulary: list[str], decoder: Any) -> Tokenizer:
    """A tokenizer of whole words, with one special token behind them."""
    model = models.WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]
    )
    made = tokenizers.Tokenizer(model)
    if decoder is not None:
        made.decoder = decoder
    made.add_special_tokens(["<|s|>"])
    made.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=20))
def test_stream_equals_decode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    streamed = "".join(stream.push(t) for t in ids) + stream.flush()
    assert streamed == tokenizer.decode(ids) == text.replace("<|im_end|>", "")


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=40))
def test_stream_of_any_bytes_is_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    "".join([*map(stream.push, ids), stream.flush()]).encode()


def test_tokenizer_files(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a usable tokenizer"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizer_of(tmp_path)


def test_a_file_that_asks_for_batches_cuts_no_prompt(tmp_path: Path) -> None:
    """Red when truncation or padding of tokenizer.json stay on: 1,602 tokens became 64."""
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.enable_truncation(64)
    made.enable_padding(length=2048, pad_id=1, pad_token="[PAD]")
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json").encode("a " * 1602) == [0] * 1602


WRONG = {
    "load": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "encode": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "decode": {"decoder": {"type": "Strip", "content": "a", "start": 1, "stop": 1}},
}


@pytest.mark.parametrize("when", WRONG)
def test_panics_of_the_library_are_errors_of_ours(tmp_path: Path, when: str) -> None:
    """Red when only Exception is caught: a panic of the library's Rust code is none."""
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(made.to_str()) | WRONG[when]))
    if when == "load":
        with pytest.raises(CheckpointError, match="not a usable tokenizer"):
            Tokenizer(file)
    elif when == "encode":
        with pytest.raises(TokenError, match="cannot encode 'a'"):
            Tokenizer(file).encode("a")
    else:
        with pytest.raises(TokenError, match=r"cannot decode \[0\]"):
            Tokenizer(file).decode([0])
        with pytest.raises(TokenError, match=r"cannot decode \[0\]"):
            Tokenizer(file).stream().push(0)


def test_what_ends_the_program_passes(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when every BaseException becomes an error of ours."""

    class Interrupted:
        @staticmethod
        def from_str(text: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers, "Tokenizer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(tokenizer.path)


def test_a_text_that_is_none_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenError, match="lone surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TokenError, match="a int"):
        tokenizer.encode(3)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab", max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=6),
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_end_a_text_wherever_it_is_cut(
    text: str, cuts: list[int], strings: list[str]
) -> None:
    """Red when a stop string across pieces is missed, or what is found depends on the cuts."""
    ends = [(at + len(s), at) for s in strings if (at := text.find(s)) >= 0]
    wanted = text[: min(ends)[1]] if ends else text
    stops = StopStrings(strings)
    borders = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    pieces = [text[start:stop] for start, stop in pairwise(borders)]
    assert "".join(map(stops.push, pieces)) + stops.flush() == wanted
    assert stops.is_found == bool(ends)


# ---- chat ----

TEMPLATE = """
{%- for m in messages %}
    {%- if m.role == 'broken' %}{{ raise_exception('no such role') }}{% endif %}
<|im_start|>{{ m.role }}
{{ m.content }}{{ eos_token }}
{% endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}<|im_start|>assistant
{%- if enable_thinking is defined and not enable_thinking %}(quick){% endif %}{% endif %}"""
HELLO = [{"role": "user", "content": "hé <b>"}]


def test_render() -> None:
    template = ChatTemplate(TEMPLATE, {"eos_token": "<|im_end|>"})
    turn = "<|im_start|>user\nhé <b><|im_end|>\n"
    assert template.render(HELLO) == f"{turn}<|im_start|>assistant"
    assert template.render(HELLO, add_generation_prompt=False) == turn
    assert template.render(HELLO, enable_thinking=False).endswith("assistant(quick)")
    assert '[{"name": "é"}]' in template.render(HELLO, tools=[{"name": "é"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].x.y }}",
        "{{ 1 / (messages | length - 1) }}", "{{ 2.0 ** 5000 * messages | length }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 15 * messages | length }}", "{{ messages | length + 'a' }}",
    ],
)  # fmt: skip
def test_templates_are_sandboxed_and_fail_clearly(source: str) -> None:
    """Red when only some exceptions are caught: ZeroDivision and others passed."""
    with pytest.raises(ChatError, match="chat template: "):
        ChatTemplate(source).render(HELLO)


def test_what_transformers_offers_to_templates_is_there() -> None:
    """Red without the `generation` tag, and with a `tojson` that takes `indent` only."""
    block = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    assert ChatTemplate(block).render(HELLO) == "hé <b>;"
    arguments = "{{ v | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    assert ChatTemplate(arguments).render(HELLO, v={"b": "é🙂", "a": 1}) == (
        r'{"a":1,"b":"\u00e9\ud83d\ude42"}'
    )
    assert ChatTemplate("{{ v | tojson(indent=1) }}").render(HELLO, v=["<é>"]) == '[\n "<é>"\n]'


def test_template_refuses_messages() -> None:
    with pytest.raises(ChatError, match="no such role"):
        ChatTemplate(TEMPLATE).render([{"role": "broken", "content": ""}])


def test_template_files(tmp_path: Path) -> None:
    assert chat_template_of(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one{{ eos_token }}", "eos_token": "!"}))
    assert _rendered(tmp_path) == "one!"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named, "eos_token": {"content": "?"}}))
    assert _rendered(tmp_path) == "two"
    (tmp_path / "chat_template.jinja").write_text("three{{ eos_token }}")
    assert _rendered(tmp_path) == "three?"


@pytest.mark.parametrize("text", ["{", "[]", '{"chat_template": 3}', '{"chat_template": "{% if"}'])
def test_bad_template_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(CheckpointError):
        chat_template_of(tmp_path)


def _rendered(folder: Path) -> str:
    template = chat_template_of(folder)
    assert template is not None
    return template.render(HELLO)
