"""Text and tokens without the model: /tokenize, /detokenize and /apply-template of llama.cpp.

IS: three routes. IS NOT: generation.
"""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from flashrt.base.checks import as_integer
from flashrt.serve.conversation import rendered_prompt
from flashrt.serve.desk import Desk
from flashrt.serve.http import Call, Json
from flashrt.serve.refusal import bad
from flashrt.serve.wire.chat_completions import conversation_of


class Tokenize:
    """POST /tokenize {"content", "add_special", "with_pieces"} -> {"tokens"}."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, call: Call) -> Response:
        """See http.Handler. Special tokens that the text spells out are recognised."""
        fields, served = call.fields, self._desk.served
        fields.only({"content", "add_special", "parse_special", "with_pieces", "model"})
        text = fields.needed_text("content")
        fields.refused("parse_special", "special tokens in a text are always recognised", True)
        add_first = fields.flag("add_special", False)
        encode = served.tokens_of if add_first else served.tokenizer.encode
        tokens = await asyncio.to_thread(encode, text)
        if not fields.flag("with_pieces", False):
            return Json({"tokens": tokens})
        pieces = []
        for token in tokens:
            spelled, data = served.spelling(token)
            pieces.append({"id": token, "piece": spelled if data is not None else None})
        return Json({"tokens": pieces})


class Detokenize:
    """POST /detokenize {"tokens"} -> {"content"}."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, call: Call) -> Response:
        """See http.Handler."""
        fields, served = call.fields, self._desk.served
        fields.only({"tokens", "model"})
        given = fields.needed("tokens", "a list of token ids")
        if not isinstance(given, list):
            raise fields.refuse("tokens", "a list of token ids")
        tokens: list[int] = []
        for i, one in enumerate(given):
            token = as_integer(one)
            if token is None or not 0 <= token < served.engine.vocab_size:
                raise bad(f"tokens[{i}]", f"tokens[{i}] is no token id", "invalid_value")
            tokens.append(token)
        text = await asyncio.to_thread(served.tokenizer.decode, tokens, skip_special=False)
        return Json({"content": text})


class ApplyTemplate:
    """POST /apply-template: a chat request -> {"prompt", "tokens"}, without running it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, call: Call) -> Response:
        """See http.Handler."""
        served = self._desk.served
        told = conversation_of(call.fields, served)
        prompt = await rendered_prompt(self._desk, call, told)
        text = await asyncio.to_thread(served.text_of, prompt.tokens)
        return Json({"prompt": text, "tokens": prompt.tokens})
