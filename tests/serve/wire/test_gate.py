"""Who may ask, and how much: keys, hosts, origins, sizes, queues. Each test says its fault."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
import openai
import pytest

from flashrt.serve import speaker
from flashrt.serve.access import Access
from flashrt.serve.wire import status
from tests.serve.wire.running import NAME, WALK, Running

ASKED: list[Any] = [{"role": "user", "content": WALK}]
LONG: list[Any] = [{"role": "user", "content": "tell me a story about a fox ."}]
# So that no stop token comes: its id is banned.
ENDLESS: dict[str, Any] = {"messages": LONG, "logit_bias": {"1": -100, "0": -100}, "stream": True}


def slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the thousand tokens that there is room for take seconds, on the fastest machine."""
    replay = running.engine.replay

    def slowed(*arguments: Any) -> None:
        time.sleep(0.005)
        replay(*arguments)

    monkeypatch.setattr(running.engine, "replay", slowed)


def test_only_keys_open(started: Callable[..., Running]) -> None:
    """Red when a route is open without a key, or a wrong key opens it."""
    running = started(Access(keys=("right", "other")), lanes=1)
    for path in ("/v1/models", "/props", "/slots", "/metrics"):
        assert running.get(path).status_code == 401
        wrong = running.get(path, headers={"authorization": "Bearer wrong"})
        assert wrong.status_code == 401 and wrong.headers["www-authenticate"] == "Bearer"
    for key in ("", "righ", "rightt", "RIGHT", "ri\u00e9ght"):
        headers = {"x-api-key": key.encode()}
        assert running.get("/v1/models", headers=headers).status_code == 401
    assert running.get("/v1/models", headers={"x-api-key": "other"}).status_code == 200
    assert running.get("/health").status_code == 200, "whoever watches a server has no key"
    with pytest.raises(openai.AuthenticationError):
        running.openai("wrong").models.list()
    with pytest.raises(anthropic.AuthenticationError):
        running.anthropic("wrong").messages.create(model=NAME, max_tokens=1, messages=ASKED)
    assert running.openai("right").models.list().data[0].id == NAME


def test_owners_share_no_prefixes(started: Callable[..., Running]) -> None:
    """Red when a key's cached tokens tell another what was asked."""
    running = started(Access(keys=("ann", "bob")), lanes=1)
    cached = []
    for key in ("ann", "ann", "bob"):
        found = running.openai(key).chat.completions.create(model=NAME, messages=ASKED)
        cached.append(found.usage.prompt_tokens_details.cached_tokens)  # type: ignore[union-attr]
    assert cached[0] == cached[2] == 0 < cached[1]


