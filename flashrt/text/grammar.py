"""Grammars: which texts a reply may be.

IS: a value that says it, by JSON Schema, a regular expression or a Lark grammar, for any model; it
is passed to `Session.generate`. IS NOT: the tokens that it allows (constraint), nor a parser: the
syntax of each kind is that of llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from flashrt.base.checks import as_integer
from flashrt.base.errors import GrammarError
from flashrt.base.messages import shown

Kind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text may be. Made by `json_schema`, `json_object`, `regex` or `lark`; checked when it
    is first used, as that takes a tokenizer.
    """

    kind: Kind
    text: str
    is_compact: bool = False  # JSON without white space
    begun: tuple[int, ...] = ()  # tokens that are there already

    @classmethod
    def json_schema(cls, schema: Mapping[str, object] | str, *, compact: bool = False) -> Grammar:
        """JSON that a schema describes: an object, or its text. Properties come in the order in
        which the schema has them; a keyword that cannot be enforced is refused, not passed over.
        compact: no white space between values. Raises GrammarError for what is no JSON.
        """
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the schema is no JSON: {error}") from error
        if not isinstance(value, Mapping):
            raise GrammarError(f"the schema is {shown(value)}; an object is expected")
        return cls("json_schema", text, compact)

    @classmethod
    def json_object(cls, *, compact: bool = False) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, compact=compact)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Texts that a regular expression matches as a whole, in the syntax of Rust's."""
        return cls("regex", _text(pattern, "regex"))

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """Texts of a context-free grammar, in llguidance's variant of Lark; its rule is `start`."""
        return cls("lark", _text(grammar, "lark"))

    def after(self, tokens: Iterable[int]) -> Grammar:
        """The same, for a text that began with these tokens: to go on in its midst after a restore,
        a fork or a rollback. Raises GrammarError for what are no token ids; tokens that the grammar
        does not allow are noticed when it is used.
        """
        ids = []
        for token in tokens:
            known = as_integer(token)
            if known is None or known < 0:
                raise GrammarError(f"after: {shown(token)} is no token id")
            ids.append(known)
        return replace(self, begun=(*self.begun, *ids))


def grammar_of(fields: object) -> Grammar:
    """A grammar from what `dataclasses.asdict` made of it, perhaps by way of JSON.

    Raises GrammarError for anything else.
    """
    if isinstance(fields, Mapping) and set(fields) == set(Grammar.__slots__):
        kind, text, compact, begun = (fields[name] for name in Grammar.__slots__)
        is_known = kind in get_args(Kind) and isinstance(text, str) and isinstance(compact, bool)
        if is_known and isinstance(begun, list | tuple):
            return Grammar(kind, text, compact).after(begun)
    raise GrammarError(f"{shown(fields)} is no grammar")


def _text(given: object, kind: str) -> str:
    if not isinstance(given, str):
        raise GrammarError(f"{kind}: {shown(given)} is no text")
    return given
