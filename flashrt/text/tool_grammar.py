"""What a model may write when it has to call a tool: a grammar, or the beginning of the call.

IS: tools and a choice among them -> Lark text as the llguidance package reads it, arguments held to
their JSON schemas. IS NOT: the engine of a grammar: this is text, and imports nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flashrt.base.messages import listed, shown
from flashrt.text import thought
from flashrt.text.template import ChatError
from flashrt.text.tool_calls import CLOSE, OPEN, Tool, Tools, ToolSyntax, json_types

# Spaces in JSON, as models are shown it: with more freedom a small one may never end.
SPACES = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
_COMBINING = {"$ref", "allOf", "anyOf", "oneOf", "if"}  # words that add to the properties
NONE, AUTO, REQUIRED = "none", "auto", "required"
ToolChoice = str | Mapping[str, object]


def chosen_tools(tools: Tools, choice: ToolChoice | None) -> list[str] | None:
    """Names of the functions of which one has to be called; None if none has to.

    choice: "none", "auto" or None, "required", or a function: {"type": "function", "function":
    {"name": ...}}. Raises ChatError for what is none of these, and for a function that is not
    there.
    """
    if choice is None or choice in (NONE, AUTO):
        return None
    if choice == REQUIRED:
        if not tools.names:
            raise ChatError("tool_choice 'required': the conversation has no tools")
        return tools.names
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ChatError(
            f"tool_choice is {shown(choice)}; give 'none', 'auto', 'required' or "
            '{"type": "function", "function": {"name": ...}}'
        )
    if name not in tools.names:
        raise ChatError(f"tool_choice: there is no tool {name!r}; there is {listed(tools.names)}")
    return [name]


def call_prefix(name: str, syntax: ToolSyntax) -> str:
    """What a call of a function begins with, up to its arguments."""
    if syntax is ToolSyntax.QWEN:
        return f"{OPEN}\n<function={name}>\n"
    return f'{OPEN}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def tool_call_grammar(
    tools: Sequence[Tool],
    choice: ToolChoice,
    syntax: ToolSyntax,
    *,
    in_thought: bool = False,
    tokens: Collection[str] = (),
) -> str:
    """Lark text of a reply in which the choice holds: "required" is one call or more, a function is
    one call of it. Arguments come in the order of the schema, and each holds to it.

    in_thought: the prompt ends within a thought; it goes on and closes first. tokens: spellings
    that are tokens of their own (`Tokenizer.added_tokens`): a grammar has to name those, as text it
    would never let them come. Raises ChatError for a choice that calls nothing, or one that is not
    there.
    """
    known = Tools(tools)
    names = chosen_tools(known, choice)
    if names is None:
        raise ChatError(f"tool_choice {shown(choice)} needs no grammar")
    rules = list[str]()
    for i, name in enumerate(names):
        make = _xml_call if syntax is ToolSyntax.QWEN else _json_call
        rules += make(f"f{i}", name, known.schema(name), tokens)
    one = " | ".join(f"f{i}" for i in range(len(names)))
    calls = "call" if choice != REQUIRED else r'call ("\n" call)*'
    first = [f"call: {_literal(OPEN + chr(10), tokens)} ({one})"]
    if in_thought:
        calls = rf'thought "\n\n" {calls}'
        first.append(thought_rule("thought", tokens))
    return "\n".join([f"start: {calls}", *first, *rules]) + "\n"


def thought_rule(rule: str, tokens: Collection[str]) -> str:
    """Lark of what is left of a thought, its end included."""
    if thought.CLOSE in tokens:
        return f"{rule}: /(?s:.*)/ {thought.CLOSE}"
    return f"{rule}[suffix={_literal(thought.CLOSE)}]: /(?s:.*)/"


def _json_call(
    rule: str, name: str, schema: Mapping[str, object], tokens: Collection[str]
) -> list[str]:
    begins = call_prefix(name, ToolSyntax.HERMES).removeprefix(f"{OPEN}\n")
    # A function has the parameters that it names: as in XML, none is made up beside them.
    is_closed = "properties" in schema and not _COMBINING & schema.keys()
    closed = {"additionalProperties": False} if is_closed else {}
    wanted = {"type": "object", **closed, **schema, "x-guidance": SPACES}
    return [
        f"{rule}: {_literal(begins)} {rule}_a {_literal('}' + chr(10) + CLOSE, tokens)}",
        f"{rule}_a: %json {json.dumps(wanted)}",
    ]


def _xml_call(
    rule: str, name: str, schema: Mapping[str, object], tokens: Collection[str]
) -> list[str]:
    begins = call_prefix(name, ToolSyntax.QWEN).removeprefix(f"{OPEN}\n")
    ends = _literal(f"</function>\n{CLOSE}", tokens)
    properties, required = schema.get("properties"), schema.get("required")
    needed = required if isinstance(required, Sequence) else ()
    parts, rules = list[str](), list[str]()
    if isinstance(properties, Mapping):
        for i, (parameter, inner) in enumerate(properties.items()):
            made = f"{rule}_{i}"
            parts.append(made if parameter in needed else f"{made}?")
            rules += _parameter(made, str(parameter), inner, schema)
    else:
        parts.append(f"{rule}_any*")
        rules += [
            rf'{rule}_any: "<parameter=" /[^<>\n]+/ ">\n" {rule}_text',
            _text_rule(f"{rule}_text"),
        ]
    return [f"{rule}: {' '.join([_literal(begins), *parts, ends])}", *rules]


def _parameter(rule: str, name: str, schema: Any, root: Mapping[str, object]) -> list[str]:
    begins, ends = _literal(f"<parameter={name}>\n"), _literal("\n</parameter>\n")
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    types = json_types(schema, root)
    if isinstance(choices, Sequence) and choices and all(isinstance(c, str) for c in choices):
        either = " | ".join(_literal(str(c)) for c in choices)
        return [f"{rule}: {begins} ({either}) {ends}"]
    if not types or "string" in types:  # a string needs no quotes here, so anything is one
        return [f"{rule}: {begins} {rule}_text", _text_rule(f"{rule}_text")]
    shared = {word: root[word] for word in ("$defs", "definitions") if word in root}
    return [
        f"{rule}: {begins} {rule}_json {ends}",
        f"{rule}_json: %json {json.dumps({**schema, **shared})}",
    ]


def _text_rule(rule: str) -> str:
    """Any text up to the end of a parameter."""
    return rf"{rule}[suffix={_literal(chr(10) + '</parameter>' + chr(10))}]: /(?s:.*)/"


def _literal(text: str, tokens: Collection[str] = ()) -> str:
    """A string of Lark's: its escapes are JSON's. The marks of a call that are tokens are named."""
    for mark in (OPEN, CLOSE):
        before, found, after = text.partition(mark)
        if found and mark in tokens:
            parts = [_literal(before) if before else "", mark, _literal(after) if after else ""]
            return " ".join(filter(None, parts))
    return json.dumps(text, ensure_ascii=False)
