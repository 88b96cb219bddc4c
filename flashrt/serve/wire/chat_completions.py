"""POST /v1/chat/completions, as OpenAI has it.

IS: its request read, its answer written, whole or as chunks. IS NOT: prompts or parsing
(conversation).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response

from flashrt.base.messages import shown
from flashrt.serve.answer import Answer, Heard, new_id
from flashrt.serve.body import Fields, objects
from flashrt.serve.conversation import AUTO, NONE, REQUIRED, Conversation, options_of, understood
from flashrt.serve.desk import Desk, Wanted
from flashrt.serve.http import QUIET, Call, EventStream, Json, sse, unless_gone
from flashrt.serve.refusal import Refusal, bad
from flashrt.serve.served import Served
from flashrt.serve.speaker import Ended, Said
from flashrt.serve.structure import shape_of
from flashrt.serve.wire import common, pictures
from flashrt.serve.wire.threads import resumed
from flashrt.text.reply import ArgumentsDelta, CallBegun, ReplyEvent, TextDelta, ThoughtDelta

SEEN_BY = ("user", "tool")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_KNOWN = common.SAMPLING | common.IGNORED | common.OURS | {
    "model", "messages", "stream", "stream_options", "n", "stop", "logprobs", "top_logprobs",
    "max_tokens", "max_completion_tokens", "tools", "tool_choice", "parallel_tool_calls",
    "response_format", "chat_template_kwargs", "reasoning_effort", "continue_final_message",
    "modalities", "audio", "functions", "function_call", "web_search_options", "prediction",
}  # fmt: skip


class ChatCompletions:
    """The route."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, call: Call) -> Response:
        """See http.Handler."""
        fields, served = call.fields, self._desk.served
        told = await resumed(call, self._desk.sessions, conversation_of(fields, served))
        streams = fields.flag("stream", False)
        wanted = await understood(
            self._desk, call, told, lambda tokens: _limits_of(fields, served, tokens)
        )
        with_usage = _wants_usage(fields, streams)
        answer = await self._desk.ask(wanted, call.owner)
        made = _Made(served, answer, with_tokens=wanted.logprobs is not None)
        if not streams:
            return await unless_gone(call.request, answer, _whole(made))
        try:
            await answer.begin()
        except BaseException:
            answer.cancel()
            raise
        return EventStream(answer, _chunks(made, with_usage), _failed, self._desk.access)


def conversation_of(fields: Fields, served: Served) -> Conversation:
    """The conversation that a request is about. Refuses what cannot be honoured."""
    fields.only(_KNOWN)
    served.check_name(fields.text("model"))
    fields.refused("audio", "only text can be made")
    fields.refused("modalities", "only text can be made", ["text"])
    fields.refused("functions", "is of an older API; use tools")
    fields.refused("function_call", "is of an older API; use tool_choice")
    fields.refused("web_search_options", "there is no web search here")
    tools = tools_of(fields)
    given = fields.object("chat_template_kwargs")
    effort = fields.text("reasoning_effort")
    return Conversation(
        messages=messages_of(fields, served),
        tools=tools,
        choice=choice_of(fields, tools),
        is_one_call=not fields.flag("parallel_tool_calls", True),
        options=options_of(served, {} if given is None else given.value, effort),
        shape=shape_of(fields.object("response_format"), "json_schema"),
        is_continued=fields.flag("continue_final_message", False),
    )


def messages_of(fields: Fields, served: Served) -> list[dict[str, Any]]:
    """Messages with plain contents: see Conversation."""
    items = fields.needed("messages", "a list of messages")
    if not isinstance(items, list) or not items:
        raise fields.refuse("messages", "a list of at least one message")
    return [_message(item, served) for item in objects(items, fields.path("messages"))]


def _message(item: Fields, served: Served) -> dict[str, Any]:
    role = item.needed_text("role", _ROLES)
    content = content_of(item, served, may_see=role in SEEN_BY)
    made: dict[str, Any] = {"role": role, "content": content}
    if (name := item.text("name")) is not None:
        made["name"] = name
    if role == "assistant":
        thought = item.text("reasoning_content")
        if thought is None:
            thought = item.text("reasoning")
        if thought:
            made["reasoning_content"] = thought
        if item.has("function_call"):
            raise bad(
                item.path("function_call"), "function_call is of an older API; use tool_calls"
            )
        calls = [_call(one) for one in item.objects("tool_calls")]
        if calls:
            made["tool_calls"] = calls
        elif content is None:
            made["content"] = item.text("refusal") or ""
    elif content is None:
        raise item.refuse("content", "a text, or a list of parts of type text")
    if role == "tool":
        made["tool_call_id"] = item.needed_text("tool_call_id")
    return made


