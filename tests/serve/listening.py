"""A sink that remembers what it was told, and requests of the bundled model."""

from __future__ import annotations

import threading
from typing import Any

from flashrt.base.errors import FlashrtError
from flashrt.serve.ask import Ask, TokenLogprobs
from flashrt.serve.core import Core
from flashrt.session.engine import SessionEngine


class Heard:
    """What one request was told; `stop_after`: how many tokens of each choice are wanted."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.prompt_tokens = self.cached_tokens = -1
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self.reasons: dict[int, str] = {}
        self.nodes: dict[int, str | None] = {}
        self.error: FlashrtError | None = None
        self.stop_after = stop_after
        self.n = 1
        self.done = threading.Event()
        self.has_token = threading.Event()

    def began(self, prompt_tokens: int, cached_tokens: int) -> None:
        self.prompt_tokens, self.cached_tokens = prompt_tokens, cached_tokens

    def token(self, index: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        self.tokens.setdefault(index, []).append(token)
        self.logprobs.setdefault(index, []).append(logprobs)
        self.has_token.set()
        return self.stop_after is None or len(self.tokens[index]) < self.stop_after

    def ended(self, index: int, reason: str, node: str | None) -> None:
        assert index not in self.reasons, "a choice ends once"
        self.reasons[index], self.nodes[index] = reason, node
        if len(self.reasons) == self.n:
            self.done.set()

    def failed(self, error: FlashrtError) -> None:
        self.error = error
        self.done.set()

    def wait(self, seconds: float = 60.0) -> Heard:
        assert self.done.wait(seconds), "the request did not end"
        return self


def ask(
    core: Core, tokens: list[int], max_tokens: int = 8, *, heard: Heard | None = None,
    owner: str = "ann", **options: Any,
) -> Heard:  # fmt: skip
    """Submit a request; what it is told."""
    heard = heard or Heard()
    heard.n = options.get("n", 1)
    core.submit(Ask(owner, tuple(tokens), heard, max_tokens, **options))
    return heard


def alone(engine: SessionEngine, tokens: list[int], max_tokens: int, **sampling: Any) -> list[int]:
    """The same tokens from a session of its own."""
    with engine.session() as session:
        session.prefill(tokens)
        return list(session.generate(max_tokens, **sampling))
