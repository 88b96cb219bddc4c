"""The official anthropic client against the server. Each test says which fault turns it red."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.serve.wire.running import LOOK, NAME, SEARCH, WALK, Running

ASKED: list[Any] = [{"role": "user", "content": WALK}]
TOOLS: list[Any] = [{"name": "look", "description": "look", "input_schema": LOOK}]


def test_a_message_is_that_of_the_other_api(server: Running) -> None:
    """Red when the two APIs make different prompts of one conversation, or share no prefixes."""
    chat = server.openai().chat.completions.create(
        model=NAME, messages=[{"role": "system", "content": SEARCH}, *ASKED]
    )
    client = server.anthropic()
    system: Any = [{"type": "text", "text": SEARCH, "cache_control": {"type": "ephemeral"}}]
    message = client.messages.create(model=NAME, max_tokens=50, system=system, messages=ASKED)
    (block,) = message.content
    assert block.type == "text" and block.text == chat.choices[0].message.content
    assert message.stop_reason == "end_turn" and message.role == "assistant"
    assert message.usage.input_tokens == 0, "all of it was known from the other route"
    assert message.usage.cache_read_input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]
    count = client.messages.count_tokens(model=NAME, system=system, messages=ASKED)
    assert count.input_tokens == chat.usage.prompt_tokens  # type: ignore[union-attr]


def test_events_come_in_the_official_order(server: Running) -> None:
    """Red when an event is missing or out of order, or the text differs from that of a whole."""
    client = server.anthropic()
    whole = client.messages.create(model=NAME, max_tokens=50, messages=ASKED)
    raw: list[Any] = list(
        client.messages.create(model=NAME, max_tokens=50, messages=ASKED, stream=True)
    )
    kinds = [event.type for event in raw]
    assert [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert raw[0].message.content == [] and raw[0].message.usage.cache_read_input_tokens > 0
    with client.messages.stream(model=NAME, max_tokens=50, messages=ASKED) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_tool_is_used_and_its_result_read(server: Running) -> None:
    """Red when tool blocks are lost on either way, or a next turn begins cold."""
    client = server.anthropic()
    asked: list[Any] = [{"role": "user", "content": "bring me the red box ."}]
    options: Any = {"model": NAME, "max_tokens": 60, "system": SEARCH, "tools": TOOLS}
    must: Any = {"type": "any", "disable_parallel_tool_use": True}
    first = client.messages.create(messages=asked, tool_choice=must, **options)
    (use,) = first.content
    assert use.type == "tool_use" and use.input["place"] in ("tower", "stable")  # type: ignore[index]
    assert first.stop_reason == "tool_use"
    with client.messages.stream(messages=asked, tool_choice=must, **options) as stream:
        streamed = stream.get_final_message().content
    assert [(b.type, b.input) for b in streamed] == [("tool_use", use.input)]  # type: ignore[union-attr]
    result: Any = [{"type": "tool_result", "tool_use_id": use.id, "content": "you see it ."}]
    second = client.messages.create(
        messages=[
            *asked,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": result},
        ],
        **options,
    )
    assert second.content
    read = second.usage.cache_read_input_tokens or 0
    assert read >= first.usage.input_tokens + (first.usage.cache_read_input_tokens or 0)


def test_stops_and_beginnings(server: Running) -> None:
    """Red when the stop string that ended a text is not named, or a prefilled reply starts anew."""
    client = server.anthropic()
    whole = client.messages.create(model=NAME, max_tokens=50, messages=ASKED)
    text = whole.content[0].text  # type: ignore[union-attr]
    stops = ["never", " row"]
    cut = client.messages.create(model=NAME, max_tokens=50, messages=ASKED, stop_sequences=stops)
    assert cut.content[0].text == text[: text.index(" row")]  # type: ignore[union-attr]
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", " row")
    short = client.messages.create(model=NAME, max_tokens=2, messages=ASKED)
    assert short.stop_reason == "max_tokens" and short.usage.output_tokens == 2
    begun = text[: text.index(" row")]
    rest = client.messages.create(
        model=NAME, max_tokens=50, messages=[*ASKED, {"role": "assistant", "content": begun}]
    )
    assert begun + rest.content[0].text == text  # type: ignore[union-attr]


def test_errors_are_the_clients_own(server: Running) -> None:
    """Red when a status or a shape is another than the client expects."""
    client = server.anthropic()
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude-9", max_tokens=5, messages=ASKED)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    for change, param in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "x"}, "temperature"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"wrong": 1}, "wrong"),
    ):
        body = {"model": NAME, "max_tokens": 5, "messages": ASKED, **change}
        answer = server.post("/v1/messages", body)
        assert answer.status_code == 400 and answer.json()["type"] == "error", answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.json()["error"]["message"].startswith(param)
