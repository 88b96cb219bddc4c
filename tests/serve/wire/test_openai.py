"""The official openai client against the server. Each test says which fault turns it red."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

import flashrt
from flashrt.serve.access import OPEN
from flashrt.session.chat import open_chat
from tests.serve.wire.running import LOOK, NAME, SEARCH, WALK, Running

ASKED: list[Any] = [{"role": "user", "content": WALK}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look", "description": "look", "parameters": LOOK}}
]
STORY: list[Any] = [{"role": "user", "content": "tell me a story about a fox ."}]


def chat(client: openai.OpenAI, messages: list[Any] = ASKED, **options: Any) -> Any:
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def streamed(client: openai.OpenAI, messages: list[Any] = ASKED, **options: Any) -> list[Any]:
    return list(
        client.chat.completions.create(model=NAME, messages=messages, stream=True, **options)
    )


def text_of(chunks: list[Any], index: int = 0) -> str:
    deltas = [c.delta.content for k in chunks for c in k.choices if c.index == index]
    return "".join(text for text in deltas if text)


def test_a_chat_says_what_the_library_says(server: Running, other: flashrt.Engine) -> None:
    """Red when the prompt is another than Chat's, when a stream loses or adds text, when usage is
    not that of the tokens, or when the same prompt is fed twice.
    """
    with open_chat(other) as library:
        library.add("user", WALK)
        wanted, fed = library.reply(), library.fed_tokens
    client = server.openai()
    whole = chat(client)
    assert whole.choices[0].message.content == wanted and wanted.startswith("you are in column")
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens == fed
    assert whole.usage.total_tokens == fed + whole.usage.completion_tokens
    assert whole.system_fingerprint and whole.model_extra["timings"]["prompt_n"] <= fed
    chunks = streamed(client, stream_options={"include_usage": True})
    assert text_of(chunks) == wanted and len(chunks) > 5, "it comes in pieces"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    last = chunks[-1]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens_details.cached_tokens == fed, "nothing was fed again"
    assert all(c.choices for c in streamed(client)), "usage was not asked for"


def test_choices_are_seeds_in_a_row(server: Running) -> None:
    """Red when choices share a seed, or a choice depends on its neighbours."""
    client = server.openai()
    options: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12}
    four = chat(client, STORY, n=4, seed=40, **options)
    texts = [choice.message.content for choice in four.choices]
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3] and len(set(texts)) > 2
    alone = [chat(client, STORY, seed=40 + i, **options) for i in range(4)]
    assert texts == [one.choices[0].message.content for one in alone]
    chunks = streamed(client, STORY, n=4, seed=40, **options)
    assert texts == [text_of(chunks, i) for i in range(4)]
    drawn = {chat(client, STORY, **options).choices[0].message.content for _ in range(4)}
    assert len(drawn) > 1, "no seed: another one each time"


def test_logprobs_are_those_of_the_tokens(server: Running) -> None:
    """Red when an entry is missing or shifted, or when the likeliest is not what greedy takes."""
    client = server.openai()
    found = chat(client, logprobs=True, top_logprobs=3)
    entries = found.choices[0].logprobs.content
    assert len(entries) == found.usage.completion_tokens
    assert b"".join(bytes(e.bytes) for e in entries).decode().strip() == (
        found.choices[0].message.content
    )
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    chunks = streamed(client, logprobs=True, top_logprobs=3)
    pieces = [c.choices[0].logprobs for c in chunks if c.choices]
    assert [e.token for p in pieces if p for e in p.content] == [e.token for e in entries]
    assert chat(client).choices[0].logprobs is None


def test_stop_strings_lie_across_tokens(server: Running) -> None:
    """Red when a stop string is looked for within tokens only, or when some of it is given out."""
    client = server.openai()
    whole = chat(client).choices[0].message.content
    at = whole.index(" row")
    stop = whole[at - 2 : at + 3]  # the end of one word, the beginning of another
    cut = chat(client, stop=[stop, "never"], logprobs=True)
    assert cut.choices[0].message.content == whole[: at - 2]
    assert cut.choices[0].finish_reason == "stop"
    told = "".join(e.token for e in cut.choices[0].logprobs.content)
    assert len(told.strip()) < len(whole), "tokens after the stop are not told of"
    assert text_of(streamed(client, stop=stop)) == whole[: at - 2]


def test_sampling_parameters_arrive(server: Running) -> None:
    """Red when a parameter is dropped on the way."""
    client = server.openai()
    first = chat(client, max_tokens=1)
    assert first.choices[0].finish_reason == "length" and first.usage.completion_tokens == 1
    spelled = server.post("/tokenize", {"content": " " + first.choices[0].message.content}).json()
    banned = {str(t): -100 for t in spelled["tokens"]}
    assert chat(client, max_tokens=1, logit_bias=banned).choices[0].message.content != (
        first.choices[0].message.content
    )
    plain = chat(client, STORY, max_tokens=40).choices[0].message.content
    for option in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert chat(client, STORY, max_tokens=40, **option).choices[0].message.content != plain
    one = chat(client, STORY, max_tokens=8, temperature=5, extra_body={"top_k": 1}, seed=1)
    assert plain.startswith(one.choices[0].message.content)


def test_a_tool_is_called_and_its_result_read(server: Running) -> None:
    """Red when a call is not parsed, when its arguments break the schema, when a stream tells of
    another call, or when the next turn does not begin with what the first one left.
    """
    client = server.openai()
    messages: list[Any] = [
        {"role": "system", "content": SEARCH}, {"role": "user", "content": "bring me the red box ."}
    ]  # fmt: skip
    first = chat(client, messages, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    choice = first.choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["place"] in ("tower", "stable")
    named: Any = {"type": "function", "function": {"name": "look"}}
    chunks = streamed(client, messages, tools=TOOLS, tool_choice=named)
    deltas = [d for k in chunks for c in k.choices for d in c.delta.tool_calls or ()]
    assert deltas[0].id and deltas[0].function.name == "look"
    arguments = "".join(d.function.arguments for d in deltas)
    assert json.loads(arguments) == json.loads(call.function.arguments)
    messages += [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "you see the red box ."},
    ]
    second = chat(client, messages, tools=TOOLS, tool_choice="none", max_tokens=20)
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens, "only what is new was fed"
    assert cached < second.usage.prompt_tokens


def test_answers_have_the_shape_that_was_asked_for(server: Running) -> None:
    """Red when response_format does not reach the sampler."""
    client = server.openai()
    shape: Any = {"type": "json_schema", "json_schema": {"name": "where", "schema": LOOK}}
    found = json.loads(chat(client, response_format=shape).choices[0].message.content)
    assert list(found) == ["place"] and found["place"] in ("tower", "stable")
    anything: Any = {"type": "json_object"}
    text = chat(client, response_format=anything, max_tokens=60, seed=1, temperature=2)
    assert text.choices[0].message.content.startswith("{")
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, response_format=bad)
    assert refused.value.param == "response_format.json_schema.schema"


def test_completions_continue_text(server: Running, other: flashrt.Engine) -> None:
    """Red when a prompt is rendered by a template, when prompts of one request mix, when echo or
    token ids are lost.
    """
    client, tokenizer = server.openai(), other.tokenizer
    assert tokenizer is not None
    texts = ["once there was a tired fox", "you are in column four row"]
    found = client.completions.create(model=NAME, prompt=texts, max_tokens=6, n=2, seed=1)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text)
        with other.session() as session:
            session.prefill(ids)
            stop = other.checkpoint.stop_tokens
            wanted = tokenizer.decode(list(session.generate(6, stop=stop)))
        assert found.choices[2 * i].text == found.choices[2 * i + 1].text == wanted
        same = client.completions.create(model=NAME, prompt=ids, max_tokens=6, echo=True)
        assert same.choices[0].text == text + wanted
    assert found.usage.prompt_tokens == sum(len(tokenizer.encode(t)) for t in texts)
    chunks = list(client.completions.create(model=NAME, prompt=texts, max_tokens=6, stream=True))
    for i in range(2):
        pieces = [c.text for k in chunks for c in k.choices if c.index == i]
        assert "".join(pieces) == found.choices[2 * i].text
    told = client.completions.create(model=NAME, prompt=texts[0], max_tokens=6, logprobs=2)
    logprobs = told.choices[0].logprobs
    assert "".join(logprobs.tokens) == told.choices[0].text and len(logprobs.top_logprobs[0]) == 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 10**30}, "n"),
    ({"seed": 1.5}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"5": 1000}}, "logit_bias.5"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"stream": "yes"}, "stream"),
    ({"temprature": 1}, "temprature"),
    ({"functions": []}, "functions"),
    ({"chat_template_kwargs": {"messages": 1}}, "messages"),
    ({"messages": [{"role": "user", "content": "a " * 3000}]}, "messages"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_named(server: Running, change: dict[str, Any], param: str) -> None:
    """Red when a wrong value is taken, or another parameter is blamed."""
    body = {"model": NAME, "messages": ASKED, **change}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert error["message"]


def test_errors_are_the_clients_own(server: Running) -> None:
    """Red when a status or a shape is another than the client expects."""
    client = server.openai()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=ASKED)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, [{"role": "user", "content": "a " * 3000}])
    assert long.value.code == "context_length_exceeded"
    assert [model.id for model in client.models.list()] == [NAME]
    wrong = server.get("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    nothing = server.get("/v1/nothing")
    assert nothing.status_code == 404 and nothing.json()["error"]["message"]
    suffix = server.post("/v1/completions", {"prompt": "a", "suffix": "b"})
    assert suffix.status_code == 400 and suffix.json()["error"]["param"] == "suffix"


def test_a_stream_is_server_sent_events(server: Running) -> None:
    """Red when a line is no event, an event no JSON, or the end is not said."""
    body = {"messages": ASKED, "stream": True}
    answer = server.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == "" and blocks[-1] == "data: [DONE]"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["timings"]["predicted_n"] > 0 and "usage" not in chunks[-1]


def test_neighbours_change_nothing(server: Running) -> None:
    """Red when a token depends on who else is served: 24 requests, alone and all at once."""
    client = server.openai()

    def text(seed: int) -> str:
        asked = STORY if seed % 2 else ASKED
        found = chat(client, asked, seed=seed, temperature=1.2, max_tokens=10 + seed)
        assert found.usage.completion_tokens <= 10 + seed
        return str(found.choices[0].message.content)

    alone = [text(seed) for seed in range(24)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(text, range(24))) == alone


def test_a_turn_joins_its_session(server: Running) -> None:
    """Red when a session does not learn what was asked and said, or learns it twice."""
    client, sessions = server.openai(), server.server.core.sessions
    made = sessions.create(OPEN).result(20)
    messages = list(ASKED)
    for turns in (1, 2):
        found = chat(client, messages, extra_body={"session": made.id})
        node = found.model_extra["session"]["node"]
        messages += [found.choices[0].message.model_dump(exclude_none=True), *ASKED]
        known = sessions.messages(OPEN, made.id, node).result(20)
        assert [m["role"] for m in known] == ["user", "assistant"] * turns
        assert known[-1]["content"] == found.choices[0].message.content
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, extra_body={"session": "nobody"})
    assert missing.value.param == "session"
