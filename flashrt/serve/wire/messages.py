"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic has them.

IS: content blocks -> the messages that templates know, and a reply as blocks, whole or as events in
the official order. IS NOT: prompts or parsing (conversation).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response

from flashrt.base.messages import shown
from flashrt.serve.answer import Answer, Heard, new_id
from flashrt.serve.body import Fields, objects
from flashrt.serve.conversation import (
    AUTO,
    NONE,
    REQUIRED,
    Conversation,
    rendered_prompt,
    understood,
)
from flashrt.serve.desk import Desk, Wanted
from flashrt.serve.http import QUIET, Call, EventStream, Json, sse, unless_gone
from flashrt.serve.refusal import Refusal, bad
from flashrt.serve.served import Served
from flashrt.serve.speaker import Said
from flashrt.serve.structure import Shape
from flashrt.serve.wire import common, pictures
from flashrt.serve.wire.chat_completions import function_of, joined
from flashrt.serve.wire.threads import resumed
from flashrt.text.reply import ArgumentsDelta, CallBegun, ReplyEvent, TextDelta, ThoughtDelta

_TOLD = frozenset({
    "model", "messages", "system", "tools", "tool_choice", "thinking", "output_config",
    "output_format", "chat_template_kwargs",
})  # fmt: skip
_IGNORED = frozenset({
    "metadata", "service_tier", "container", "context_management", "betas", "mcp_servers",
    "cache_control", "inference_geo", "user_profile_id",
})  # fmt: skip
_KNOWN = _TOLD | _IGNORED | common.SAMPLING | common.OURS | {
    "max_tokens", "stop_sequences", "stream",
}  # fmt: skip


class Messages:
    """The route."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, call: Call) -> Response:
        """See http.Handler."""
        fields, served = call.fields, self._desk.served
        fields.only(_KNOWN)
        most = fields.whole("max_tokens", 1)
        if most is None:
            raise fields.refuse("max_tokens", "a number of tokens, at least 1")
        streams = fields.flag("stream", False)
        told = await resumed(call, self._desk.sessions, conversation_of(fields, served))
        wanted = await understood(
            self._desk, call, told, lambda tokens: _limits_of(fields, served, tokens, most)
        )
        answer = await self._desk.ask(wanted, call.owner)
        made = _Made(served, answer)
        if not streams:
            return await unless_gone(call.request, answer, _whole(made))
        try:
            await answer.begin()
        except BaseException:
            answer.cancel()
            raise
        return EventStream(answer, _events(made), _failed, self._desk.access)


class CountTokens:
    """The route: {"input_tokens"} of a request that is not run."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, call: Call) -> Response:
        """See http.Handler."""
        fields, served = call.fields, self._desk.served
        fields.only(_KNOWN)
        told = conversation_of(fields, served)
        prompt = await rendered_prompt(self._desk, call, told)
        return Json({"input_tokens": len(prompt.tokens)})


def conversation_of(fields: Fields, served: Served) -> Conversation:
    """The conversation that a request is about."""
    served.check_name(fields.needed_text("model"))
    messages = _system(fields)
    items = fields.needed("messages", "a list of messages")
    if not isinstance(items, list) or not items:
        raise fields.refuse("messages", "a list of at least one message")
    for item in objects(items, "messages"):
        messages.extend(_messages(item, served))
    tools = [_tool(tool) for tool in fields.objects("tools")]
    choice, is_one_call = _choice(fields, tools)
    return Conversation(
        messages=messages,
        tools=tools,
        choice=choice,
        is_one_call=is_one_call,
        options=_options(fields, served),
        shape=_shape(fields),
        is_continued=messages[-1]["role"] == "assistant",
    )


def _system(fields: Fields) -> list[dict[str, Any]]:
    given = fields.get("system")
    if given is None:
        return []
    if isinstance(given, str):
        return [{"role": "system", "content": given}] if given else []
    if not isinstance(given, list):
        raise fields.refuse("system", "a text, or a list of text blocks")
    texts = []
    for block in objects(given, "system"):
        block.text("type", ("text",))
        texts.append(block.needed_text("text"))
    return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []


