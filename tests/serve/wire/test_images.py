"""Images over HTTP: answers are the library's, each image is seen once, and what is refused."""

from __future__ import annotations

import base64
import gc
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

import flashrt
from flashrt.client import Client
from flashrt.engine.sight import Sight, SightCounters
from flashrt.serve import eyes
from flashrt.serve.access import Access
from flashrt.session.chat import open_chat
from flashrt.store.store import Store
from flashrt.vision.pixels import pixels_of
from tests import seeing
from tests.serve.wire.running import NAME, Running

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def png(seed: int, **options: Any) -> bytes:
    """Noise of 5 x 8 tokens."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 64, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", **options)
    return file.getvalue()


def uri(file: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(file).decode()}"


def shown(file: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri(file), **more}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def said(messages: list[dict[str, Any]], n: int = 8, **more: Any) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": n, "temperature": 0, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeing.write(tmp_path_factory.mktemp("served") / "seeing")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    running = Running(checkpoint=folder, images=True)
    yield running
    running.end()


@pytest.fixture
def fresh(folder: Path, started: Callable[..., Running]) -> Callable[..., Running]:
    """Starts servers that see, and have seen nothing."""
    return lambda *a, **o: started(*a, checkpoint=folder, images=True, **o)


@pytest.fixture(scope="module")
def library(folder: Path) -> Iterator[Callable[[list[dict[str, Any]]], tuple[str, int]]]:
    """The library's reply to messages, and the tokens of its prompt."""
    with flashrt.load(folder, "cpu", max_positions=1024, images=True) as engine:

        def reply(messages: list[dict[str, Any]], n: int = 8) -> tuple[str, int]:
            with open_chat(engine) as chat:
                chat.messages = messages
                prompt = len(chat.tokens(is_asked=True))
                return chat.reply(n, temperature=0), prompt

        yield reply


def sight_of(running: Running) -> Sight:
    assert running.engine.sight is not None
    return running.engine.sight


def counters(running: Running) -> SightCounters:
    return sight_of(running).counters


def reply_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["message"]["content"]
    return found


def test_each_api_sees_as_the_library_does(fresh: Any, library: Any) -> None:
    """One image on three routes: seen once, and its rows are fed once. Fault: another order of
    parts, rows that are not the image's, usage without them, or a route with an index of its own.
    """
    running, file = fresh(), png(1)
    words, prompt = library(asked(text("a"), shown(file), text("b")))
    client: openai.OpenAI = running.openai()
    one = client.chat.completions.create(
        model=NAME, max_tokens=8, temperature=0,
        messages=asked(text("a"), shown(file, detail="low"), text("b")),  # type: ignore[arg-type]
    )  # fmt: skip
    assert one.choices[0].message.content == words
    assert one.usage is not None and one.usage.prompt_tokens == prompt > 40
    two = client.responses.create(
        model=NAME, max_output_tokens=8, temperature=0,
        input=[{"role": "user", "content": [
            {"type": "input_text", "text": "a"},
            {"type": "input_image", "image_url": uri(file), "detail": "auto"},
            {"type": "input_text", "text": "b"},
        ]}],
    )  # fmt: skip
    assert two.output_text == words and two.usage is not None
    assert two.usage.input_tokens == prompt == two.usage.input_tokens_details.cached_tokens
    anthropics: anthropic.Anthropic = running.anthropic()
    source: Any = {
        "type": "base64", "media_type": "image/png", "data": base64.b64encode(file).decode(),
    }  # fmt: skip
    blocks: Any = asked(text("a"), {"type": "image", "source": source}, text("b"))
    three = anthropics.messages.create(model=NAME, max_tokens=8, messages=blocks)
    assert isinstance(three.content[0], anthropic.types.TextBlock)
    assert three.content[0].text == words
    assert three.usage.cache_read_input_tokens == prompt and three.usage.input_tokens == 0
    counted = anthropics.messages.count_tokens(model=NAME, messages=blocks)
    assert counted.input_tokens == prompt
    assert (counters(running).seen, counters(running).decoded) == (1, 1)
    streamed = running.post(CHAT, said(asked(text("a"), shown(file), text("b")), stream=True))
    pieces = [line for line in streamed.text.splitlines() if '"content"' in line]
    assert streamed.status_code == 200 and len(pieces) > 1
    told = running.get("/metrics").text
    assert "flashrt_images_seen_total 1.0" in told and "flashrt_tower_seconds_total" in told
    assert running.get("/props").json()["modalities"] == {"vision": True, "audio": False}
    shape = {"messages": asked(shown(file))}
    assert running.post("/apply-template", shape).json()["prompt"].count("<|image_pad|>") == 1