def content_of(
    item: Fields, served: Served, name: str = "content", *, may_see: bool
) -> str | list[dict[str, Any]] | None:
    """A content as one text, itself or its parts joined; as parts where there are images among
    them, which a message of this role `may_see`. Refuses parts of other kinds.
    """
    value = item.get(name)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise item.refuse(name, "a text, or a list of parts of type text")
    parts = []
    for part in objects(value, item.path(name)):
        kind, path = part.needed_text("type"), part.path("type")
        if kind in pictures.TYPES:
            if not may_see:
                raise bad(
                    path,
                    f"{path} is {shown(kind)}; images stand in messages of the user and of tools",
                    "unsupported_content",
                )
            parts.append(pictures.part_of(part, served))
        elif kind in ("text", "input_text", "output_text", "refusal"):
            text = part.needed_text("refusal" if kind == "refusal" else "text")
            parts.append({"type": "text", "text": text})
        else:
            raise bad(
                path,
                f"{path} is {shown(kind)}; parts are text or images (image_url)",
                "unsupported_content",
            )
    return joined(parts)


def joined(parts: list[dict[str, Any]], between: str = "") -> str | list[dict[str, Any]]:
    """Parts as one text, where all are texts; else as they are."""
    if all(part["type"] == "text" for part in parts):
        return between.join(part["text"] for part in parts)
    return parts


def _call(one: Fields) -> dict[str, Any]:
    one.text("type", ("function",))
    function = one.object("function")
    if function is None:
        raise one.refuse("function", "an object with name and arguments")
    arguments = function.get("arguments")
    if not isinstance(arguments, str | dict | None):
        raise function.refuse("arguments", "a JSON text")
    return {
        "id": one.text("id"),
        "type": "function",
        "function": {"name": function.needed_text("name"), "arguments": arguments or "{}"},
    }


def tools_of(fields: Fields) -> list[dict[str, Any]]:
    """Tools, each {"type": "function", "function": {...}}."""
    made = []
    for tool in fields.objects("tools"):
        kind = tool.needed_text("type")
        if kind != "function":
            raise bad(
                tool.path("type"), f"{tool.path('type')} is {shown(kind)}; tools here are functions"
            )
        function = tool.object("function")
        if function is None:
            raise tool.refuse("function", "an object with name and parameters")
        made.append({"type": "function", "function": function_of(function)})
    return made


def function_of(function: Fields, schema: str = "parameters") -> dict[str, Any]:
    """A function: its name, what it is for, the schema of its parameters."""
    name = function.needed_text("name")
    if not 0 < len(name) <= 128:
        raise function.refuse("name", "a name of 1 to 128 characters")
    made: dict[str, Any] = {"name": name}
    if (purpose := function.text("description")) is not None:
        made["description"] = purpose
    parameters = function.object(schema)
    made["parameters"] = (
        {"type": "object", "properties": {}} if parameters is None else dict(parameters.value)
    )
    return made


def choice_of(fields: Fields, tools: list[dict[str, Any]]) -> str:
    """Which tool is to be called."""
    given = fields.get("tool_choice")
    if isinstance(given, dict):
        holder = Fields(given, fields.path("tool_choice"))
        holder.text("type", ("function",))
        inner = holder.object("function") or holder
        choice = inner.needed_text("name")
    else:
        choice = fields.text("tool_choice", (NONE, AUTO, REQUIRED)) or AUTO
    if choice not in (NONE, AUTO) and not tools:
        raise bad(fields.path("tool_choice"), "tool_choice needs tools")
    return choice


