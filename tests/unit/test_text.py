"""Tokenizer, stream decoder and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from flashrt.base.errors import CheckpointError, TokenError
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
    pieces = [stream.push(half[0]) for _ in range(20)]
    assert "".join(pieces).count("\ufffd") == 16
    assert stream.flush() == "\ufffd" * 4


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
    ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].x.y }}"],
)
def test_templates_are_sandboxed_and_fail_clearly(source: str) -> None:
    with pytest.raises(ChatError, match="chat template: "):
        ChatTemplate(source).render(HELLO)


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
