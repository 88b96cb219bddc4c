"""Images in a conversation: parts of contents become rows where the template has one token."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import ImageError
from flashrt.session.chat import open_chat
from flashrt.text.template import ChatError
from tests.seeing import FILE, IDS, write


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flashrt.Engine]:
    folder = write(tmp_path_factory.mktemp("chat") / "seeing")
    made = flashrt.load(folder, "cpu", max_positions=400, lanes=2, images=True)
    yield made
    made.close()


def part(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_an_image_stands_where_the_template_has_its_token(engine: flashrt.Engine) -> None:
    words = engine.image(FILE).tokens.tolist()
    with open_chat(engine) as chat:
        chat.add("user", [text("a"), part(FILE), text("b"), part(FILE)])
        tokens = chat.tokens(is_asked=True)
        assert IDS["<|image_pad|>"] not in tokens
        first = tokens.index(words[0])
        assert tokens[first - 1 : first + len(words) + 1] == [302, *words, 303]
        assert tokens[first + len(words) + 2 :].count(words[0]) == 1
        chat.reply(4)
        with engine.session() as session:
            session.prefill(tokens)
            assert session.tokens.tolist() == chat.session.tokens[: len(tokens)].tolist()


def test_a_picture_may_come_in_many_ways(engine: flashrt.Engine) -> None:
    """The same file is the same image, however it is given; and is fed once."""
    data = FILE.read_bytes()
    coded = base64.b64encode(data).decode()
    ways = [
        part(FILE), part(str(FILE)), part(data), {"type": "image", "base64": coded},
        part(f"data:image/png;base64,{coded}"),
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}},
        {"type": "image_url", "image_url": f"DATA:image/png;base64,{coded}"},
    ]  # fmt: skip
    with open_chat(engine) as chat:
        found = []
        for way in ways:
            chat.messages = [{"role": "user", "content": [way, text("what is it?")]}]
            found.append(chat.tokens())
            chat.reply(2)
        assert all(tokens == found[0] for tokens in found)
        assert chat.fed_tokens < 2 * len(found[0])


def test_turns_after_an_image_are_warm(engine: flashrt.Engine) -> None:
    """Positions of turns count the rows of images. Fault: waypoints, or what is fed, are off."""
    with open_chat(engine) as chat:
        chat.add("user", [part(FILE), text("x")])
        chat.reply(3)
        chat.add("user", "and now?")
        tokens, fed = chat.tokens(), chat.fed_tokens
        chat.reply(3)
        assert chat.fed_tokens - fed < 40 < len(tokens)
        turns = [i for i, token in enumerate(tokens) if token == IDS["<|im_start|>"]]
        assert turns[2] in [w.position for w in chat.session.lane.waypoints]


def test_what_a_user_spells_is_no_image(engine: flashrt.Engine) -> None:
    with open_chat(engine) as chat:
        chat.add("user", "<|image_pad|>")
        assert IDS["<|image_pad|>"] not in chat.tokens()
        chat.add("user", [text("<|image_pad|>"), part(FILE)])
        assert sum(token >= 1 << 30 for token in chat.tokens()) == len(engine.image(FILE).tokens)


def test_refusals(engine: flashrt.Engine, tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        (part("https://example.com/a.png"), "not fetched"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "not fetched"),
        ({"type": "image_url", "image_url": "/etc/passwd"}, "not fetched"),
        ({"type": "image"}, "none of image"),
        ({"type": "image", "image": FILE, "base64": "aa"}, "image, base64 of"),
        ({"type": "image", "base64": "*"}, "no base64"),
        (part("data:image/png,abc"), "expected base64"),
        (part(3), "a int"),
    )
    with open_chat(engine) as chat:
        for given, said in wrong:
            chat.messages = [{"role": "user", "content": [given]}]
            with pytest.raises(ChatError, match=said):
                chat.reply(1)
        chat.messages = [{"role": "user", "content": [part(b"none")]}]
        with pytest.raises(ImageError, match="cannot be read"):
            chat.reply(1)
        assert chat.session.position == 0
    folder = write(tmp_path / "blind")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content[0].text }}")
    with flashrt.load(folder, "cpu", max_positions=64) as blind, open_chat(blind) as chat:
        chat.add("user", [part(FILE)])
        with pytest.raises(ImageError, match="images=True"):
            chat.reply(1)
    seeing = flashrt.load(folder, "cpu", max_positions=64, images=True)
    with seeing, open_chat(seeing) as chat:
        chat.add("user", [part(np.asarray(np.zeros((40, 40, 3)), np.uint8))])
        with pytest.raises(ChatError, match="template wrote 0"):
            chat.reply(1)
    config = json.loads((folder / "config.json").read_text())
    wrong: list[tuple[dict[str, object], str]] = [
        ({"num_heads": 5}, "no multiple of four times num_heads"),
        ({"depth": 3}, "blocks.2"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_position_embeddings": 35}, "no square"),
    ]
    changed = [(config | {"vision_config": config["vision_config"] | v}, said) for v, said in wrong]
    changed.append((config | {"model_type": "qwen3_5_moe"}, "with experts are not supported yet"))
    for other, said in changed:
        (folder / "config.json").write_text(json.dumps(other))
        with pytest.raises(flashrt.CheckpointError, match=said):
            flashrt.load(folder, "cpu", max_positions=64, images=True)
