"""Clients that hold connections badly: they take nothing from others. Each test says its fault."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from flashrt.serve.access import Access
from tests.serve.wire.running import WALK, Running

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 500\r\n"


@contextlib.contextmanager
def connected(running: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as made:
        yield made


def is_answered(running: Running) -> bool:
    body = {"messages": [{"role": "user", "content": WALK}], "max_tokens": 2}
    begun = time.perf_counter()
    return running.post("/v1/chat/completions", body).status_code == 200 and (
        time.perf_counter() - begun < 2
    )


def rest_of(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def test_slow_heads_and_bodies_are_given_up(started: Callable[..., Running]) -> None:
    """Red when a connection may drip for ever, or when 200 of them keep others out."""
    running = started(Access(body_s=0.5), lanes=1, head_s=0.5)
    with contextlib.ExitStack() as stack:
        drips = [stack.enter_context(connected(running)) for _ in range(200)]
        for i, drip in enumerate(drips):
            drip.sendall((b"", b"P", HEAD, HEAD + b"\r\n{")[i % 4])
        assert is_answered(running)
        time.sleep(0.3)
        for drip in drips[1::4]:  # a byte now and then is no head
            with contextlib.suppress(OSError):
                drip.sendall(b"O")
        begun = time.perf_counter()
        answers = [rest_of(drip) for drip in drips]
        assert time.perf_counter() - begun < 5
        assert {answer[:12] for answer in answers[3::4]} == {b"HTTP/1.1 408"}
        assert set(answers[0::4] + answers[1::4] + answers[2::4]) == {b""}
        assert is_answered(running)


def test_a_kept_connection_gets_as_long_for_its_next_head(started: Callable[..., Running]) -> None:
    """Red when only the first head of a connection is watched, or when it is watched too long."""
    running = started(lanes=1, head_s=0.5)
    with connected(running) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(1 << 16)
            assert b"200 OK" in answer
            time.sleep(0.7)  # idle between requests: that is allowed
        connection.sendall(b"GET /hea")
        begun = time.perf_counter()
        assert rest_of(connection) == b"" and 0.2 < time.perf_counter() - begun < 3


def test_half_closed_and_reset_connections(started: Callable[..., Running]) -> None:
    """Red when such a client's request keeps its lane."""
    running = started(lanes=1)
    body = b'{"messages": [{"role": "user", "content": "tell me a story about a fox ."}], '
    body += b'"logit_bias": {"0": -100, "1": -100}}'
    whole = HEAD.replace(b"500", str(len(body)).encode()) + b"\r\n" + body
    for _ in range(5):
        with connected(running) as half:
            half.sendall(whole)
            half.shutdown(socket.SHUT_WR)
        with connected(running) as cut:
            cut.sendall(HEAD + b"\r\n{")
            cut.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with connected(running) as junk:
            junk.sendall(b"\x16\x03\x01\x02\x00\x01\x00" * 20 + b"\r\n\r\n")
            assert rest_of(junk).startswith(b"HTTP/1.1 400")
    assert is_answered(running)


def test_a_client_that_does_not_read_is_let_go(started: Callable[..., Running]) -> None:
    """Red when what is not read keeps a lane, or is kept in memory without bound."""
    running = started(lanes=1, stall_s=0.5)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", running.port))
        deaf.settimeout(0.2)
        asked = memoryview(b"GET /props HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 500)
        at, begun = 0, time.perf_counter()
        with pytest.raises(ConnectionError):  # of answers that nobody reads, one begins to wait
            while time.perf_counter() - begun < 30:  # the system's buffers take what they can
                with contextlib.suppress(TimeoutError):
                    at = (at + deaf.send(asked[at:])) % len(asked)
    assert is_answered(running)