def _limits_of(fields: Fields, served: Served, tokens: list[int]) -> Wanted:
    room = served.room(tokens, "messages")
    most = fields.whole("max_completion_tokens", 1)
    older = fields.whole("max_tokens", -1)
    if older is not None and older in (0, -1):
        if older == 0:
            raise fields.refuse("max_tokens", "a number of tokens, at least 1")
        older = None  # -1 is "no limit" to llama.cpp
    most = older if most is None else most
    alternatives = fields.whole("top_logprobs", 0, common.MOST_ALTERNATIVES)
    logprobs = fields.flag("logprobs", False)
    if alternatives and not logprobs:
        raise bad("top_logprobs", "top_logprobs needs logprobs: true")
    return Wanted(
        tokens=tokens,
        max_tokens=room if most is None else min(most, room),
        sampling=common.sampling_of(fields, served),
        n=common.choices_of(fields),
        stops=common.stops_of(fields),
        logprobs=(alternatives or 0) if logprobs else None,
        priority=common.priority_of(fields),
    )


def _wants_usage(fields: Fields, streams: bool) -> bool:
    options = fields.object("stream_options")
    if options is None:
        return False
    if not streams:
        raise bad("stream_options", "stream_options needs stream: true")
    options.only({"include_usage", "include_obfuscation"})
    return options.flag("include_usage", False)


class _Made:
    """What all objects of one answer have."""

    def __init__(self, served: Served, answer: Answer, *, with_tokens: bool) -> None:
        self.served, self.answer, self.with_tokens = served, answer, with_tokens
        self._id, self._created = new_id("chatcmpl-"), int(time.time())

    def object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One of them."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "choices": choices,
            **more,
        }

    def last(self) -> dict[str, Any]:
        """Usage and times, at the end."""
        return {
            "usage": common.usage_of(self.answer),
            "timings": self.answer.timings(),
            **self.answer.place,
        }


async def _whole(made: _Made) -> Response:
    choices = []
    for i, heard in enumerate(await made.answer.whole()):
        choice: dict[str, Any] = {
            "index": i,
            "message": _message_of(heard),
            "finish_reason": common.finish_of(heard),
            "logprobs": None,
        }
        if made.with_tokens:
            listed = common.listed_tokens(made.served, heard.tokens)
            choice["logprobs"] = {"content": listed, "refusal": None}
        choices.append(choice)
    return Json(made.object("chat.completion", choices, **made.last()))


def _message_of(heard: Heard) -> dict[str, Any]:
    calls = [call.as_openai() for call in heard.calls]
    made: dict[str, Any] = {
        "role": "assistant",
        "content": heard.text if heard.text or not calls else None,
        "refusal": None,
    }
    if heard.thought:
        made["reasoning_content"] = heard.thought
    if calls:
        made["tool_calls"] = calls
    return made


async def _chunks(made: _Made, with_usage: bool) -> AsyncIterator[str]:
    answer = made.answer

    def chunk(
        index: int,
        delta: Mapping[str, Any],
        finish: str | None = None,
        logprobs: Any = None,
        **more: Any,
    ) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        usage = {"usage": None} if with_usage else {}
        return sse(made.object("chat.completion.chunk", [choice], **usage, **more))

    for i in range(len(answer.heard)):
        yield chunk(i, {"role": "assistant", "content": ""})
    async for event in answer.events():
        if event is None:
            yield QUIET
        elif isinstance(event, Said):
            deltas = [d for piece in event.pieces if (d := _delta(piece)) is not None]
            logprobs = None
            if event.tokens:
                listed = common.listed_tokens(made.served, event.tokens)
                logprobs = {"content": listed, "refusal": None}
                deltas = deltas or [{}]
            for delta in deltas:
                yield chunk(event.index, delta, logprobs=logprobs)
                logprobs = None
        elif isinstance(event, Ended):
            more = {} if with_usage or not answer.is_over else made.last()
            more.pop("usage", None)  # was not asked for
            yield chunk(event.index, {}, common.finish_of(answer.heard[event.index]), **more)
    if with_usage:  # a chunk without choices, which clients who did not ask would not expect
        yield sse(made.object("chat.completion.chunk", [], **made.last()))
    yield sse("[DONE]")


def _delta(piece: ReplyEvent) -> dict[str, Any] | None:
    if isinstance(piece, TextDelta):
        return {"content": piece.text}
    if isinstance(piece, ThoughtDelta):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallBegun):
        function = {"name": piece.name, "arguments": ""}
        call = {"index": piece.index, "id": piece.id, "type": "function", "function": function}
        return {"tool_calls": [call]}
    if isinstance(piece, ArgumentsDelta):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    return None


def _failed(refusal: Refusal) -> str:
    return sse(refusal.body("openai"))
