"""The model that is served: its name, its text, and what a request may ask of it.

IS: an engine and what its checkpoint says, as the routes need it: prompts, tokens, limits. IS NOT:
the scheduler (core), or a rule of any API (wire).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import shown
from flashrt.engine.sight import Image
from flashrt.models.sight import FIRST_WORD
from flashrt.serve.refusal import Refusal, bad
from flashrt.session.chat import recommended_sampling
from flashrt.session.engine import SessionEngine
from flashrt.session.pictures import parts_apart, with_words
from flashrt.text.prompt import Prompt, PromptEncoder
from flashrt.text.template import ChatTemplate, Message
from flashrt.text.tokenizer import Tokenizer


class Served:
    """Raises CheckpointError for a checkpoint without a tokenizer."""

    def __init__(self, engine: SessionEngine, name: str) -> None:
        if engine.tokenizer is None:
            raise CheckpointError(
                f"{engine.checkpoint.path}: a server needs the checkpoint's tokenizer.json"
            )
        self.engine = engine
        self.name = name
        self.created = int(time.time())
        self.tokenizer: Tokenizer = engine.tokenizer
        self.stop_tokens = frozenset(engine.checkpoint.stop_tokens)
        self.sampling = recommended_sampling(engine.checkpoint)

    @property
    def sees(self) -> bool:
        """Whether messages may have images."""
        return self.engine.sight is not None

    @property
    def blind(self) -> str:
        """Why they may not, and what helps."""
        return (
            f"{self.name} is served without eyes: images need a checkpoint with a vision tower "
            "(Qwen3.5), served with --images (flashrt[vision])"
        )

    @property
    def fingerprint(self) -> str:
        """What decides every bit of an answer, besides the request."""
        return f"fp_{self.engine.fingerprint[:16]}"

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Refuses where there is none."""
        if self.engine.text.template is None:
            raise Refusal(
                400,
                f"{self.name} has no chat template; use /v1/completions",
                "model",
                "no_chat_template",
            )
        return self.engine.text.template

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None,
        options: Mapping[str, object],
        *,
        is_continued: bool = False,
        images: Sequence[Image] = (),
    ) -> Prompt:
        """The prompt of a conversation, up to where the reply begins, or where the last message
        goes on; `images`: those that its parts are. Raises ChatError.
        """
        encoder = PromptEncoder(self.template, self.tokenizer, tools, options)
        told, _ = parts_apart(messages)
        prompt = encoder.encode(told, is_asked=True, is_continued=is_continued)
        if not images:
            return prompt
        assert self.engine.sight is not None, "whoever has images sees"
        words = [image.tokens for image in images]
        return with_words(prompt, self.engine.sight.image_token, words)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens as the model has it, special ones spelled out; an image is its one
        token in the chat template.
        """
        sight, made = self.engine.sight, list[int]()
        for i, token in enumerate(tokens):
            if token < FIRST_WORD:
                made.append(token)
            elif sight is not None and (not i or tokens[i - 1] < FIRST_WORD):
                made.append(sight.image_token)
        return self.tokenizer.decode(made, skip_special=False)

    def tokens_of(self, text: str) -> list[int]:
        """Ids of a text that no template renders."""
        first = self.engine.text.first_token
        return [*([] if first is None else [first]), *self.tokenizer.encode(text)]

    def room(self, tokens: Sequence[int], param: str) -> int:
        """Positions that a prompt leaves for its answer. Refuses one that leaves none."""
        limit = self.engine.max_positions
        if len(tokens) >= limit:
            raise bad(
                param,
                f"the prompt has {len(tokens):,} tokens; with room for an answer, {limit:,} "
                "positions hold fewer. Shorten it, or serve with a larger --max-positions",
                "context_length_exceeded",
            )
        if not tokens:
            raise bad(param, f"{param} is empty; give at least one token", "invalid_value")
        return limit - len(tokens)

    def check_name(self, name: str | None) -> None:
        """Refuse another model's name; every request may leave it out, or say "default"."""
        if name not in (None, self.name, "default"):
            raise Refusal(
                404,
                f"the model {shown(name)} is not served here; this is {self.name!r}",
                "model",
                "model_not_found",
            )

    @functools.lru_cache(maxsize=65_536)  # noqa: B019 (one per process)
    def spelling(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text, and its bytes; None where it ends inside a character."""
        text = self.tokenizer.decode([token], skip_special=False)
        return text, None if "\ufffd" in text else list(text.encode())

    def logprob_entry(self, token: int, logprob: float) -> dict[str, Any]:
        """As OpenAI lists a token."""
        text, data = self.spelling(token)
        return {"token": text, "logprob": finite(logprob), "bytes": data}


def finite(logprob: float) -> float:
    """A logprob that JSON can hold: a token that was ruled out has -9999, as OpenAI writes it."""
    return max(logprob, -9999.0)
