"""The official client's Responses API. Each test says which fault turns it red."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from flashrt.serve.access import Access
from tests.serve.wire.running import LOOK, NAME, SEARCH, WALK, Running

TOOL: Any = {"type": "function", "name": "look", "parameters": LOOK, "strict": True}
MESSAGE_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]
CALL_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
    "response.completed",
]


def kinds(events: list[Any]) -> list[str]:
    """Types, those that repeat once."""
    found = [event.type for event in events]
    return [t for i, t in enumerate(found) if i == 0 or found[i - 1] != t]


def test_a_response_goes_on_from_another(server: Running) -> None:
    """Red when the conversation before is lost, or is fed again."""
    client = server.openai()
    first = client.responses.create(model=NAME, input=WALK)
    assert first.status == "completed" and first.output_text.startswith("you are in column")
    second = client.responses.create(model=NAME, input=WALK, previous_response_id=first.id)
    whole = client.chat.completions.create(
        model=NAME,
        messages=[
            {"role": "user", "content": WALK},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": WALK},
        ],
    )
    assert second.output_text == whole.choices[0].message.content
    assert second.usage and whole.usage
    assert second.usage.input_tokens == whole.usage.prompt_tokens
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens  # type: ignore[union-attr]
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=NAME, input="x", previous_response_id=first.id)
    unkept = client.responses.create(model=NAME, input=WALK, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_events_come_in_the_official_order(server: Running) -> None:
    """Red when an event is missing, doubled or out of order, or when its parts do not add up."""
    client = server.openai()
    events: list[Any] = list(client.responses.create(model=NAME, input=WALK, stream=True))
    assert kinds(events) == MESSAGE_EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert text == client.responses.create(model=NAME, input=WALK).output_text
    ids = {e.item_id for e in events if hasattr(e, "item_id")}
    assert ids == {events[-1].response.output[0].id}
    with client.responses.stream(model=NAME, input=WALK) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text


def test_a_function_is_called_and_its_output_read(server: Running) -> None:
    """Red when calls are no items, or an output does not find its call."""
    client = server.openai()
    options: Any = {"model": NAME, "tools": [TOOL], "instructions": SEARCH}
    asked: list[Any] = [{"role": "user", "content": "bring me the red box ."}]
    events: list[Any] = list(
        client.responses.create(
            input=asked, tool_choice="required", parallel_tool_calls=False, stream=True, **options
        )
    )
    assert kinds(events) == CALL_EVENTS
    first = events[-1].response
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments)["place"]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "you see it ."}
    told = client.responses.create(
        input=[*asked, call.model_dump(exclude_none=True), output],
        tool_choice="none", max_output_tokens=10, **options,
    )  # fmt: skip
    kept = client.responses.create(
        input=[output], previous_response_id=first.id, tool_choice="none", max_output_tokens=10,
        **options,
    )  # fmt: skip
    assert told.usage.input_tokens == kept.usage.input_tokens  # type: ignore[union-attr]
    assert told.output_text == kept.output_text
    assert kept.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens  # type: ignore[union-attr]
    assert told.status == "incomplete" or told.output_text


def test_a_text_has_the_format_that_was_asked_for(server: Running) -> None:
    """Red when text.format is not followed."""
    shape: Any = {"format": {"type": "json_schema", "name": "where", "schema": LOOK}}
    found = server.openai().responses.create(model=NAME, input=WALK, text=shape)
    assert json.loads(found.output_text)["place"] in ("tower", "stable")


def test_nobody_sees_anothers_responses(started: Callable[..., Running]) -> None:
    """Red when ids are looked up without their owner."""
    running = started(Access(keys=("ann", "bob")), lanes=1)
    made = running.openai("ann").responses.create(model=NAME, input=WALK, max_output_tokens=2)
    assert made.status == "incomplete"
    assert running.openai("ann").responses.retrieve(made.id).id == made.id
    with pytest.raises(openai.NotFoundError):
        running.openai("bob").responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        running.openai("bob").responses.create(input="x", previous_response_id=made.id, model=NAME)
    with pytest.raises(openai.AuthenticationError):
        running.openai("eve").responses.retrieve(made.id)
