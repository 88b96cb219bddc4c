"""Agents of twenty turns against `flashrt serve`, by the official clients, whose server is killed
in the midst. Each test says which fault turns it red.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from flashrt.text.template import TEMPLATE_FILE
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.building import Building
from flashrt.worlds.document import HELD_OUT
from tests.serve.commands import served
from tests.serve.wire.test_thoughts import TEMPLATE as DROPS_THOUGHTS

TURNS, KILLED_AFTER = 20, 11
SYSTEM = " ".join(Building(HELD_OUT + i, 32).prompt() for i in range(5))
OPENING = 1  # the beginning of a reply: a template may write it in another way in the next turn


HTTP = httpx.Client(timeout=60)
# Made once: a client takes longer to make than a turn.
OPENAI = openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="none", max_retries=0)
ANTHROPIC = anthropic.Anthropic(base_url="http://127.0.0.1", api_key="none", max_retries=0)


@dataclass
class Agent:
    """A conversation in OpenAI's form; `known`: what its prompts and replies have been."""

    url: str = ""
    messages: list[dict[str, Any]] = field(
        default_factory=lambda: [{"role": "system", "content": SYSTEM}]
    )
    known: list[list[int]] = field(default_factory=list)

    def turn(self, api: str, question: dict[str, Any]) -> tuple[int, int]:
        """Ask by an API. Tokens that were fed, and those that no text before begins with."""
        self.messages.append(question)
        tokens: list[int] = self._post("/apply-template", messages=self.messages)["tokens"]
        new = len(tokens) - max((common(tokens, known) for known in self.known), default=0)
        reply, total, cached = (by_openai if api == "openai" else by_anthropic)(self)
        assert total == len(tokens), "usage counts the prompt's tokens"
        said = reply.get("reasoning_content", "") + reply["content"]
        self.known.append(tokens + self._post("/tokenize", content=said)["tokens"])
        self.messages.append(reply)
        return total - cached, new

    def _post(self, path: str, **body: Any) -> Any:
        answer = HTTP.post(self.url + path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


def common(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def by_openai(agent: Agent) -> tuple[dict[str, Any], int, int]:
    """The reply, the prompt's tokens, and how many of them were there."""
    found: Any = OPENAI.with_options(base_url=f"{agent.url}/v1").chat.completions.create(
        model="default", messages=agent.messages, max_tokens=20
    )
    said, usage = found.choices[0].message, found.usage
    reply = {"role": "assistant", "content": said.content or ""}
    if thought := getattr(said, "reasoning_content", None):
        reply["reasoning_content"] = thought
    return reply, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


def by_anthropic(agent: Agent) -> tuple[dict[str, Any], int, int]:
    system, *messages = agent.messages
    found: Any = ANTHROPIC.with_options(base_url=agent.url).messages.create(
        model="default", max_tokens=20, system=system["content"],
        messages=[as_anthropic(message) for message in messages],
    )  # fmt: skip
    reply = {"role": "assistant", "content": ""}
    for block in found.content:
        name = {"text": "content", "thinking": "reasoning_content"}[block.type]
        reply[name] = getattr(block, block.type)
    usage = found.usage
    cached = usage.cache_read_input_tokens
    return reply, usage.input_tokens + cached + usage.cache_creation_input_tokens, cached


def as_anthropic(message: dict[str, Any]) -> Any:
    if message["role"] == "tool":
        result = {
            "type": "tool_result",
            "tool_use_id": message["tool_call_id"],
            "content": message["content"],
        }
        return {"role": "user", "content": [result]}
    blocks: list[dict[str, Any]] = []
    if thought := message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    if message["content"]:
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", []):
        function = call["function"]
        arguments = json.loads(function["arguments"])
        blocks.append(
            {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments}
        )
    return {"role": message["role"], "content": blocks}


def next_question(agent: Agent, turn: int, calls: bool) -> dict[str, Any]:
    """In every second turn the result of a call, which the client gives to the reply: the model
    that comes along does not end its thoughts.
    """
    if not calls or turn % 2 == 0:
        return {"role": "user", "content": f"bring me the {THINGS[turn]} ."}
    function = {"name": "look", "arguments": json.dumps({"place": "tower"})}
    call = {"id": f"call_{turn}", "type": "function", "function": function}
    agent.messages[-1]["tool_calls"] = [call]
    return {"role": "tool", "tool_call_id": call["id"], "content": "you see nothing ."}


THINGS = Building(HELD_OUT, 32).things


@pytest.mark.parametrize("drops", [False, True], ids=["keeps", "drops"])
def test_every_turn_feeds_what_is_new(tmp_path: Path, drops: bool) -> None:
    """Red when a turn is fed what an earlier one computed: by the other API, before the server was
    killed, or before a template dropped the thoughts that came after it.
    """
    checkpoint = tmp_path / "tiny-agent"
    shutil.copytree(bundled_checkpoint(), checkpoint)
    if drops:
        (checkpoint / TEMPLATE_FILE).write_text(DROPS_THOUGHTS)
    options = (str(checkpoint), "--store", str(tmp_path / "store"), "--max-positions", "4096")
    agent, found = Agent(), []
    for first, last in ((0, KILLED_AFTER), (KILLED_AFTER, TURNS)):
        with served(*options) as (process, agent.url):
            for turn in range(first, last):
                api = "openai" if turn // 2 % 2 else "anthropic"
                found.append(agent.turn(api, next_question(agent, turn, drops)))
            asked = {"role": "user", "content": "tell me a story about a fox ."}
            body = {"messages": [*agent.messages, asked], "stream": True}
            with httpx.stream("POST", f"{agent.url}/v1/chat/completions", json=body) as answer:
                next(answer.iter_bytes())
                process.kill()  # as kill -9, while another turn runs
                process.wait(20)
    (fed, new), *others = found
    assert fed == new > 1900, "the first turn is cold"
    for turn, (fed, new) in enumerate(others, 1):
        assert fed <= new + OPENING, f"turn {turn}"
    assert max(new for _, new in others) < 120, "the turns are short"


@pytest.mark.parametrize("host", [(), ("--host-bytes", "0")], ids=["default", "none"])
def test_more_conversations_than_the_pool_holds(host: tuple[str, ...]) -> None:
    """Red when a server without a store forgets all but the newest few, as one without memory for
    them does: the second case.
    """
    with served("--pool-bytes", "1000000", "--lanes", "2", *host) as (_, url):
        fed = []
        for _ in range(2):
            for i in range(8):
                system = {"role": "system", "content": Building(HELD_OUT + i, 32).prompt()}
                asked = {"role": "user", "content": "bring me the red box ."}
                body = {"messages": [system, asked], "max_tokens": 2}
                usage = HTTP.post(f"{url}/v1/chat/completions", json=body).json()["usage"]
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                fed.append(usage["prompt_tokens"] - cached)
    assert min(fed[:8]) > 350
    assert max(fed[8:]) < 10 if not host else min(fed[8:]) > 350
