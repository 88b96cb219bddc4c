"""Calls of tools, as models write them, read while the text comes.

IS: two syntaxes (XML of Qwen3.5, JSON of Hermes), which of them a chat template asks for, and a
reader of one call for each. IS NOT: the text around calls (reply), or what a call does.

A reader is given text from after `<tool_call>` on, cut anywhere; what it finds does not depend on
the cuts. What is no call is `broken`: the reader says how much of the text it took, so that whoever
asked can hand it on as text. Nothing raises for what a model wrote.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import StrEnum

from flashrt.base.messages import shown
from flashrt.text.template import ChatError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Tool = Mapping[str, object]  # a function's JSON schema, alone or as {"type", "function"}


class ToolSyntax(StrEnum):
    """How a model writes calls, always between `<tool_call>` and `</tool_call>`."""

    QWEN = "qwen"  # <function=NAME> <parameter=P> value </parameter> </function>
    HERMES = "hermes"  # {"name": ..., "arguments": {...}}


def tool_syntax(template_source: str) -> ToolSyntax | None:
    """The syntax that a chat template shows to the model; None for one that is not known here."""
    if OPEN not in template_source:
        return None
    if "<function=" in template_source and "<parameter=" in template_source:
        return ToolSyntax.QWEN
    return ToolSyntax.HERMES if re.search(r'\\?"arguments\\?"\s*:', template_source) else None


class Tools:
    """The tools of a conversation: names, and schemas of parameters.

    Raises ChatError for what is no tool.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.given = tuple(tools)  # as they came
        self._schemas: dict[str, Mapping[str, object]] = {}
        for i, tool in enumerate(tools):
            function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
            name = function.get("name") if isinstance(function, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
                raise ChatError(
                    f"tools[{i}] is {shown(tool)}; give a function's schema with a name, or "
                    '{"type": "function", "function": {...}}'
                )
            schema = function.get("parameters")
            if schema is not None and not isinstance(schema, Mapping):
                raise ChatError(f"tools[{i}] ({name}): parameters are {shown(schema)}, no schema")
            self._schemas[name] = {} if schema is None else schema

    @property
    def names(self) -> list[str]:
        """Of the functions, in order."""
        return list(self._schemas)

    def schema(self, name: str) -> Mapping[str, object]:
        """JSON schema of a function's parameters; empty where nothing is said."""
        return self._schemas.get(name, {})

    def parameter(self, name: str, parameter: str) -> Mapping[str, object]:
        """JSON schema of one parameter; empty where nothing is said."""
        properties = self.schema(name).get("properties")
        found = properties.get(parameter) if isinstance(properties, Mapping) else None
        return found if isinstance(found, Mapping) else {}


def json_types(schema: object, root: Mapping[str, object], depth: int = 0) -> frozenset[str]:
    """Names of the JSON types that a schema allows, as far as it says; `root`: for its $refs."""
    if not isinstance(schema, Mapping) or depth > 8:
        return frozenset()
    found: set[str] = set()
    kind = schema.get("type")
    named = [kind] if isinstance(kind, str) else kind
    if isinstance(named, Sequence):
        found.update(name for name in named if isinstance(name, str))
    if isinstance(reference := schema.get("$ref"), str):
        found |= json_types(_referred(reference, root), root, depth + 1)
    for word in ("anyOf", "oneOf", "allOf"):
        inner = schema.get(word)
        for one in inner if isinstance(inner, Sequence) else ():
            found |= json_types(one, root, depth + 1)
    return frozenset(found)


def _referred(reference: str, root: Mapping[str, object]) -> object:
    """What `#/$defs/NAME` stands for; None if it is not there."""
    at: object = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        at = at.get(name) if isinstance(at, Mapping) else None
    return at


def json_of(text: str, types: frozenset[str]) -> str:
    """The JSON text of a value that was written as text: parsed if a schema's `types` allow what
    it is, else a string.
    """
    value = text.strip()
    if wanted := types - {"string"}:
        words = {"True": "true", "False": "false", "None": "null"}  # as templates print them
        value = words.get(value, value)
        try:
            found = json.loads(value, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            found = text
        if _type_of(found) & wanted:
            return value
    return json.dumps(text, ensure_ascii=False)


def _no_constant(word: str) -> object:
    raise ValueError(f"{word} is no JSON")


def _type_of(value: object) -> frozenset[str]:
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int):
        return frozenset({"integer", "number"})
    if isinstance(value, float):
        return frozenset({"number", "integer"} if value.is_integer() else {"number"})
    kinds = {dict: "object", list: "array", type(None): "null"}
    return frozenset({kinds[type(value)]} if type(value) in kinds else ())


class CallReader(ABC):
    """One call. `name` is known once it has begun; `taken` is the text that was read of it."""

    def __init__(self, tools: Tools) -> None:
        self.name: str | None = None
        self.is_whole = self.is_broken = False
        self.taken = ""
        self._tools, self._held = tools, ""

    @property
    def is_over(self) -> bool:
        """Whether it ended, one way or the other."""
        return self.is_whole or self.is_broken

    @property
    def rest(self) -> str:
        """Text after its end."""
        return self._held

    def push(self, text: str) -> str:
        """Take text; the arguments that have become certain, as a piece of their JSON text."""
        self._held += text
        pieces = []
        while not self.is_over and (piece := self._step()) is not None:
            pieces.append(piece)
        return "".join(pieces)

    @abstractmethod
    def flush(self) -> None:
        """The text has ended: the call is whole or broken now."""

    @abstractmethod
    def _step(self) -> str | None:
        """Read one part; None if more text is needed."""

    def _take(self, count: int) -> str:
        part, self._held = self._held[:count], self._held[count:]
        self.taken += part
        return part

    def _break(self) -> None:
        self.is_broken = True


# -- XML ------------------------------------------------------------------------------------------

_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>(?:\n|(?=[^\n]))")
_FUNCTION_END = re.compile(r"\s*</function>")
_CALL_END = re.compile(r"\s*</tool_call>")
# A value ends where what follows can follow: a value may quote the tags.
_VALUE_END = re.compile(
    r"\n?</parameter>(?=\s*(?:<parameter=|</function>|</tool_call>))"
    r"|\n?(?=</function>\s*</tool_call>)"
)


def _beginnings(word: str) -> str:
    """A pattern of all that a word begins with, nothing and itself included."""
    made = ""
    for character in reversed(word):
        made = f"(?:{re.escape(character)}{made})?"
    return made


_NEXT = "|".join(map(_beginnings, ("<parameter=", "</function>", "</tool_call>")))
_VALUE_MAY_END = re.compile(
    rf"\n?(?:</parameter>\s*(?:{_NEXT})|</function>\s*{_beginnings(CLOSE)}"
    rf"|{_beginnings('</parameter>')}|{_beginnings('</function>')})\Z"
)
_FUNCTION_MAY_COME = re.compile(rf"\s*(?:{_beginnings('<function=')}|<function=[^<>\n]+)\Z")
_PART_MAY_COME = re.compile(rf"\s*(?:{_NEXT}|<parameter=[^<>\n]+>?)\Z")
_END_MAY_COME = re.compile(rf"\s*{_beginnings(CLOSE)}\Z")


class XmlCall(CallReader):
    """`<function=NAME>`, then `<parameter=P>`, value and `</parameter>` for each argument.

    A value loses one newline at either end. Its schema's type decides what it becomes; one that is
    a string anyway is handed on as it comes.
    """

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._read = self._read_head
        self._count = 0  # parameters so far
        self._types: frozenset[str] = frozenset()  # of the value at hand
        self._value: list[str] = []

    def flush(self) -> None:
        at_end = self._read == self._read_tail and _END_MAY_COME.fullmatch(self._held)
        self._take(len(self._held))
        self.is_whole, self.is_broken = bool(at_end), not at_end

    def _step(self) -> str | None:
        return self._read()

    def _read_head(self) -> str | None:
        if found := _FUNCTION.match(self._held):
            self._take(found.end())
            self.name = found[1].strip()
            self._read = self._read_part
            return ""
        return self._wait(_FUNCTION_MAY_COME)

    def _read_part(self) -> str | None:
        if found := _PARAMETER.match(self._held):
            self._take(found.end())
            name = found[1].strip()
            root = self._tools.schema(self.name or "")
            self._types = json_types(self._tools.parameter(self.name or "", name), root)
            self._read = self._read_value
            self._count += 1
            quote = "" if self._is_held else '"'
            lead = ", " if self._count > 1 else "{"
            return f"{lead}{json.dumps(name, ensure_ascii=False)}: {quote}"
        if found := _FUNCTION_END.match(self._held):
            self._take(found.end())
            self._read = self._read_tail
            return "}" if self._count else "{}"
        if _CALL_END.match(self._held):
            self._read = self._read_tail
            return "}" if self._count else "{}"
        return self._wait(_PART_MAY_COME)

    def _read_value(self) -> str | None:
        found = _VALUE_END.search(self._held)
        may_end = found or _VALUE_MAY_END.search(self._held)
        end = may_end.start() if may_end else len(self._held)
        piece = self._take(end)
        if found:
            self._take(found.end() - found.start())
            self._read = self._read_part
        elif not piece:
            return None
        if not self._is_held:
            return json.dumps(piece, ensure_ascii=False)[1:-1] + ('"' if found else "")
        self._value.append(piece)
        if not found:
            return ""
        value, self._value = "".join(self._value), []
        return json_of(value, self._types)

    def _read_tail(self) -> str | None:
        if found := _CALL_END.match(self._held):
            self._take(found.end())
            self.is_whole = True
            return ""
        return self._wait(_END_MAY_COME)

    @property
    def _is_held(self) -> bool:
        """Whether the value must be seen whole before it is known what it is."""
        return bool(self._types - {"string"})

    def _wait(self, may_come: re.Pattern[str]) -> str | None:
        if not may_come.fullmatch(self._held):
            self._break()
        return None


# -- JSON -----------------------------------------------------------------------------------------

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([^"\\<]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?={)'
)


class JsonCall(CallReader):
    """`{"name": ..., "arguments": {...}}`: in this order, arguments are handed on as they come;
    else the object is read when it is whole.
    """

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self._read = self._read_head
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self._arguments: list[str] = []

    def flush(self) -> None:
        body = self.taken + self._take(len(self._held))
        self.is_whole = self.name is not None and _object(body) is not None
        self.is_broken = not self.is_whole

    def _step(self) -> str | None:
        return self._read()

    def _read_head(self) -> str | None:
        begins = self._held.lstrip()
        if begins and not begins.startswith("{"):
            self._break()
        elif found := _HEAD.match(self._held):
            self._take(found.end())
            self.name = found[1]
            self._read = self._read_arguments
            return ""
        elif (end := self._held.find(CLOSE)) >= 0:
            return self._read_whole(end)
        return None

    def _read_whole(self, end: int) -> str:
        body = _object(self._take(end))
        self._take(len(CLOSE))
        name = None if body is None else body.get("name")
        if body is None or not isinstance(name, str) or not name:
            self._break()
            return ""
        given = body.get("arguments", body.get("parameters", {}))
        if isinstance(given, str) and _object(given) is not None:
            arguments = given
        elif isinstance(given, dict):
            arguments = json.dumps(given, ensure_ascii=False)
        else:
            self._break()
            return ""
        self.name, self.is_whole = name, True
        return arguments

    def _read_arguments(self) -> str | None:
        if not self._held:
            return None
        end = next((i + 1 for i, c in enumerate(self._held) if self._closes(c)), len(self._held))
        piece = self._take(end)
        self._arguments.append(piece)
        if not self._depth:
            if _object("".join(self._arguments)) is None:
                self._break()
            self._read = self._read_tail
        return piece

    def _closes(self, character: str) -> bool:
        """Take a character of the arguments; whether it is their last."""
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return self._depth == 0

    def _read_tail(self) -> str | None:
        end = self._held.find(CLOSE)
        if end < 0:
            return None
        body = self.taken + self._take(end)
        self._take(len(CLOSE))
        self.is_whole = _object(body) is not None
        self.is_broken = not self.is_whole
        return ""


def _object(text: str) -> dict[str, object] | None:
    """The JSON object that a text is, or None."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


READERS: Mapping[ToolSyntax, type[CallReader]] = {
    ToolSyntax.QWEN: XmlCall,
    ToolSyntax.HERMES: JsonCall,
}
