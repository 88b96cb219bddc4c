"""POST /v1/responses, and a response that is kept: GET and DELETE /v1/responses/{id}, as OpenAI has
them.

IS: input items -> the messages that templates know, and a reply as output items, whole or as events
in the official order; what `previous_response_id` goes on from. IS NOT: prompts or parsing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from flashrt.base.messages import shown
from flashrt.serve.answer import Answer, ToolCall, new_id
from flashrt.serve.ask import TokenLogprobs
from flashrt.serve.body import Fields, objects
from flashrt.serve.conversation import Conversation, options_of, understood
from flashrt.serve.desk import Desk, Wanted
from flashrt.serve.history import History
from flashrt.serve.http import QUIET, Call, EventStream, Json, sse, unless_gone
from flashrt.serve.refusal import Refusal, bad
from flashrt.serve.served import Served
from flashrt.serve.speaker import Said
from flashrt.serve.structure import shape_of
from flashrt.serve.wire import common
from flashrt.serve.wire.chat_completions import SEEN_BY, choice_of, content_of, function_of
from flashrt.serve.wire.threads import resumed
from flashrt.text.reply import ArgumentsDelta, CallBegun, CallEnded, TextDelta, ThoughtDelta

_KNOWN = common.SAMPLING | common.IGNORED | common.OURS | {
    "model", "input", "instructions", "max_output_tokens", "tools", "tool_choice", "stream",
    "parallel_tool_calls", "previous_response_id", "reasoning", "text", "top_logprobs", "include",
    "truncation", "background", "conversation", "prompt", "stream_options", "max_tool_calls",
    "chat_template_kwargs", "stop",
}  # fmt: skip
_WITH_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (_WITH_LOGPROBS, "reasoning.encrypted_content")


class Responses:
    """The routes."""

    def __init__(self, desk: Desk, history: History) -> None:
        self._desk, self._history = desk, history

    async def create(self, call: Call) -> Response:
        """POST /v1/responses. See http.Handler."""
        fields, served = call.fields, self._desk.served
        fields.only(_KNOWN)
        before = await self._before(fields, call.owner)
        told = _conversation_of(fields, served, before)
        told = await resumed(call, self._desk.sessions, told)
        streams, with_tokens = fields.flag("stream", False), _with_tokens(fields)
        wanted = await understood(
            self._desk, call, told, lambda tokens: _limits_of(fields, served, tokens, with_tokens)
        )
        answer = await self._desk.ask(wanted, call.owner)
        made = _Made(fields, served, answer, told, wanted)

        async def keep(response: dict[str, Any]) -> None:
            if fields.flag("store", True):
                said = answer.heard[0].message()
                first = told.messages
                if fields.has("instructions") and told.session is None:
                    first = first[1:]  # they are this request's alone
                await self._history.keep(call.owner, response, [*first, said])

        if not streams:
            return await unless_gone(call.request, answer, _whole(made, keep))
        try:
            await answer.begin()
        except BaseException:
            answer.cancel()
            raise
        stream = _Stream(made, keep)
        return EventStream(answer, stream.events(), stream.failed, self._desk.access)

    async def get(self, call: Call) -> Response:
        """GET /v1/responses/{id}."""
        found = await self._history.find(call.owner, call.request.path_params["id"])
        if found is None:
            raise _unknown(call.request.path_params["id"], None)
        return Json(found.response)

    async def delete(self, call: Call) -> Response:
        """DELETE /v1/responses/{id}."""
        name = call.request.path_params["id"]
        if not await self._history.forget(call.owner, name):
            raise _unknown(name, None)
        return Json({"id": name, "object": "response", "deleted": True})

    async def _before(self, fields: Fields, owner: str) -> list[dict[str, Any]]:
        name = fields.text("previous_response_id")
        if name is None:
            return []
        fields.refused("session", "give one of session and previous_response_id")
        found = await self._history.find(owner, name)
        if found is None:
            raise _unknown(name, "previous_response_id")
        return found.messages


def _unknown(name: str, param: str | None) -> Refusal:
    words = (
        f"no response {name[:80]!r} is kept here; the oldest are forgotten, and all at a restart"
    )
    return Refusal(404, words, param, "response_not_found")


def _conversation_of(fields: Fields, served: Served, before: list[dict[str, Any]]) -> Conversation:
    served.check_name(fields.text("model"))
    fields.refused("background", "responses cannot be made in the background", False)
    fields.refused("conversation", "is not kept here; use previous_response_id")
    fields.refused("prompt", "stored prompts are not kept here")
    fields.text("truncation", ("disabled", "auto"))
    instructions = fields.text("instructions")
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    tools = []
    for tool in fields.objects("tools"):
        if tool.needed_text("type") != "function":
            path = tool.path("type")
            raise bad(path, f"{path} is {shown(tool.get('type'))}; tools here are functions")
        tools.append({"type": "function", "function": function_of(tool)})
    reasoning = fields.object("reasoning")
    effort = None if reasoning is None else reasoning.text("effort")
    given = fields.object("chat_template_kwargs")
    text = fields.object("text")
    return Conversation(
        messages=[*messages, *before, *_input(fields, served)],
        tools=tools,
        choice=choice_of(fields, tools),
        is_one_call=not fields.flag("parallel_tool_calls", True),
        options=options_of(served, {} if given is None else given.value, effort),
        shape=None if text is None else shape_of(text.object("format"), ""),
    )


def _input(fields: Fields, served: Served) -> list[dict[str, Any]]:
    given = fields.needed("input", "a text, or a list of items")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise fields.refuse("input", "a text, or a list of at least one item")
    made: list[dict[str, Any]] = []
    thought = ""
    for item in objects(given, "input"):
        if item.get("type") == "reasoning":
            thought = _thought(item)
            continue
        one = _item(item, served)
        if one["role"] == "assistant" and thought:
            one["reasoning_content"], thought = thought, ""
        last = made[-1] if made else None
        if one.get("tool_calls") and last is not None and last["role"] == "assistant":
            last.setdefault("tool_calls", []).extend(one["tool_calls"])
        else:
            made.append(one)
    if not made:
        raise fields.refuse("input", "a message")
    return made


def _item(item: Fields, served: Served) -> dict[str, Any]:
    kind = item.text("type") or "message"
    if kind == "function_call_output":
        return _output(item, served)
    if kind == "message":
        return _message(item, served)
    if kind == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(item)]}
    path = item.path("type")
    raise bad(path, f"{path} is {shown(kind)}; items here are messages and calls of functions")


def _message(item: Fields, served: Served) -> dict[str, Any]:
    role = item.needed_text("role", ("user", "assistant", "system", "developer"))
    content = content_of(item, served, may_see=role in SEEN_BY)
    if content is None:
        raise item.refuse("content", "a text, or a list of parts of type input_text")
    return {"role": role, "content": content}


def _thought(item: Fields) -> str:
    parts = item.objects("content") or item.objects("summary")
    return "\n".join(part.needed_text("text") for part in parts)


def _call(item: Fields) -> dict[str, Any]:
    function = {"name": item.needed_text("name"), "arguments": item.needed_text("arguments")}
    return {"id": item.needed_text("call_id"), "type": "function", "function": function}


def _output(item: Fields, served: Served) -> dict[str, Any]:
    content = content_of(item, served, "output", may_see=True)
    if content is None:
        raise item.refuse("output", "a text, or a list of parts of type input_text")
    return {"role": "tool", "tool_call_id": item.needed_text("call_id"), "content": content}


def _with_tokens(fields: Fields) -> bool:
    for one in fields.items("include") or []:
        if one not in _INCLUDED:
            raise fields.refuse("include", f"names among {', '.join(_INCLUDED)}")
    return _WITH_LOGPROBS in (fields.items("include") or []) or fields.has("top_logprobs")


def _limits_of(fields: Fields, served: Served, tokens: list[int], with_tokens: bool) -> Wanted:
    room = served.room(tokens, "input")
    most = fields.whole("max_output_tokens", 1)
    alternatives = fields.whole("top_logprobs", 0, common.MOST_ALTERNATIVES) or 0
    return Wanted(
        tokens=tokens,
        max_tokens=room if most is None else min(most, room),
        sampling=common.sampling_of(fields, served),
        stops=common.stops_of(fields),
        logprobs=alternatives if with_tokens else None,
        priority=common.priority_of(fields),
    )


class _Made:
    """The response object of an answer."""

    def __init__(
        self, fields: Fields, served: Served, answer: Answer, told: Conversation, wanted: Wanted
    ) -> None:
        self.served, self.answer = served, answer
        self._fields, self._told, self._wanted = fields, told, wanted
        self._id, self._created = new_id("resp_"), time.time()

    def response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """It, as far as it is now."""
        fields, wanted = self._fields, self._wanted
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(self._created),
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": fields.get("instructions"),
            "max_output_tokens": fields.get("max_output_tokens"),
            "metadata": fields.get("metadata") or {},
            "model": self.served.name,
            "output": output,
            "parallel_tool_calls": not self._told.is_one_call,
            "previous_response_id": fields.get("previous_response_id"),
            "reasoning": fields.get("reasoning") or {"effort": None, "summary": None},
            "store": fields.flag("store", True),
            "temperature": wanted.sampling.get("temperature"),
            "text": fields.get("text") or {"format": {"type": "text"}},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": fields.get("tools") or [],
            "top_logprobs": fields.get("top_logprobs") or 0,
            "top_p": wanted.sampling.get("top_p", 1.0),
            "truncation": fields.get("truncation") or "disabled",
            "usage": None,
            "user": fields.get("user"),
            **more,
        }

    def ended(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        """It, once the answer has ended."""
        answer = self.answer
        (heard,) = answer.heard
        is_cut = heard.reason in ("length", "context")
        return self.response(
            "incomplete" if is_cut else "completed",
            output,
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            completed_at=None if is_cut else int(time.time()),
            usage={
                "input_tokens": answer.prompt_tokens,
                "input_tokens_details": {"cached_tokens": answer.cached_tokens},
                "output_tokens": answer.token_count,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answer.prompt_tokens + answer.token_count,
            },
            timings=answer.timings(),
            **answer.place,
        )


def _text_part(
    served: Served, text: str, tokens: list[tuple[int, TokenLogprobs]]
) -> dict[str, Any]:
    listed = common.listed_tokens(served, tokens)
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": listed}


def _call_item(call: ToolCall, name: str, status: str, arguments: str) -> dict[str, Any]:
    return {
        "id": name,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": arguments,
    }


async def _whole(made: _Made, keep: Any) -> Response:
    (heard,) = await made.answer.whole()
    output: list[dict[str, Any]] = []
    if heard.thought:
        part = {"type": "reasoning_text", "text": heard.thought}
        output.append({
            "id": new_id("rs_"), "type": "reasoning", "summary": [], "content": [part],
        })  # fmt: skip
    status = "incomplete" if heard.reason in ("length", "context") else "completed"
    if heard.text or not heard.calls:
        part = _text_part(made.served, heard.text, heard.tokens)
        output.append({
            "id": new_id("msg_"), "type": "message", "role": "assistant", "status": status,
            "content": [part],
        })  # fmt: skip
    for call in heard.calls:
        output.append(_call_item(call, new_id("fc_"), "completed", call.arguments))
    response = made.ended(output)
    await keep(response)
    return Json(response)


class _Stream:
    """A response as events: each has a number, each item is added, filled and done in turn."""

    def __init__(self, made: _Made, keep: Any) -> None:
        self._made, self._keep = made, keep
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None  # the one that is open
        self._text = ""
        self._tokens: list[tuple[int, TokenLogprobs]] = []

    async def events(self) -> AsyncIterator[str]:
        """All events."""
        made = self._made
        yield self._event("response.created", response=made.response("in_progress", []))
        yield self._event("response.in_progress", response=made.response("in_progress", []))
        async for event in made.answer.events():
            if event is None:
                yield QUIET
            elif isinstance(event, Said):
                for text in self._said(event):
                    yield text
        for text in self._close("completed" if made.answer.heard[0].reason == "stop" else None):
            yield text
        response = made.ended(self._output)
        await self._keep(response)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, refusal: Refusal) -> str:
        """The last events, when it fails."""
        body = refusal.body("openai")["error"]
        code = body["code"] or body["type"]
        response = self._made.response(
            "failed", self._output, error={"code": code, "message": refusal.message}
        )
        error = self._event("error", code=code, message=refusal.message, param=refusal.param)
        return error + self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return sse({"type": kind, "sequence_number": self._number - 1, **fields}, event=kind)

    def _in_item(self, kind: str, **fields: Any) -> str:
        assert self._item is not None, "the callers opened it"
        place = {"item_id": self._item["id"], "output_index": len(self._output)}
        return self._event(kind, **place, **fields)

    def _said(self, event: Said) -> list[str]:
        made: list[str] = []
        tokens = list(event.tokens)
        for piece in event.pieces:
            if isinstance(piece, TextDelta):
                made += self._open("message")
                self._text += piece.text
                self._tokens += tokens
                listed = common.listed_tokens(self._made.served, tokens)
                tokens = []
                made.append(
                    self._in_item(
                        "response.output_text.delta",
                        content_index=0,
                        delta=piece.text,
                        logprobs=listed,
                    )
                )
            elif isinstance(piece, ThoughtDelta):
                made += self._open("reasoning")
                self._text += piece.text
                kind = "response.reasoning_text.delta"
                made.append(self._in_item(kind, content_index=0, delta=piece.text))
            elif isinstance(piece, CallBegun):
                made += self._close("completed")
                made += self._begin_call(ToolCall(piece.id, piece.name))
            elif isinstance(piece, ArgumentsDelta):
                self._text += piece.text
                kind = "response.function_call_arguments.delta"
                made.append(self._in_item(kind, delta=piece.text))
            elif isinstance(piece, CallEnded):
                made += self._close("completed" if piece.is_whole else "incomplete")
        return made

    def _open(self, kind: str) -> list[str]:
        """Events that begin an item of text, unless it is the one that is open."""
        if self._item is not None and self._item["type"] == kind:
            return []
        made = self._close("completed")
        if kind == "message":
            self._item = {
                "id": new_id("msg_"), "type": kind, "role": "assistant", "status": "in_progress",
                "content": [],
            }  # fmt: skip
            part: dict[str, Any] = _text_part(self._made.served, "", [])
        else:
            self._item = {"id": new_id("rs_"), "type": kind, "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        made.append(self._added())
        made.append(self._in_item("response.content_part.added", content_index=0, part=part))
        return made

    def _begin_call(self, call: ToolCall) -> list[str]:
        self._item = _call_item(call, new_id("fc_"), "in_progress", "")
        return [self._added()]

    def _added(self) -> str:
        return self._event(
            "response.output_item.added", output_index=len(self._output), item=self._item
        )

    def _close(self, status: str | None) -> list[str]:
        """Events that end the item that is open; `status` None: the answer was cut."""
        item, text = self._item, self._text
        if item is None:
            return []
        made: list[str] = []
        if item["type"] == "function_call":
            item = {**item, "status": status or "incomplete", "arguments": text}
            kind = "response.function_call_arguments.done"
            made.append(self._in_item(kind, name=item["name"], arguments=text))
        elif item["type"] == "message":
            part = _text_part(self._made.served, text, self._tokens)
            done = {"content_index": 0, "text": text, "logprobs": part["logprobs"]}
            made.append(self._in_item("response.output_text.done", **done))
            made.append(self._in_item("response.content_part.done", content_index=0, part=part))
            item = {**item, "status": status or "incomplete", "content": [part]}
        else:
            part = {"type": "reasoning_text", "text": text}
            made.append(self._in_item("response.reasoning_text.done", content_index=0, text=text))
            made.append(self._in_item("response.content_part.done", content_index=0, part=part))
            item = {**item, "content": [part]}
        made.append(
            self._event("response.output_item.done", output_index=len(self._output), item=item)
        )
        self._output.append(item)
        self._item, self._text, self._tokens = None, "", []
        return made