def _messages(item: Fields, served: Served) -> list[dict[str, Any]]:
    """A message; results of tools are messages of their own."""
    role = item.needed_text("role", ("user", "assistant", "system"))
    content = item.needed("content", "a text, or a list of content blocks")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise item.refuse("content", "a text, or a list of content blocks")
    blocks = objects(content, item.path("content"))
    if role == "assistant":
        return [_of_assistant(blocks)]
    made: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.needed_text("type")
        if kind == "tool_result":
            if parts:
                made.append({"role": role, "content": joined(parts, "\n")})
                parts = []
            made.append(_result(block, served))
        else:
            parts.append(_part(block, kind, served, may_see=role == "user"))
    if parts or not made:
        made.append({"role": role, "content": joined(parts, "\n")})
    return made


def _part(block: Fields, kind: str, served: Served, *, may_see: bool) -> dict[str, Any]:
    """A block of text, or an image."""
    if kind == "text":
        return {"type": "text", "text": block.needed_text("text")}
    if kind == "image" and may_see:
        return pictures.block_of(block, served)
    raise _unreadable(block, kind)


def _of_assistant(blocks: list[Fields]) -> dict[str, Any]:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        kind = block.needed_text("type")
        if kind == "text":
            texts.append(block.needed_text("text"))
        elif kind == "thinking":
            thoughts.append(block.needed_text("thinking"))
        elif kind == "tool_use":
            given = block.object("input")
            arguments = json.dumps({} if given is None else given.value, ensure_ascii=False)
            function = {"name": block.needed_text("name"), "arguments": arguments}
            calls.append({
                "id": block.needed_text("id"), "type": "function", "function": function,
            })  # fmt: skip
        elif kind != "redacted_thinking":
            raise _unreadable(block, kind)
    made: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return made


def _result(block: Fields, served: Served) -> dict[str, Any]:
    content = block.get("content")
    if isinstance(content, list):
        parts = [
            _part(part, part.needed_text("type"), served, may_see=True)
            for part in objects(content, block.path("content"))
        ]
        content = joined(parts, "\n")
    elif not isinstance(content, str | None):
        raise block.refuse("content", "a text, or a list of text blocks")
    block.flag("is_error", False)
    identity = block.needed_text("tool_use_id")
    return {"role": "tool", "tool_call_id": identity, "content": content or ""}


def _unreadable(block: Fields, kind: str) -> Refusal:
    path = block.path("type")
    where = "; images stand in messages of the user and in results of tools" * (kind == "image")
    return bad(path, f"a block of type {shown(kind)} cannot be read here{where}")


def _tool(tool: Fields) -> dict[str, Any]:
    kind = tool.text("type")
    if kind not in (None, "custom"):
        raise bad(
            tool.path("type"), f"{shown(kind)} is a tool of Anthropic's servers; give your own"
        )
    if not tool.has("input_schema"):
        raise tool.refuse("input_schema", "the JSON schema of the tool's input")
    return {"type": "function", "function": function_of(tool, "input_schema")}


def _choice(fields: Fields, tools: list[dict[str, Any]]) -> tuple[str, bool]:
    given = fields.object("tool_choice")
    if given is None:
        return AUTO, False
    kind = given.needed_text("type", ("auto", "any", "tool", "none"))
    if kind in ("any", "tool") and not tools:
        raise bad("tool_choice", "tool_choice needs tools")
    choice = {"auto": AUTO, "any": REQUIRED, "none": NONE}.get(kind)
    if choice is None:
        choice = given.needed_text("name")
    return choice, given.flag("disable_parallel_tool_use", False)


def _options(fields: Fields, served: Served) -> dict[str, object]:
    given = fields.object("chat_template_kwargs")
    options = {} if given is None else dict(given.value)
    thinking = fields.object("thinking")
    if thinking is not None:
        kind = thinking.needed_text("type", ("enabled", "disabled", "adaptive"))
        thinking.whole("budget_tokens", 1)
        if "enable_thinking" in served.template.source:
            options.setdefault("enable_thinking", kind != "disabled")
    return options


def _shape(fields: Fields) -> Shape | None:
    """An answer's JSON schema, under either of the names that it has had."""
    holder = fields.object("output_format")
    if holder is None:
        config = fields.object("output_config")
        holder = None if config is None else config.object("format")
    if holder is None:
        return None
    holder.needed_text("type", ("json_schema",))
    schema = holder.get("schema")
    if not isinstance(schema, dict):
        raise holder.refuse("schema", "a JSON schema")
    return Shape(schema, holder.path("schema"))