def test_pages_of_others_may_not_ask(started: Callable[..., Running]) -> None:
    """Red when a page of another origin, or a name that points to loopback, is answered."""
    running = started(
        Access(hosts=frozenset({"127.0.0.1"}), origins=frozenset({"https://page"})), lanes=1
    )
    body = {"messages": ASKED, "max_tokens": 1}
    post = lambda headers: running.post("/v1/chat/completions", body, headers=headers)  # noqa: E731
    assert post({"host": f"evil:{running.port}"}).status_code == 403
    assert post({"host": "[::1"}).status_code == 403
    assert post({"origin": "http://evil"}).status_code == 403
    assert post({"origin": "null"}).status_code == 403
    assert "access-control-allow-origin" not in post({}).headers
    assert post({"origin": running.url}).status_code == 200, "a page of its own"
    allowed = post({"origin": "https://page"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page"
    asking = {"origin": "https://page", "access-control-request-headers": "authorization"}
    before = httpx.options(f"{running.url}/v1/chat/completions", headers=asking)
    assert before.status_code == 204
    assert before.headers["access-control-allow-headers"] == "authorization"


BODIES: list[tuple[bytes, str]] = [
    (b"", "missing"),
    (b" ", "JSON"),
    (b"[]", "object"),
    (b"\xff\xfe", "UTF-8"),
    (b'{"messages": NaN}', "NaN"),
    (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', "temperature"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "JSON"),
    (b'{"messages": ' + b"[" * 100_000, "levels"),
    (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "levels"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    (b'{"\\ud800": 1}', "surrogate"),
    (b'{"messages": [{"role": "user", "content": "x"}]', "JSON"),
    (b'{"' + b"x" * 10_000 + b'": 1}', "unknown"),
]


@pytest.mark.parametrize(("body", "word"), BODIES, ids=[w for _, w in BODIES])
def test_bodies_are_refused_in_words(server: Running, body: bytes, word: str) -> None:
    """Red when such a body is taken, or ends in a 500."""
    for path in ("/v1/chat/completions", "/v1/messages"):
        answer = httpx.post(server.url + path, content=body, timeout=20)
        assert answer.status_code == 400, answer.text
        if path == "/v1/chat/completions":
            assert word in answer.json()["error"]["message"]
        assert len(answer.content) < 1000


def test_large_bodies_are_refused_early(started: Callable[..., Running]) -> None:
    """Red when a body is read to its end before its size is looked at."""
    running = started(Access(body_nbytes=2000), lanes=1, head_s=0.5)
    large = {"messages": [{"role": "user", "content": "x" * 3000}]}
    stated = running.post("/v1/chat/completions", large)
    assert stated.status_code == 413 and stated.json()["error"]["code"] == "request_too_large"
    with pytest.raises(anthropic.RequestTooLargeError):
        running.anthropic().messages.create(model=NAME, max_tokens=1, **large)  # type: ignore[arg-type]
    begun = time.perf_counter()

    def pieces() -> Any:
        while time.perf_counter() - begun < 10:
            yield b" " * 1000
            time.sleep(0.001)

    chunked = httpx.post(running.url + "/v1/completions", content=pieces(), timeout=20)
    assert chunked.status_code == 413 and time.perf_counter() - begun < 5


def test_a_full_queue_says_when_to_come_back(
    started: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when requests wait without bound, or are turned away without a time."""
    running = started(lanes=1, queue=1)
    slow(running, monkeypatch)
    leave = threading.Event()

    def hold() -> None:
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=ENDLESS) as answer:
            for _ in answer.iter_lines():
                if leave.is_set():
                    return

    holders = [threading.Thread(target=hold) for _ in range(2)]
    for holder in holders:
        holder.start()
        time.sleep(0.3)
    with pytest.raises(openai.RateLimitError) as full:
        running.openai().chat.completions.create(model=NAME, messages=ASKED)
    assert int(full.value.response.headers["retry-after"]) >= 1
    with pytest.raises(anthropic.RateLimitError):
        running.anthropic().messages.create(model=NAME, max_tokens=1, messages=ASKED)
    leave.set()
    for holder in holders:
        holder.join(20)
    assert running.post("/v1/chat/completions", {"messages": ASKED}).status_code == 200


def test_a_client_that_goes_leaves_its_lane(
    started: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when nobody notices that a client has gone: the only lane stays taken to the end."""
    running = started(lanes=1)
    slow(running, monkeypatch)
    for streams in (True, False):
        body = {**ENDLESS, "stream": streams}
        with httpx.Client(timeout=30 if streams else 1.5) as client:
            try:
                with client.stream("POST", f"{running.url}/v1/chat/completions", json=body) as got:
                    next(got.iter_lines())
            except httpx.ReadTimeout:
                assert not streams
        answer = running.post("/v1/chat/completions", {"messages": ASKED, "max_tokens": 1})
        assert answer.status_code == 200
    slots = running.get("/slots").json()
    assert [slot["is_processing"] for slot in slots] == [False]
    metrics = running.get("/metrics").text
    assert "flashrt_requests_cancelled_total 2.0" in metrics, metrics


def test_a_request_may_take_so_long(
    started: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when --timeout does not reach the scheduler."""
    running = started(Access(timeout_s=0.5), lanes=1)
    slow(running, monkeypatch)
    late = running.post("/v1/chat/completions", {**ENDLESS, "stream": False})
    assert late.status_code == 504 and late.json()["error"]["type"] == "timeout_error"
    lines = running.post("/v1/chat/completions", ENDLESS).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_fault_of_ours_tells_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Red when internals or texts of requests get out, or into the log."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("".join(["a sec", "ret of a prompt"]))

    monkeypatch.setattr(status.StatusRoutes, "_model", fail)
    with caplog.at_level(logging.ERROR, "flashrt.serve"):
        answer = server.get("/v1/models")
    error = answer.json()["error"]
    assert answer.status_code == 500 and error["code"].startswith("err_")
    assert "secret" not in answer.text and "RuntimeError" not in answer.text
    assert error["code"] in caplog.text and "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_the_end_lets_requests_finish(started: Callable[..., Running]) -> None:
    """Red when the end cuts a request that runs, or takes new ones."""
    running = Running(lanes=1)
    body = {**ENDLESS, "max_tokens": 150}
    pieces: list[str] = []
    is_running = threading.Event()

    def read() -> None:
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                pieces.append(line)
                is_running.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert is_running.wait(20)
    running.end()
    reader.join(20)
    assert [p for p in pieces if p][-1] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        running.get("/health")


@pytest.mark.parametrize("streams", [False, True])
def test_a_fault_while_speaking_ends_one_request(
    server: Running, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """Red when a fault in the scheduler's thread hangs its request, tells its words, or ends the
    server.
    """

    def fail(*_: Any) -> Any:
        raise RuntimeError("".join(["a sec", "ret of a prompt"]))

    body = {"messages": ASKED, "stream": streams}
    with monkeypatch.context() as patched:
        patched.setattr(speaker.StopStrings, "push", fail)
        answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["code"].startswith("err_")
    assert server.post("/v1/chat/completions", body).status_code == 200
