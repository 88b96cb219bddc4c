"""Chat messages -> prompt text, by the Jinja template that comes with a checkpoint.

IS: a renderer in a sandbox, since templates are downloaded code, with what templates written for
transformers expect: its `tojson`, `raise_exception`, `strftime_now` and `{% generation %}`. IS NOT:
a tokenizer, or what keeps contents apart from the template's own text (prompt).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrt.base.errors import CheckpointError, FlashrtError
from flashrt.base.files import read_file
from flashrt.text.config import (
    MOST_NBYTES,
    TOKENIZER_CONFIG_FILE,
    special_tokens,
    tokenizer_config,
)

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import Node
    from jinja2.parser import Parser

TEMPLATE_FILE = "chat_template.jinja"
OWN_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})
# Characters that no text holds: Unicode keeps them for use within a program. `tojson` leaves them
# as they are, so that `prompt` finds in a rendered text what it put into the messages.
NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_NOT_ASCII = re.compile("[^\x00-\x7f\ufdd0-\ufdef]")

Message = Mapping[str, object]


class ChatError(FlashrtError):
    """The chat template refused the messages, or they are no messages."""


class ChatTemplate:
    """A compiled chat template. Raises CheckpointError if its source is no template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = _environment()
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # constant expressions are computed here: they raise anything
            raise CheckpointError(f"chat template: {_reason(error)}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **options: object,
    ) -> str:
        """The prompt for messages ({"role": ..., "content": ...}); options are the template's own.

        Raises ChatError with the template's words if it refuses them, or fails in any way.
        """
        variables: dict[str, object] = {**self.special_tokens, **options}
        variables |= {"messages": messages, "tools": tools}
        try:
            return self._template.render(variables, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is code of others: it may raise anything
            raise ChatError(f"chat template: {_reason(error)}") from error


def chat_template_of(checkpoint: Path) -> ChatTemplate | None:
    """The template of a checkpoint: chat_template.jinja, else that of tokenizer_config.json.

    None if there is none. Raises CheckpointError for files that cannot be read.
    """
    config = tokenizer_config(checkpoint)
    try:
        source: object = read_file(checkpoint / TEMPLATE_FILE, MOST_NBYTES).decode()
    except FileNotFoundError:
        source = config.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{checkpoint / TEMPLATE_FILE}: cannot be read: {error}") from error
    if isinstance(source, list):  # named templates; the one called `default` is for chat
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{checkpoint / TOKENIZER_CONFIG_FILE}: chat_template is no text")
    return ChatTemplate(source, special_tokens(config))


def _environment() -> Environment:
    """The sandbox, and what templates find in it."""
    from jinja2.ext import Extension  # slow to import, and not needed for token ids
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}...{% endgeneration %}`: marks, for training, what the assistant wrote.
        Here its body stands for itself.
        """

        tags = {"generation"}  # noqa: RUF012 (the library declares it so)

        def parse(self, parser: Parser) -> Node:
            """The body, in a scope of its own, as transformers has it."""
            line = next(parser.stream).lineno
            return Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", GenerationBlock],
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no HTML escapes."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    """The template's own words, or what went wrong in it."""
    import jinja2

    if isinstance(error, jinja2.TemplateError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
