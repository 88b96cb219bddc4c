"""Calls of tools in replies: read from any pieces, converted by schemas, and held to a grammar."""

from __future__ import annotations

import json
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from flashrt.text.reply import ReplyEvent, ReplyParser, joined
from flashrt.text.template import ChatError
from flashrt.text.tool_calls import Tools, ToolSyntax, tool_syntax
from flashrt.text.tool_grammar import call_prefix, chosen_tools, tool_call_grammar

LOOK = {
    "type": "object",
    "properties": {
        "place": {"type": "string"},
        "depth": {"type": "integer"},
        "deep": {"type": ["boolean", "null"]},
        "path": {"type": "array", "items": {"type": "string"}},
        "how": {"$ref": "#/$defs/how"},
    },
    "required": ["place", "depth"],
    "$defs": {"how": {"type": "object"}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look", "parameters": LOOK}},
    {"name": "stop"},
]


def parsed(
    pieces: list[str], syntax: ToolSyntax | None, in_thought: bool = False
) -> tuple[list[ReplyEvent], ReplyParser]:
    """All events, joined; ids are numbers."""
    number = count()
    parser = ReplyParser(
        in_thought=in_thought, syntax=syntax, tools=Tools(TOOLS), new_id=lambda: str(next(number))
    )
    events: list[ReplyEvent] = []
    for piece in pieces:
        events += parser.push(piece)
    return joined([*events, *parser.flush()]), parser


def xml(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={n}>\n{v}\n</parameter>\n" for n, v in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def hermes(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def calls_of(text: str, syntax: ToolSyntax) -> list[tuple[str, object]]:
    calls = parsed([text], syntax)[1].calls
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


def test_values_become_what_the_schema_says() -> None:
    """Red when all values are strings, or all that look like JSON are parsed."""
    text = "I look.\n\n" + xml(
        "look", place="12", depth="3", deep="True", path='["a", "b"]', how='{"x": 1}', more="[1]"
    )
    _, parser = parsed([f"hm</think>\n\n{text}"], ToolSyntax.QWEN, in_thought=True)
    assert (parser.thought, parser.content) == ("hm", "I look.")
    found = json.loads(parser.calls[0]["function"]["arguments"])
    assert found == {
        "place": "12", "depth": 3, "deep": True, "path": ["a", "b"], "how": {"x": 1}, "more": "[1]",
    }  # fmt: skip
    message = parser.message()
    assert message is not None and message["tool_calls"][0]["id"] == "0"
    assert calls_of(xml("look", deep="null", depth="deep", path="{}"), ToolSyntax.QWEN) == [
        ("look", {"deep": None, "depth": "deep", "path": "{}"})
    ]


def test_values_of_many_lines_that_quote_tags_stay_whole() -> None:
    """Red when the first closing tag ends a value, or when newlines of the value are trimmed."""
    value = "\n<parameter=x>\n1\n</parameter>\n  and </function> \"'\\\n\n"
    assert calls_of(xml("look", place=value, depth="1"), ToolSyntax.QWEN) == [
        ("look", {"place": value, "depth": 1})
    ]
    quoted = {"place": 'say "</tool_call>" {["'}
    assert calls_of(hermes("look", quoted), ToolSyntax.HERMES) == [("look", quoted)]


def test_several_calls_and_calls_without_arguments() -> None:
    text = xml("stop") + "\n" + xml("look", place="a") + "\n" + xml("never_heard_of", a="1")
    assert calls_of(text, ToolSyntax.QWEN) == [
        ("stop", {}), ("look", {"place": "a"}), ("never_heard_of", {"a": "1"}),
    ]  # fmt: skip
    other = '<tool_call>{"arguments": {"place": "a"}, "name": "look"}</tool_call>'
    inside = '<tool_call>{"name": "look", "arguments": "{\\"a\\": 1}"}</tool_call>'
    assert calls_of(hermes("stop", {}) + other + inside, ToolSyntax.HERMES) == [
        ("stop", {}), ("look", {"place": "a"}), ("look", {"a": 1}),
    ]  # fmt: skip


BROKEN = {
    ToolSyntax.QWEN: [
        "<tool_call>\nlook", "<tool_call>\n<function=look>\n<parameter=place>\ncel",
        "<tool_call>\n<function=look>\nwhat\n</function>\n</tool_call> so", "a <tool_ca",
        "<tool_call>\n<function=lo", "<tool_call>\n<function=look>\n</function>\nx</tool_call>",
    ],
    ToolSyntax.HERMES: [
        '<tool_call>\n{"name": "look", "arguments": {"a": }}\n</tool_call> so',
        '<tool_call>\n{"name": "look", "arguments": {"a": "b', "<tool_call>look</tool_call>",
        '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": "look", "arguments": {}} x',
        '<tool_call>[{"name": "look"}]</tool_call>',
    ],
}  # fmt: skip


@pytest.mark.parametrize(("syntax", "text"), [(s, t) for s, ts in BROKEN.items() for t in ts])
def test_what_is_no_call_is_the_text_that_it_was(syntax: ToolSyntax, text: str) -> None:
    """Red when anything is lost, or a broken call is taken for one."""
    events, parser = parsed([f"so: {text}"], syntax)
    assert (parser.content, parser.calls) == (f"so: {text}", [])
    begun = [e for e in events if type(e).__name__ == "CallBegun"]
    ended = [e.is_whole for e in events if hasattr(e, "is_whole")]
    assert ended == [False] * len(begun)


@pytest.mark.parametrize("syntax", ToolSyntax)
def test_a_call_that_lacks_only_its_end_is_whole(syntax: ToolSyntax) -> None:
    text = xml("stop") if syntax is ToolSyntax.QWEN else hermes("stop", {})
    assert calls_of(text.removesuffix("\n</tool_call>"), syntax) == [("stop", {})]


PARTS = [
    "<tool_call>", "</tool_call>", "\n", " ", "<function=look>", "<function=", "</function>",
    "<parameter=place>", "<parameter=depth>", "</parameter>", "3", "é", "</think>", "<think>", "{",
    '{"name": "look", "arguments": {"a": ', '"b"', "}", "]", "\\", '"', "<", "word",
    xml("look", place="a\nb", depth="7"), hermes("look", {"a": [1, "}"]}),
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), max_size=14).map("".join),
    st.sampled_from(list(ToolSyntax)),
    st.booleans(),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_the_cut_of_a_reply_changes_nothing(
    text: str, syntax: ToolSyntax, in_thought: bool, cuts: list[int]
) -> None:
    """Red when what is decided depends on how much text is held; joined events are the message."""
    whole, parser = parsed([text], syntax, in_thought)
    assert parsed(list(text), syntax, in_thought)[0] == whole
    ends = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(ends)]
    assert parsed(pieces, syntax, in_thought)[0] == whole
    for kind, said in (("TextDelta", parser.content), ("ThoughtDelta", parser.thought)):
        deltas = [e.text for e in whole if type(e).__name__ == kind and hasattr(e, "text")]
        assert "".join(deltas) == said
    for call in parser.calls:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_the_syntax_is_what_the_template_shows() -> None:
    qwen = "'<tool_call>\\n<function=example>\\n<parameter=p>\\nv'"
    json_syntax = '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args>}'
    other = "<tool_call>{name}<arg_key>{key}</arg_key>"
    assert [tool_syntax(s) for s in (qwen, json_syntax, other, '{"arguments": 1}')] == [
        ToolSyntax.QWEN, ToolSyntax.HERMES, None, None,
    ]  # fmt: skip


