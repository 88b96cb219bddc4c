"""Answers of a given shape: JSON that a schema describes, calls of tools that must come.

IS: a request's wish as a grammar, compiled before the request is taken, so that one which cannot be
enforced is refused. IS NOT: grammars themselves (text.grammar), or the syntax of calls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashrt.base.errors import GrammarError
from flashrt.serve.body import Fields
from flashrt.serve.refusal import bad
from flashrt.serve.served import Served
from flashrt.text.grammar import Grammar
from flashrt.text.tool_calls import ToolSyntax
from flashrt.text.tool_grammar import thought_rule, tool_call_grammar


@dataclass(frozen=True, slots=True)
class Shape:
    """JSON that `schema` describes. `param`: the field that asked for it."""

    schema: Mapping[str, Any]
    param: str


def shape_of(fields: Fields | None, schema_in: str) -> Shape | None:
    """The shape that a field asks for: {"type": "text" | "json_object" | "json_schema"}; the schema
    is in the object `schema_in`, or beside `type` where that is empty.
    """
    if fields is None:
        return None
    kind = fields.needed_text("type", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        return Shape({"type": "object"}, fields.at)
    holder = fields
    if schema_in:
        found = fields.object(schema_in)
        if found is None:
            raise fields.refuse(schema_in, "an object with name and schema")
        holder = found
    schema = holder.get("schema")
    if not isinstance(schema, dict):
        raise holder.refuse("schema", "a JSON schema")
    return Shape(schema, holder.path("schema"))


def grammar_of(served: Served, shape: Shape, *, in_thought: bool) -> Grammar:
    """The grammar of an answer of a shape; a thought that the prompt opened ends first."""
    try:
        if in_thought:
            rule = thought_rule("thought", _tokens_of(served))
            made = Grammar.lark(
                f'start: thought "\\n\\n" answer\n{rule}\nanswer: %json '
                f"{json.dumps(_compact(shape.schema))}\n"
            )
        else:
            made = Grammar.json_schema(shape.schema, compact=True)
        served.engine.grammars.compile(made)
    except GrammarError as error:
        raise bad(shape.param, str(error), "unsupported_schema") from error
    return made


def tool_grammar(
    served: Served,
    tools: Sequence[Mapping[str, Any]],
    name: str | None,
    syntax: ToolSyntax,
    *,
    in_thought: bool,
) -> Grammar:
    """The grammar of a reply that calls a tool: any, or the one of a name."""
    choice: Any = "required" if name is None else {"type": "function", "function": {"name": name}}
    try:
        text = tool_call_grammar(
            tools, choice, syntax, in_thought=in_thought, tokens=_tokens_of(served)
        )
        made = Grammar.lark(text)
        served.engine.grammars.compile(made)
    except GrammarError as error:
        raise bad("tools", str(error), "unsupported_schema") from error
    return made


def _tokens_of(served: Served) -> frozenset[str]:
    return frozenset(token.spelling for token in served.tokenizer.added_tokens)


def _compact(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without white space, which a small model may never end."""
    return {**schema, "x-guidance": {"whitespace_flexible": False}}
