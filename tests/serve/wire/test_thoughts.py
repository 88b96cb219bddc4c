"""A template that opens a thought and drops old ones. Each test says which fault turns it red.

The bundled model never closes a thought: what it says is all thought.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.serve.served import Served
from flashrt.serve.structure import Shape, grammar_of, tool_grammar
from flashrt.text.grammar import Grammar
from flashrt.text.template import TEMPLATE_FILE
from flashrt.text.tool_calls import ToolSyntax
from flashrt.weights.bundled import bundled_checkpoint
from tests.serve.wire.running import LOOK, NAME, SEARCH, WALK, Running

TEMPLATE = """\
{%- set last = namespace(user=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n ' -}}
{%- if m.reasoning_content and loop.index0 > last.user -%}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content -}}
{%- for c in m.tool_calls or [] -%}
{{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' -}}
{{- c.function.arguments | tojson + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is not defined or enable_thinking -%}{{- '<think>\\n' -}}{%- endif -%}
{%- endif -%}
"""
SYSTEM: dict[str, Any] = {"role": "system", "content": SEARCH}
ASKED: list[Any] = [SYSTEM, {"role": "user", "content": WALK}]


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("checkpoint") / NAME
    shutil.copytree(bundled_checkpoint(), folder)
    Path(folder / TEMPLATE_FILE).write_text(TEMPLATE)
    running = Running(checkpoint=folder)
    yield running
    running.end()


def test_a_thought_is_not_the_answer(thinking: Running) -> None:
    """Red when a thought comes as content on any route, whole or streamed."""
    client = thinking.openai()
    whole: Any = client.chat.completions.create(model=NAME, messages=ASKED, max_tokens=6)
    thought = whole.choices[0].message.reasoning_content
    assert thought and not whole.choices[0].message.content
    chunks: Any = client.chat.completions.create(
        model=NAME, messages=ASKED, max_tokens=6, stream=True
    )
    deltas = [c.choices[0].delta for c in chunks]
    assert "".join(getattr(d, "reasoning_content", "") for d in deltas) == thought
    answered: Any = thinking.anthropic().messages.create(
        model=NAME, max_tokens=6, system=SEARCH, messages=ASKED[1:]
    )
    assert [(b.type, b.thinking) for b in answered.content] == [("thinking", thought)]
    with thinking.anthropic().messages.stream(
        model=NAME, max_tokens=6, system=SEARCH, messages=ASKED[1:]
    ) as stream:
        final: Any = stream.get_final_message()
    assert [(b.type, b.thinking) for b in final.content] == [("thinking", thought)]
    events: Any = list(
        client.responses.create(model=NAME, input=ASKED, max_output_tokens=6, stream=True)
    )
    item = events[-1].response.output[0]
    assert item.type == "reasoning" and item.content[0].text == thought
    deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == thought


def test_thinking_can_be_turned_off(thinking: Running) -> None:
    """Red when a switch does not reach the template."""
    client = thinking.openai()
    base: dict[str, Any] = {"model": NAME, "messages": ASKED, "max_tokens": 6}
    switch = {"chat_template_kwargs": {"enable_thinking": False}}
    off: Any = client.chat.completions.create(**base, extra_body=switch)
    none: Any = client.chat.completions.create(**base, reasoning_effort="none")
    disabled: Any = thinking.anthropic().messages.create(
        model=NAME, max_tokens=6, system=SEARCH, messages=ASKED[1:], thinking={"type": "disabled"}
    )
    text = off.choices[0].message.content
    assert text and text == none.choices[0].message.content == disabled.content[0].text
    assert not getattr(off.choices[0].message, "reasoning_content", None)


def test_every_turn_feeds_what_is_new(thinking: Running) -> None:
    """Red when dropped thoughts make a turn begin cold: no boundary where the question begins."""
    client = thinking.openai()
    messages, before = list(ASKED), 0
    for turn in range(4):
        found: Any = client.chat.completions.create(model=NAME, messages=messages, max_tokens=5)
        usage = found.usage
        cached = usage.prompt_tokens_details.cached_tokens
        if turn:
            # The reply's first token on, all is another text now; the question before it is not.
            assert cached >= before, f"turn {turn}"
            assert usage.prompt_tokens - cached < 40
        last = thinking.post("/tokenize", {"content": "<think>\n"}).json()["tokens"]
        before = usage.prompt_tokens - len(last) - 1
        said = found.choices[0].message
        messages += [
            {"role": "assistant", "content": "", "reasoning_content": said.reasoning_content},
            {"role": "user", "content": WALK},
        ]


@pytest.mark.parametrize("syntax", ToolSyntax)
def test_a_shape_and_a_call_come_after_the_thought(thinking: Running, syntax: ToolSyntax) -> None:
    """Red when a grammar forbids the thought, ends within it, or does not hold the answer."""
    engine = thinking.engine
    served = Served(engine, NAME)
    tools = [{"type": "function", "function": {"name": "look", "parameters": LOOK}}]
    calls = {
        ToolSyntax.QWEN: "<function=look>\n<parameter=place>\ntower\n</parameter>\n</function>\n",
        ToolSyntax.HERMES: '{"name": "look", "arguments": {"place": "tower"}}\n',
    }
    for grammar, answer in (
        (grammar_of(served, Shape(LOOK, "x"), in_thought=True), '{"place":"tower"}'),
        (
            tool_grammar(served, tools, None, syntax, in_thought=True),
            f"<tool_call>\n{calls[syntax]}</tool_call>",
        ),
    ):
        for thought in ("", "the fox { went", "\n\n"):
            assert follows(thinking, grammar, f"{thought}</think>\n\n{answer}")
            assert not follows(thinking, grammar, f"{thought}</think>\n\nthe fox")
        assert not follows(thinking, grammar, "the fox went")


def follows(running: Running, grammar: Grammar, text: str) -> bool:
    """Whether a text is a whole reply by a grammar, token by token."""
    constraint = running.engine.grammars.begin(grammar, [1])
    for token in [*Served(running.engine, NAME).tokenizer.encode(text), 1]:
        words = np.frombuffer(constraint.allowed(), np.uint32)
        if not words[token // 32] >> (token % 32) & 1:
            return False
        if token != 1:
            constraint.take(token)
    return True