# -- choices and grammars -------------------------------------------------------------------------

LOOK_CALL = {"function": {"name": "look"}}
GOOD = {
    ToolSyntax.QWEN: xml("look", place="a </parameter> b\nc", depth="-3", path='["a"]'),
    ToolSyntax.HERMES: hermes("look", {"place": "a", "depth": -3}),
}
BAD = {
    ToolSyntax.QWEN: [
        xml("look", place="a"), xml("look", place="a", depth="x"), xml("other"), "I look.",
        xml("look", place="a", depth="1", mood="b"),
    ],
    ToolSyntax.HERMES: [
        hermes("look", {"place": "a"}), hermes("look", {"place": 1, "depth": 1}), "I look.",
        hermes("other", {}), hermes("look", {"place": "a", "depth": 1, "mood": "b"}),
    ],
}  # fmt: skip


def accepts(grammar: str, text: str) -> bool:
    """Whether a text is a whole reply by the grammar, byte by byte."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar))
    assert not matcher.get_error(), matcher.get_error()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize("syntax", ToolSyntax)
def test_a_grammar_holds_a_reply_to_the_choice(syntax: ToolSyntax) -> None:
    """Red when a schema is not kept, when another function passes, or when a thought does not."""
    named = tool_call_grammar(TOOLS, LOOK_CALL, syntax)
    required = tool_call_grammar(TOOLS, "required", syntax)
    stop = xml("stop") if syntax is ToolSyntax.QWEN else hermes("stop", {})
    good = GOOD[syntax]
    assert accepts(named, good) and accepts(required, good)
    assert not accepts(named, f"{good}\n{good}") and accepts(required, f"{stop}\n{good}")
    assert not accepts(named, stop) and accepts(required, stop)
    for bad in BAD[syntax]:
        assert not accepts(required, bad), bad
    thinking = tool_call_grammar(TOOLS, LOOK_CALL, syntax, in_thought=True)
    assert accepts(thinking, f"so\n</think>\n\n{good}") and not accepts(thinking, good)
    assert calls_of(good, syntax)[0][0] == "look"
    assert good.startswith(call_prefix("look", syntax))


def test_a_choice_that_is_not_there_is_refused() -> None:
    tools = Tools(TOOLS)
    assert chosen_tools(tools, "required") == ["look", "stop"]
    assert chosen_tools(tools, LOOK_CALL) == ["look"]
    assert chosen_tools(tools, "auto") is chosen_tools(tools, None) is None
    for choice, why in (("sometimes", "'none', 'auto'"), ({"name": "x"}, "there is no tool 'x'")):
        with pytest.raises(ChatError, match=why):
            chosen_tools(tools, choice)
    with pytest.raises(ChatError, match="no tools"):
        chosen_tools(Tools([]), "required")
    with pytest.raises(ChatError, match=r"tools\[0\]"):
        Tools([{"type": "function"}])
