"""A conversation as all chat routes mean it, and the request for text that it becomes.

IS: messages, tools and their choice, options of the template and a shape for the answer -> prompt
tokens, a parser of the reply, a grammar. IS NOT: the JSON of one API (wire): each route reads its
own and makes one of these.

Templates differ in what they know. One that knows no tools is told of them in a system message, in
the form that most models were trained on, and calls and results stand in contents then.
"""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from flashrt.base.messages import shown
from flashrt.engine.sight import Image
from flashrt.serve.desk import Desk, Wanted
from flashrt.serve.http import Call, unless_left
from flashrt.serve.refusal import bad
from flashrt.serve.served import Served
from flashrt.serve.speaker import Parser
from flashrt.serve.structure import Shape, grammar_of, tool_grammar
from flashrt.session.pictures import parts_apart, picture_of
from flashrt.text.messages import checked_messages, content_of
from flashrt.text.prompt import Prompt
from flashrt.text.reply import ReplyParser
from flashrt.text.template import Message
from flashrt.text.tool_calls import Tools, ToolSyntax, tool_syntax

_T = TypeVar("_T")
AUTO, NONE, REQUIRED = "auto", "none", "required"
_TOLD = (
    "# Tools\n\nYou may call functions. Their signatures are within <tools></tools>:\n<tools>\n"
    "{tools}\n</tools>\n\nFor each call, return a JSON object with the function's name and its "
    "arguments within <tool_call></tool_call>:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


@dataclass(slots=True)
class Conversation:
    """messages, tools: as OpenAI's chat API has them, checked; contents are texts, or parts of type
    text and image_url, the images in base64. choice: "auto", "none", "required"
    or the name of a tool. options: for the template. is_continued: the reply goes on where the last
    message, an assistant's, ends. A request in a session: see wire.threads.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: str = AUTO
    is_one_call: bool = False
    options: dict[str, object] = field(default_factory=dict)
    shape: Shape | None = None
    is_continued: bool = False
    session: str | None = None  # of whose conversation the first `known` messages are
    known: int = 0
    tip: str | None = None  # its node at that moment


def options_of(
    served: Served, given: Mapping[str, object], effort: str | None
) -> dict[str, object]:
    """Options of the template; an effort goes to one that knows it."""
    made = dict(given)
    source = served.template.source
    if effort is not None:
        if "reasoning_effort" in source:
            made.setdefault("reasoning_effort", effort)
        if "enable_thinking" in source:
            made.setdefault("enable_thinking", effort != "none")
    return made


def rendered(
    served: Served, told: Conversation
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages and tools as the template can take them. Raises ChatError."""
    source = served.template.source
    messages = [_with_known_role(m, source) for m in told.messages]
    names = {
        call.get("id"): call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls") or ()
    }
    for message in messages:
        known = names.get(message.get("tool_call_id"))
        if message["role"] == "tool" and known is not None:
            message.setdefault("name", known)
    knows_tools = "tool_calls" in source
    if not knows_tools:
        messages = [_spelled_out(m, "'tool'" in source or '"tool"' in source) for m in messages]
        if told.tools:
            messages = _told_of(messages, told.tools)
    return list(checked_messages(messages)), told.tools if knows_tools and told.tools else None


async def understood(
    desk: Desk, call: Call, told: Conversation, make: Callable[[list[int]], Wanted]
) -> Wanted:
    """The request for text; `make` is given the prompt and adds limits and sampling. Its images
    were seen where they will be fed.

    Raises Refusal, ChatError, ImageError, and ClientDisconnect where the client goes meanwhile.
    """
    images = await glanced(desk, call.request, told.messages)
    wanted = await asyncio.to_thread(wanted_of, desk.served, told, make, images)
    if images:
        await _beside(
            call.request, lambda gone: desk.eyes.look(call.owner, wanted.tokens, images, gone)
        )
    return wanted


async def rendered_prompt(desk: Desk, call: Call, told: Conversation) -> Prompt:
    """The prompt of a request that is not run. Raises as `understood` does."""
    images, served = await glanced(desk, call.request, told.messages), desk.served

    def work() -> Prompt:
        messages, tools = rendered(served, told)
        return served.prompt(
            messages, tools, told.options, is_continued=told.is_continued, images=images
        )

    return await asyncio.to_thread(work)


async def glanced(
    desk: Desk, request: Request, messages: Sequence[Mapping[str, Any]]
) -> tuple[Image, ...]:
    """The images of messages, in order. Raises Refusal, ImageError, ClientDisconnect."""
    parts = parts_apart(messages)[1]
    if not parts:
        return ()
    if not desk.served.sees:  # as of a session that was begun with eyes
        raise bad("messages", f"the messages have images; {desk.served.blind}")
    files = [functools.partial(_file_of, part) for part in parts]
    return await _beside(request, lambda gone: desk.eyes.glance(files, gone))


async def _beside(request: Request, work: Callable[[Callable[[], bool]], Future[_T]]) -> _T:
    """What the eyes do, which end early once the client has gone."""
    gone = threading.Event()
    try:
        return await unless_left(request, asyncio.wrap_future(work(gone.is_set)))
    finally:
        gone.set()


def _file_of(part: Mapping[str, Any]) -> bytes:
    """Of a part as wire.pictures makes it: never a path."""
    picture = picture_of(part)
    assert isinstance(picture, bytes), "parts of requests are data"
    return picture


def wanted_of(
    served: Served,
    told: Conversation,
    make: Callable[[list[int]], Wanted],
    images: tuple[Image, ...] = (),
) -> Wanted:
    """The request for text, of images that were seen. Raises Refusal, ChatError."""
    messages, tools = rendered(served, told)
    prompt = served.prompt(
        messages, tools, told.options, is_continued=told.is_continued, images=images
    )
    wanted = make(prompt.tokens)
    wanted.images = images
    starts = {*prompt.turn_starts, prompt.tail_start}
    wanted.turn_starts = tuple(sorted(at for at in starts if 0 < at <= len(prompt.tokens)))
    if told.session is not None:  # as they were sent: a later turn may render them differently
        new = told.messages[told.known :]
        wanted.session, wanted.tip = told.session, told.tip
        wanted.unfinished = new.pop() if told.is_continued else None
        wanted.messages = tuple(new)
    known = Tools(told.tools)
    may_call = bool(told.tools) and told.choice != NONE
    syntax = (tool_syntax(served.template.source) or ToolSyntax.HERMES) if may_call else None
    if syntax is not None and told.choice != AUTO:
        named = None if told.choice == REQUIRED else told.choice
        if named is not None and named not in known.names:
            raise bad("tool_choice", f"tool_choice names {shown(named)}, which is not in tools")
        wanted.sampling["grammar"] = tool_grammar(
            served, told.tools, named, syntax, in_thought=prompt.in_thought
        )
    elif told.shape is not None:
        wanted.sampling["grammar"] = grammar_of(served, told.shape, in_thought=prompt.in_thought)
    wanted.is_one_call = told.is_one_call
    in_thought, is_continued = prompt.in_thought, told.is_continued

    def parser() -> Parser:
        return ReplyParser(
            in_thought=in_thought, is_continued=is_continued, syntax=syntax, tools=known
        )

    wanted.parser = parser
    return wanted


def _with_known_role(message: Mapping[str, Any], source: str) -> dict[str, Any]:
    made = dict(message)
    if made["role"] == "developer" and "developer" not in source:
        made["role"] = "system"
    return made


def _spelled_out(message: dict[str, Any], knows_results: bool) -> dict[str, Any]:
    """A message whose calls and results stand in its content."""
    calls = message.pop("tool_calls", None)
    if calls:
        texts = [_call_text(call["function"]) for call in calls]
        said = content_of(message)
        message["content"] = "\n".join([said, *texts] if said else texts)
    if message["role"] == "tool" and not knows_results:
        before, after = "<tool_response>\n", "\n</tool_response>"
        if isinstance(message["content"], list):  # with images
            parts = [_text_part(before), *message["content"], _text_part(after)]
            return {"role": "user", "content": parts}
        return {"role": "user", "content": f"{before}{content_of(message)}{after}"}
    if message.get("content") is None:
        message["content"] = ""
    return message


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or "{}"
    body = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {body}}}\n</tool_call>'


def _told_of(
    messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _TOLD.format(tools=lines)
    if messages and messages[0]["role"] == "system":
        first, rest = messages[0], messages[1:]
        return [{**first, "content": f"{content_of(first)}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]
