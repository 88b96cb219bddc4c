"""Mutated requests: each is answered, none by a 500, and the server goes on. The seed is fixed.

Red when a value of a wrong kind reaches code that expects another.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import httpx
import pytest

from tests.serve.wire.running import LOOK, NAME, WALK, Running

FUNCTION = {"name": "look", "description": "d", "parameters": LOOK}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": NAME, "max_tokens": 2, "n": 1, "seed": 1, "stop": ["x"], "temperature": 0.5,
        "top_p": 0.5, "top_k": 3, "min_p": 0.1, "logprobs": True, "top_logprobs": 1,
        "logit_bias": {"5": 1}, "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "repetition_penalty": 1.1, "stream": False, "stream_options": None,
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": WALK}]},
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "t"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "auto",
        "parallel_tool_calls": True, "response_format": {"type": "text"},
        "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low",
    },
    "/v1/completions": {
        "model": NAME, "prompt": ["a", "b"], "max_tokens": 1, "n": 1, "echo": True, "stop": "x",
        "logprobs": None, "best_of": 1, "stream": False, "temperature": 1, "seed": 3,
    },
    "/v1/responses": {
        "model": NAME, "max_output_tokens": 2, "instructions": "i",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": WALK}]},
            {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "o"},
        ],
        "tools": [{"type": "function", **FUNCTION}], "tool_choice": "auto", "stream": False,
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}, "store": True,
        "include": ["message.output_text.logprobs"], "metadata": {"a": "b"}, "temperature": 0.1,
    },
    "/v1/messages": {
        "model": NAME, "max_tokens": 2, "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": WALK},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "text", "text": "t"},
                {"type": "tool_use", "id": "u", "name": "look", "input": {"place": "tower"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "u", "content": "r"},
                {"type": "text", "text": "x"},
            ]},
        ],
        "tools": [{"name": "look", "input_schema": LOOK}], "tool_choice": {"type": "auto"},
        "stop_sequences": ["x"], "thinking": {"type": "disabled"}, "stream": False,
        "temperature": 0.5, "top_k": 3, "top_p": 0.5,
    },
    "/v1/messages/count_tokens": {"model": NAME, "messages": [{"role": "user", "content": "x"}]},
    "/tokenize": {"content": "a b", "add_special": True, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/apply-template": {"messages": [{"role": "user", "content": "x"}]},
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**80), 10**400, 0.5, -0.0, 1e308, 1e-320,
    "", "x", "\x00", "\ufdd0\ufdd1", "\ud800", "<|im_end|>", "</tool_call>", "{}", "[[", "a" * 5000,
    "\u202e", "🙂" * 50, [], [[]], {}, {"": ""}, [None], [{}], ["x"], {"type": "x"}, [1, "x", None],
    {"$ref": "#/$defs/x"}, {"type": "object", "properties": 3}, {"x": {"y": {"z": [1] * 50}}},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a body."""
    found = [at] if at else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += places(inner, (*at, name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            found += places(inner, (*at, i))
    return found


def mutated(body: Any, draw: random.Random) -> Any:
    """A body with one to three changes."""
    made = copy.deepcopy(body)
    for _ in range(draw.choice((1, 1, 2, 3))):
        all_places = places(made)
        if not all_places:
            return made
        *path, last = draw.choice(all_places)
        holder = made
        for step in path:
            holder = holder[step]
        kind = draw.randrange(10)
        if kind == 0:
            del holder[last]
        elif kind == 1:
            holder[last] = [copy.deepcopy(holder[last]) for _ in range(draw.choice((1, 2, 70)))]
        elif kind == 2:
            holder[last] = {"type": holder[last], "x": copy.deepcopy(holder[last])}
        elif kind == 3 and isinstance(holder, dict):
            holder[draw.choice(("", "type", "content", "é" * 9, "x" * 300))] = holder.pop(last)
        elif kind == 4:
            other = draw.choice(all_places)
            inner = made
            for step in other:
                inner = inner[step] if not isinstance(inner, str) else inner
            holder[last] = copy.deepcopy(inner)
        else:
            holder[last] = copy.deepcopy(draw.choice(ODD))
    return made


def bytes_of(body: Any, draw: random.Random) -> bytes:
    """Its JSON; at times with bytes changed."""
    data = bytearray(json.dumps(body).encode())
    if draw.random() < 0.2:
        for _ in range(draw.choice((1, 4))):
            at = draw.randrange(len(data))
            data[at : at + draw.randrange(3)] = bytes([draw.randrange(256)])
    return bytes(data)


@pytest.mark.parametrize(
    "count", [300, pytest.param(2000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_mutated_bodies_are_refused_in_words(server: Running, count: int) -> None:
    draw = random.Random(count)
    seen = dict.fromkeys((200, 400), 0)
    with httpx.Client(timeout=60) as client:
        for i in range(count):
            path = draw.choice([*BODIES, "/v1/chat/completions", "/v1/messages", "/v1/responses"])
            data = bytes_of(mutated(BODIES[path], draw), draw)
            answer = client.post(server.url + path, content=data)
            about = f"mutation {i}: {path} {data!r}\n-> {answer.status_code} {answer.text[:500]}"
            assert answer.status_code in (200, 400, 404), about
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], about
                assert len(answer.content) < 4000, about
    assert min(seen[200], seen[400]) > count / 20, f"mutations that say something: {seen}"
    whole = server.post("/v1/chat/completions", BODIES["/v1/chat/completions"])
    assert whole.status_code == 200, whole.text


@pytest.mark.parametrize("path", BODIES)
def test_the_bodies_themselves_are_taken(server: Running, path: str) -> None:
    """Red when what is mutated was refused anyway."""
    answer = server.post(path, BODIES[path])
    assert answer.status_code == 200, answer.text