def _limits_of(fields: Fields, served: Served, tokens: list[int], most: int) -> Wanted:
    room = served.room(tokens, "messages")
    return Wanted(
        tokens=tokens,
        max_tokens=min(most, room),
        sampling=common.sampling_of(fields, served),
        stops=common.stops_of(fields, "stop_sequences"),
        priority=common.priority_of(fields),
    )


class _Made:
    """What the message of an answer has."""

    def __init__(self, served: Served, answer: Answer) -> None:
        self.served, self.answer = served, answer
        self._id = new_id("msg_")

    def usage(self, output_tokens: int) -> dict[str, Any]:
        """Tokens that were fed are `input_tokens`; those that were not are read from the cache."""
        answer = self.answer
        return {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": answer.cached_tokens,
            "output_tokens": output_tokens,
        }

    def message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, count: int
    ) -> dict[str, Any]:
        """The message object."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.served.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": self.usage(count),
        }


def _reason_of(heard: Heard) -> str:
    if heard.stop_string is not None:
        return "stop_sequence"
    if heard.reason == "length":
        return "max_tokens"
    if heard.reason == "context":
        return "model_context_window_exceeded"
    return "tool_use" if heard.calls else "end_turn"


async def _whole(made: _Made) -> Response:
    (heard,) = await made.answer.whole()
    content: list[dict[str, Any]] = []
    if heard.thought:
        content.append({"type": "thinking", "thinking": heard.thought, "signature": ""})
    if heard.text:
        content.append({"type": "text", "text": heard.text})
    for call in heard.calls:
        value = json.loads(call.arguments or "{}")
        content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": value})
    message = made.message(content, _reason_of(heard), heard.stop_string, heard.token_count)
    return Json({**message, **made.answer.place})


def _event(kind: str, **fields: Any) -> str:
    return sse({"type": kind, **fields}, event=kind)


class _Blocks:
    """The content blocks of a stream: one is open at a time."""

    def __init__(self) -> None:
        self.count = 0
        self.open: str | None = None

    def switch(self, kind: str, block: Mapping[str, object]) -> list[str]:
        """Events that close what is open, and open another; none if it is the same."""
        if self.open == kind and kind != "tool_use":
            return []
        events = self.close()
        self.open = kind
        return [*events, _event("content_block_start", index=self.count, content_block=block)]

    def close(self) -> list[str]:
        """The event that closes what is open, if anything is."""
        if self.open is None:
            return []
        events = []
        if self.open == "thinking":
            events.append(self.delta("signature_delta", signature=""))
        events.append(_event("content_block_stop", index=self.count))
        self.open, self.count = None, self.count + 1
        return events

    def delta(self, kind: str, **fields: Any) -> str:
        """More of what is open."""
        return _event("content_block_delta", index=self.count, delta={"type": kind, **fields})


def _piece_events(blocks: _Blocks, piece: ReplyEvent) -> list[str]:
    """Events of one piece."""
    if isinstance(piece, TextDelta):
        begun = blocks.switch("text", {"type": "text", "text": ""})
        return [*begun, blocks.delta("text_delta", text=piece.text)]
    if isinstance(piece, ThoughtDelta):
        begun = blocks.switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        return [*begun, blocks.delta("thinking_delta", thinking=piece.text)]
    if isinstance(piece, CallBegun):
        call = {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}}
        return blocks.switch("tool_use", call)
    if isinstance(piece, ArgumentsDelta):
        return [blocks.delta("input_json_delta", partial_json=piece.text)]
    return blocks.close()


async def _events(made: _Made) -> AsyncIterator[str]:
    answer, blocks = made.answer, _Blocks()
    is_begun = False
    async for event in answer.events():
        if event is None:
            yield _event("ping") if is_begun else QUIET
            continue
        if not is_begun:  # once the prompt's counts are known
            is_begun = True
            yield _event("message_start", message=made.message([], None, None, 0))
            yield _event("ping")
        for piece in event.pieces if isinstance(event, Said) else ():
            for text in _piece_events(blocks, piece):
                yield text
    for text in blocks.close():
        yield text
    (heard,) = answer.heard
    delta = {"stop_reason": _reason_of(heard), "stop_sequence": heard.stop_string}
    usage = made.usage(heard.token_count)
    yield _event("message_delta", delta=delta, usage=usage, **answer.place)
    yield _event("message_stop")


def _failed(refusal: Refusal) -> str:
    return sse(refusal.body("anthropic"), event="error")
