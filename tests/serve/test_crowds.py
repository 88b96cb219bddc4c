"""Requests of all kinds beside seven other users, and answers of random shapes. Each test says
which fault turns it red.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.property.test_grammar import SCHEMAS
from tests.serve.wire.running import LOOK, SEARCH, WALK, Running

USERS = 8
QUICK, MANY = 20, pytest.param(120, marks=pytest.mark.slow)
ASKED = [WALK, "tell me a story about a fox .", "bring me the red box .", "where is the key ?"]
SHAPE = {"type": "json_schema", "json_schema": {"name": "where", "schema": LOOK}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": LOOK}}
KINDS: list[dict[str, Any]] = [
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 3},
    {"response_format": SHAPE},
    {"tools": [TOOL], "tool_choice": "required"},
    {"stop": [" the "], "frequency_penalty": 0.7, "logit_bias": {"200": 3.5}},
    {"stream": True, "logprobs": True, "top_k": 40},
]


@pytest.fixture(scope="module")
def crowded() -> Iterator[Running]:
    running = Running(lanes=USERS)
    yield running
    running.end()


def request(draw: random.Random) -> dict[str, Any]:
    messages = [{"role": "user", "content": draw.choice(ASKED)}]
    if draw.random() < 0.5:
        messages.insert(0, {"role": "system", "content": SEARCH * draw.randint(1, 3)})
    return {
        "messages": messages,
        "seed": draw.randrange(1 << 30),
        "temperature": draw.choice([0, 0.7, 1.5]),
        "max_tokens": draw.randint(1, 40),
        **draw.choice(KINDS),
    }


def answer(client: httpx.Client, body: dict[str, Any]) -> str:
    """What was answered, without names and times, and without what was known before."""
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code == 200, found.text
    if not body.get("stream"):
        return json.dumps(plain(found.json()))
    lines = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    deltas: dict[int, str] = {}
    for choice in (choice for line in lines for choice in json.loads(line)["choices"]):
        # How many tokens come in one event is a matter of time; their order is not.
        deltas.setdefault(choice["index"], "")
        deltas[choice["index"]] += (choice["delta"].get("content") or "") + json.dumps(
            (choice["logprobs"] or {}).get("content", [])
        ).strip("[]")
    return json.dumps(deltas)


def plain(found: Any) -> Any:
    if isinstance(found, list):
        return [plain(one) for one in found]
    if not isinstance(found, dict):
        return found
    passing = ("id", "created", "timings", "prompt_tokens_details")
    return {key: plain(value) for key, value in found.items() if key not in passing}


@pytest.mark.parametrize("count", [QUICK, MANY])
def test_the_same_bytes_alone_and_beside_seven(crowded: Running, count: int) -> None:
    """Red when what else is served changes a bit of an answer."""
    draw = random.Random(count)
    bodies = [request(draw) for _ in range(count)]
    with httpx.Client(base_url=crowded.url, timeout=120) as client:
        alone = [answer(client, body) for body in bodies]
        is_over = threading.Event()

        def crowd(seed: int) -> int:
            draw, asked = random.Random(-seed), 0
            while not is_over.is_set():
                answer(client, request(draw))
                asked += 1
            return asked

        with ThreadPoolExecutor(USERS) as pool:
            others = [pool.submit(crowd, seed) for seed in range(1, USERS)]
            try:
                assert [answer(client, body) for body in bodies] == alone
            finally:
                is_over.set()
            assert all(other.result() for other in others), "they were there"


@pytest.mark.parametrize("count", [15, MANY])
def test_answers_of_random_shapes(crowded: Running, count: int) -> None:
    """Red when an answer breaks its schema: a mask too late, of another request, or not at all."""

    @given(
        schema=SCHEMAS, seed=st.integers(0, 1 << 30), temperature=st.sampled_from([0.0, 0.8, 1.5])
    )
    @settings(max_examples=count, derandomize=True, database=None)
    def ask(schema: dict[str, Any], seed: int, temperature: float) -> None:
        body = {
            "messages": [{"role": "user", "content": WALK}],
            "response_format": {
                "type": "json_schema", "json_schema": {"name": "any", "schema": schema}
            },
            "seed": seed, "temperature": temperature, "max_tokens": 700,
        }  # fmt: skip
        found = client.post("/v1/chat/completions", json=body)
        assert found.status_code == 200, found.text
        (choice,) = found.json()["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)

    with httpx.Client(base_url=crowded.url, timeout=120) as client:
        ask()
