"""Closed-loop clients of a chat server: each asks, reads the stream to its end, and asks again.

IS: conversations over HTTP with what they waited for, token by token. Each client has a thread and
a connection of its own. IS NOT: a server (servers), or figures of several runs (serve).

A conversation is a system message of its own and a few turns; then the client begins another one.
All of it follows from the number of the client, so two servers are asked the same.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from flashrt.worlds.document import dice_of
from flashrt.worlds.names import HEROES
from flashrt.worlds.story import sentences

SENTENCES = 20  # of a system message: 12 words each
TURNS = 4  # of a conversation
MOST_TOKENS = 64  # of a reply
PATIENCE_S = 120.0  # for the next byte
_RETRY_S = 1.0  # after an error, or a 429 that does not say


@dataclass(slots=True)
class Turn:
    """One request that was answered. Times are of time.perf_counter."""

    is_first: bool  # of its conversation: the others may begin warm
    asked: float
    events: list[float] = field(default_factory=list)  # when text came
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None  # None: the server does not say

    def tokens_before(self, moment: float) -> float:
        """Of its tokens, as many as had come; an event may hold several."""
        if not self.events:
            return 0.0
        return self.tokens * sum(at <= moment for at in self.events) / len(self.events)


@dataclass(slots=True)
class Load:
    """What some clients saw for some time."""

    begun: float
    ended: float
    turns: list[Turn] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)  # by status, or what went wrong

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together, until the end; what came after it does not count."""
        n_tokens = sum(turn.tokens_before(self.ended) for turn in self.turns)
        return n_tokens / (self.ended - self.begun)

    def first_token_s(self, is_first: bool) -> list[float]:
        """From the request to the first text: of first turns, or of later ones."""
        return [t.events[0] - t.asked for t in self.turns if t.events and t.is_first == is_first]

    def inter_token_s(self) -> list[float]:
        """Between two texts of a reply."""
        return [b - a for t in self.turns for a, b in zip(t.events, t.events[1:], strict=False)]


def conversation(client: int, count: int) -> tuple[str, list[str]]:
    """The system message, and what the user says in each turn, of a client's next conversation."""
    dice = dice_of("bench", client << 16 | count)
    system = " ".join(sentences(dice, SENTENCES))
    return system, [f"tell me a story about a {dice.choice(HEROES)} ." for _ in range(TURNS)]


def run_clients(url: str, n_clients: int, seconds: float, first: int = 0) -> Load:
    """So many clients, with the numbers from `first` on, for so long; turns that run then are read
    to their ends.
    """
    begun = time.perf_counter()
    load = Load(begun, begun + seconds)
    threads = [
        threading.Thread(target=_Client(url, first + i, load).run, daemon=True)
        for i in range(n_clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


class _Client:
    def __init__(self, url: str, number: int, load: Load) -> None:
        self._address = urlsplit(url).netloc
        self._number, self._load = number, load
        self._connection = self._connected()

    def run(self) -> None:
        """Conversations until the end."""
        count = 0
        while self._is_on():
            system, questions = conversation(self._number, count)
            messages = [{"role": "system", "content": system}]
            for i, question in enumerate(questions):
                messages.append({"role": "user", "content": question})
                while (said := self._asked(messages, is_first=i == 0)) is None and self._is_on():
                    pass
                if said is None or not self._is_on():
                    break
                messages.append({"role": "assistant", "content": said})
            count += 1
        self._connection.close()

    def _is_on(self) -> bool:
        return time.perf_counter() < self._load.ended

    def _connected(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address, timeout=PATIENCE_S)

    def _asked(self, messages: list[dict[str, str]], *, is_first: bool) -> str | None:
        """The reply; None after an error, which is counted."""
        body = {
            "messages": messages,
            "max_tokens": MOST_TOKENS,
            "temperature": 0,
            "cache_prompt": True,  # llama.cpp's word for what it should do anyway
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        turn = Turn(is_first, time.perf_counter())
        try:
            answer = self._answer(json.dumps(body))
            if answer.status != 200:
                answer.read()
                self._failed(str(answer.status), answer.getheader("retry-after"))
                return None
            said = "".join(_texts(answer, turn))
        except _Refused:
            self._connection.close()
            self._failed("within a stream")
            return None
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()  # the next request opens another
            self._failed(type(error).__name__)
            return None
        self._load.turns.append(turn)
        return said

    def _answer(self, body: str) -> http.client.HTTPResponse:
        """A server may have closed a connection that was kept: then another one is opened, as every
        client does.
        """
        for is_kept in (self._connection.sock is not None, False):
            headers = {"content-type": "application/json"}
            try:
                self._connection.request("POST", "/v1/chat/completions", body, headers)
                return self._connection.getresponse()
            except ConnectionError:  # RemoteDisconnected is one
                self._connection.close()
                if not is_kept:
                    raise
        raise AssertionError("the second one returns or raises")

    def _failed(self, what: str, retry_after: str | None = None) -> None:
        self._load.errors[what] += 1
        wait_s = _RETRY_S
        with contextlib.suppress(TypeError, ValueError):
            wait_s = float(retry_after)  # type: ignore[arg-type]
        time.sleep(max(0.0, min(wait_s, self._load.ended - time.perf_counter())))


class _Refused(Exception):
    """An error came in the stream."""


def _texts(answer: http.client.HTTPResponse, turn: Turn) -> Iterator[str]:
    """Texts of a stream; times and counts go to the turn."""
    is_over = False
    while line := answer.readline():
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:"):
            continue
        if data == b"[DONE]":
            is_over = True
            continue
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise _Refused
        if usage := event.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            turn.tokens, turn.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            turn.cached_tokens = details.get("cached_tokens")
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                turn.events.append(time.perf_counter())
                yield text
    answer.close()  # which a body of known length is not by itself; the connection stays
    if not is_over:
        raise http.client.IncompleteRead(b"")