def test_results_of_tools_may_be_images(server: Running, library: Any) -> None:
    """Fault: an image of a tool's result is lost, or stands elsewhere in the prompt."""
    source = {
        "type": "base64", "media_type": "image/png", "data": base64.b64encode(png(2)).decode(),
    }  # fmt: skip
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [
        text("here"), {"type": "image", "source": source},
    ]}  # fmt: skip
    body = said([
        {"role": "user", "content": "look"}, {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ])  # fmt: skip
    answer = server.post(MESSAGES, {"model": NAME, **body})
    assert answer.status_code == 200, answer.text
    spelled = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    words, _ = library([
        {"role": "user", "content": "look"}, {"role": "assistant", "content": spelled},
        {"role": "user", "content": [
            text("<tool_response>\n"), text("here"), shown(png(2)), text("\n</tool_response>"),
        ]},
    ])  # fmt: skip
    assert answer.json()["content"][0]["text"] == words


def test_the_next_turn_is_warm_though_the_image_left_memory(fresh: Any, library: Any) -> None:
    """With room for the rows of one image. Fault: the tower runs again, rows are fed again, or the
    request is told to show what it shows.
    """
    running = fresh()
    sight_of(running).most_bytes = 1
    messages = asked(shown(png(1)), shown(png(2)), text("which?"))
    first = running.post(CHAT, said(messages))
    assert reply_of(first) == library(messages)[0]
    gc.collect()
    assert sight_of(running).nbytes == 40 * 64 * 4, "one of the two has left"
    messages += [{"role": "assistant", "content": reply_of(first)}]
    messages += asked(text("and now?"))
    second = running.post(CHAT, said(messages))
    assert reply_of(second) == library(messages)[0]
    cached = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first.json()["usage"]["prompt_tokens"] > 80
    assert counters(running).seen == 2 and counters(running).decoded > 2
    cold = asked(text("x"), shown(png(1)), shown(png(2)))  # both are to be fed, at once
    assert reply_of(running.post(CHAT, said(cold))) == library(cold)[0]


def test_two_owners_show_one_image_at_once(fresh: Any, library: Any) -> None:
    """Fault: it is seen twice, one waits for ever, or gets rows of the other's prompt."""
    running = fresh(Access(keys=("ann", "bob")))
    messages = asked(shown(png(3)), text("what?"))

    def ask(key: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        found: httpx.Response = running.post(CHAT, said(messages), headers=headers)
        return found

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, ("ann", "bob")))
    assert [reply_of(a) for a in answers] == [library(messages)[0]] * 2
    cached = [a.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert cached == [0, 0], "owners share an image, and no state"
    assert counters(running).seen == 1


def test_lanes_go_on_while_the_tower_works(
    fresh: Any,
    library: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client goes meanwhile. Fault: others wait for the tower, the request of nobody takes a
    lane, images behind the one at hand are seen for nobody, or the next request hangs.
    """
    caplog.set_level(logging.INFO, "flashrt.serve")
    running, has_begun, may_end = fresh(), threading.Event(), threading.Event()
    see = sight_of(running).tower.see

    def slowly(patches: Any) -> NDArray[np.float32]:
        has_begun.set()
        assert may_end.wait(30)
        return see(patches)

    monkeypatch.setattr(sight_of(running).tower, "see", slowly)
    messages = asked(shown(png(4)), shown(png(5)), text("x"))
    body = json.dumps(said(messages)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), 30) as lost:
        lost.sendall(head.encode() + body)
        assert has_begun.wait(30)
        reply_of(running.post(CHAT, said(asked(text("only text")))))
        before = running.server.core.status().result().meters.asks
    deadline = time.monotonic() + 30
    while f"POST {CHAT} 499" not in caplog.text:
        assert time.monotonic() < deadline, "nobody noticed that the client has gone"
        time.sleep(0.01)
    may_end.set()
    other = asked(shown(png(6)), text("y"))
    assert reply_of(running.post(CHAT, said(other))) == library(other)[0]
    assert running.server.core.status().result().meters.asks == before + 1
    assert counters(running).seen == 2, "the one at hand, and the other request's"


def test_sessions_keep_their_images(fresh: Any, library: Any, tmp_path: Path) -> None:
    """Only what is new is sent, also after a restart. Fault: an image is not in the conversation
    any more, is seen again where its state is known, or a rollback cannot feed it.
    """
    running = fresh(store=Store(tmp_path / "store"))
    with Client(running.url) as client:
        session = client.session("eyes")
        first = asked(shown(png(1)), text("what?"))
        one = running.post(CHAT, said(first, session=session.id))
        told = [*first, {"role": "assistant", "content": reply_of(one)}, *asked(text("and now?"))]
        two = running.post(CHAT, said(told[2:], session=session.id))
        assert reply_of(two) == library(told)[0]
        node = session.tree()["nodes"][1]
        found = running.get(f"/v1/sessions/{session.id}/nodes/{node['id']}").json()
        assert found["messages"][0]["content"] == [shown(png(1)), text("what?")]
        assert found["text"].count("<|image_pad|>") == 1
    assert counters(running).seen == 1
    running.end()
    again = fresh(store=Store(tmp_path / "store"))
    told += [{"role": "assistant", "content": reply_of(two)}, *asked(text("why?"))]
    whole = again.post(CHAT, said(told, session=session.id))  # by a client that knows no sessions
    assert reply_of(whole) == library(told)[0]
    assert counters(again).seen == 0, "all that is fed is text"
    answer = again.post(f"/v1/sessions/{session.id}/rollback", {"position": 30})
    assert answer.status_code == 200, answer.text
    assert answer.json()["position"] == 30 and counters(again).seen == 1
    again.end()


def test_responses_go_on_from_images(server: Running, library: Any) -> None:
    """Fault: what `previous_response_id` names has no images."""
    given = [{"type": "input_image", "image_url": uri(png(7))}]
    one = server.post(
        RESPONSES,
        {"input": [{"role": "user", "content": given}], "max_output_tokens": 8, "temperature": 0},
    ).json()
    more = {"previous_response_id": one["id"], "input": "and?", "max_output_tokens": 8}
    two = server.post(RESPONSES, {**more, "temperature": 0})
    assert two.status_code == 200, two.text
    words = one["output"][0]["content"][0]["text"]
    told = [*asked(shown(png(7))), {"role": "assistant", "content": words}]
    expected, prompt = library([*told, {"role": "user", "content": "and?"}])
    assert two.json()["output"][0]["content"][0]["text"] == expected
    assert two.json()["usage"]["input_tokens"] == prompt


def of_openai(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def of_anthropic(**source: Any) -> dict[str, Any]:
    return {"type": "image", "source": source}


def huge() -> bytes:
    """A bitmap that says it has 4 gigapixels, in 54 bytes."""
    size = (1 << 16) - 1
    head = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    return (
        head
        + b"".join(n.to_bytes(4, "little") for n in (40, size, size))
        + (b"\x01\x00\x18\x00" + bytes(24))
    )


PLACE = "messages[0].content[0]"
IN_URL, IN_SOURCE = f"{PLACE}.image_url.url", f"{PLACE}.source"
SMALL = base64.b64encode(png(0)).decode()
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, of_openai("https://example.com/a.png"), IN_URL, "fetches nothing"),
    (CHAT, of_openai("file:///etc/passwd"), IN_URL, "nor from its disk"),
    (CHAT, of_openai("/etc/passwd"), IN_URL, "nor from its disk"),
    (CHAT, {"type": "image", "image": "/etc/passwd"}, f"{PLACE}.type", "parts are text or images"),
    (CHAT, of_openai(7), IN_URL, "give a text"),
    (CHAT, {"type": "image_url"}, f"{PLACE}.image_url", "missing"),
    (CHAT, of_openai("data:image/png,abc"), IN_URL, "send the image itself"),
    (CHAT, of_openai("data:image/png;base64,"), IN_URL, "no bytes"),
    (CHAT, of_openai("data:text/html;base64,aaaa"), IN_URL, "media type"),
    (CHAT, of_openai("data:image/svg+xml;base64,aaaa"), IN_URL, "media type"),
    (CHAT, of_openai(uri(png(0)), detail="most"), f"{PLACE}.image_url.detail", "one of auto"),
    (CHAT, of_openai("data:image/png;base64,%%%%"), "messages", "no base64"),
    (CHAT, of_openai(uri(b"not a picture")), "messages", "cannot be read as an image"),
    (CHAT, of_openai(uri(png(0)[:-500])), "messages", "cannot be decoded"),
    (CHAT, of_openai(uri(huge(), "image/bmp")), "messages", "scale it down"),
    (CHAT, {"type": "video_url", "video_url": {}}, f"{PLACE}.type", "text or images"),
    (MESSAGES, of_anthropic(type="url", url="https://x.com/a.png"), f"{IN_SOURCE}.type", "fetches"),
    (MESSAGES, of_anthropic(type="file", file_id="f"), f"{IN_SOURCE}.type", "not kept here"),
    (MESSAGES, of_anthropic(type="base64", data=SMALL), f"{IN_SOURCE}.media_type", "missing"),
    (
        MESSAGES, of_anthropic(type="base64", media_type="application/pdf", data=SMALL),
        f"{IN_SOURCE}.media_type", "media type",
    ),
    (
        MESSAGES, of_anthropic(type="base64", media_type="image/png", data="%"), "messages",
        "no base64",
    ),
    (MESSAGES, {"type": "image"}, f"{IN_SOURCE}", "missing"),
    (MESSAGES, {"type": "document"}, f"{PLACE}.type", "cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "part", "param", "words"), REFUSED, ids=lambda v: str(v)[:50])
def test_what_is_no_image(
    server: Running, path: str, part: dict[str, Any], param: str, words: str
) -> None:
    """Red when something is fetched or opened, when the server fails, or blames another field."""
    answer = server.post(path, {"model": NAME, **said(asked(part))})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and words in error["message"]
    if path == CHAT:
        assert error["param"] == param
    else:
        assert answer.json()["type"] == "error" and error["message"].startswith(f"{param}: ")


def test_limits_and_places(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many, too large, more than the context, and messages that can have none. Fault: the tower
    runs before it is known that the prompt does not fit.
    """
    seen = counters(server).seen

    def refused(messages: list[dict[str, Any]], words: str) -> None:
        answer = server.post(CHAT, said(messages))
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text

    monkeypatch.setattr(eyes, "MOST_IMAGES", 1)
    refused(asked(shown(png(20)), shown(png(21))), "up to 1")
    monkeypatch.undo()
    refused(asked(*(shown(png(i)) for i in range(20, 46))), "positions hold fewer")
    monkeypatch.setattr("flashrt.serve.wire.pictures._MOST_CHARS", 1000)
    refused(asked(shown(png(20))), "the most that is taken")
    monkeypatch.undo()
    system = [{"role": "system", "content": [shown(png(20))]}, *asked(text("x"))]
    refused(system, "of the user and of tools")
    assert counters(server).seen == seen
    monkeypatch.setattr(eyes, "MOST_WAITING", 0)
    answer = server.post(CHAT, said(asked(shown(png(20)))))
    assert answer.status_code == 429 and answer.headers["retry-after"] == "5"


def test_damaged_files_are_the_clients_fault(server: Running) -> None:
    """Fault: a decoder's own exception is an error of the server, or ends a thread."""
    rng = np.random.default_rng(5)
    good = Image.open(io.BytesIO(png(8)))
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        file = io.BytesIO()
        good.save(file, kind)
        data = bytearray(file.getvalue())
        assert server.post(CHAT, said(asked(shown(bytes(data))), 1)).status_code == 200, kind
        for _ in range(6):
            broken = bytearray(data[: int(rng.integers(1, len(data)))])
            for at in rng.integers(0, len(broken), 3):
                broken[at] ^= int(rng.integers(1, 256))
            answer = server.post(CHAT, said(asked(shown(bytes(broken))), 1))
            assert answer.status_code in (200, 400), answer.text


def test_a_server_without_eyes_says_so(folder: Path, started: Callable[..., Running]) -> None:
    """In each API's own shape, and what helps. Fault: an error of the server, or words fed as
    tokens.
    """
    blind = started(checkpoint=folder)
    answer = blind.post(CHAT, said(asked(shown(png(1)))))
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_content"
    assert "--images" in answer.json()["error"]["message"]
    source = {"type": "base64", "media_type": "image/png", "data": SMALL}
    body = {"model": NAME, **said(asked({"type": "image", "source": source}))}
    answer = blind.post(MESSAGES, body)
    assert answer.status_code == 400 and "--images" in answer.json()["error"]["message"]
    assert blind.get("/props").json()["modalities"]["vision"] is False
    assert blind.get("/v1/status").json()["sees"] is False
    word = (1 << 30) + 5
    assert blind.post("/v1/completions", {"prompt": [1, word]}).status_code == 400


def test_a_camera_that_was_turned() -> None:
    """Fault: portraits lie on their side, as their sensors store them."""
    upright = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    file = io.BytesIO()
    notes = Image.Exif()
    notes[0x0112] = 6  # turn it right by 90 degrees to see it
    Image.fromarray(np.rot90(upright)).save(file, "PNG", exif=notes)
    found = pixels_of(file.getvalue(), lambda height, width: (height, width))
    assert np.array_equal(found, upright)
