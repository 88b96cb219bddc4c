"""Chat messages -> prompt text, by the Jinja template that comes with a checkpoint.

IS: a sandboxed renderer: templates are downloaded code. IS NOT: a tokenizer, or a parser of text.
Called by: serve, cli.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flashrt.base.errors import CheckpointError, FlashrtError

TEMPLATE_FILE, TOKENIZER_CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"

Message = Mapping[str, object]


class ChatError(FlashrtError):
    """The chat template refused the messages."""


class ChatTemplate:
    """A compiled chat template. Raises CheckpointError if its source is no template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"chat template: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        **options: object,
    ) -> str:
        """The prompt for messages ({"role": ..., "content": ...}); options are the template's own.

        Raises ChatError with the template's words if it refuses them.
        """
        variables: dict[str, object] = {**self._special_tokens, **options}
        variables |= {"messages": messages, "tools": tools}
        try:
            return self._template.render(variables, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ChatError(f"chat template: {error}") from error


def chat_template_of(checkpoint: Path) -> ChatTemplate | None:
    """The template of a checkpoint: chat_template.jinja, else that of tokenizer_config.json.

    None if there is none. Raises CheckpointError for files that cannot be read.
    """
    config = _tokenizer_config(checkpoint / TOKENIZER_CONFIG_FILE)
    try:
        source: object = (checkpoint / TEMPLATE_FILE).read_text(encoding="utf-8")
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
    return ChatTemplate(source, _special_tokens(config))


def _tokenizer_config(path: Path) -> Mapping[str, object]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, expected an object")
    return config


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """`bos_token` and the like: spelled out, or as an object with a `content`."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
