"""Messages of a conversation, checked once: what `Chat.add` takes and templates are given.

IS: copies of messages as mappings of plain values; arguments of tool calls as objects, for
templates. IS NOT: what a role means, or a rule on their order: templates know that.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence

from flashrt.base.messages import shown
from flashrt.text.template import ChatError, Message

Pair = tuple[str, str]  # (role, content)


def checked_messages(messages: Iterable[Message | Pair]) -> tuple[Message, ...]:
    """Copies of messages; a pair of role and content is one too. Raises ChatError."""
    return tuple(
        checked_message({"role": m[0], "content": m[1]} if isinstance(m, tuple) else m, f"[{i}]")
        for i, m in enumerate(messages)
    )


def checked_message(message: Message, at: str = "") -> Message:
    """A copy of a message. Raises ChatError for what is none; `at` is its place, for the error.

    Arguments of tool calls may be objects, or JSON text of one as servers hand them on.
    """
    if not isinstance(message, Mapping):
        raise ChatError(f"message{at}: expected a mapping, got {shown(message)}")
    made = copy.deepcopy(dict(message))
    role, content = made.get("role"), made.get("content")
    if not isinstance(role, str) or not role:
        raise ChatError(f"message{at}: role is {shown(role)}; give a text such as 'user'")
    is_list = isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content)
    if not (content is None or isinstance(content, str) or is_list):
        raise ChatError(
            f"message{at}: content is {shown(content)}; give a text, a list of parts, or None"
        )
    if not isinstance(made.get("reasoning_content", ""), str | None):
        raise ChatError(f"message{at}: reasoning_content is no text")
    if made.get("tool_calls") is not None:
        made["tool_calls"] = _checked_calls(made["tool_calls"], f"message{at}: tool_calls")
    return made


def with_objects(message: Message) -> Message:
    """A checked message whose calls have objects for arguments: templates go over their names."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or not calls:
        return message
    made = copy.deepcopy(list(calls))
    for call in made:
        holder = call.get("function", call)
        if isinstance(arguments := holder.get("arguments"), str):
            holder["arguments"] = json.loads(arguments or "{}")
    return {**message, "tool_calls": made}


def content_of(message: Message) -> str:
    """A message's content as one text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def _checked_calls(calls: object, at: str) -> list[object]:
    if not isinstance(calls, Sequence) or not all(isinstance(call, dict) for call in calls):
        raise ChatError(f"{at} is {shown(calls)}; give a list of objects")
    for i, call in enumerate(calls):
        holder = call.get("function", call)
        if not isinstance(holder, dict) or not isinstance(holder.get("name"), str):
            raise ChatError(f"{at}[{i}] has no name of a function")
        if isinstance(arguments := holder.get("arguments"), str):
            _check_arguments(arguments, f"{at}[{i}]: arguments")
    return list(calls)


def _check_arguments(text: str, at: str) -> None:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{at} are no JSON: {error}; the text is {shown(text)}") from error
    if not isinstance(found, dict):
        raise ChatError(f"{at} are {shown(found)}; a JSON object is expected")
