"""`flashrt run`: feed a prompt, stream what follows.

IS: one session, tokens or text, counts on stderr. IS NOT: chat (serve). Called by: cli.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flashrt.base.errors import TokenError
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, open_engine
from flashrt.load import SessionEngine
from flashrt.session.session import Session
from flashrt.view.units import seconds_text, significant


@dataclass(frozen=True, slots=True)
class Sampling:
    """Arguments of `Session.generate` that the command line offers."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


def run(
    checkpoint: Path,
    prompt: str | None,
    tokens: list[int] | None,
    options: EngineOptions,
    sampling: Sampling,
) -> int:
    """The command: text in, text out where there is a tokenizer, else ids in, ids out."""
    engine = open_engine(checkpoint, options)
    ids = _prompt_ids(engine, prompt, tokens)
    session = engine.session()
    started = time.perf_counter()
    session.prefill(ids)
    count, first = _stream(engine, session, sampling)
    finished = time.perf_counter()
    rate = "" if count < 2 else f", {significant((count - 1) / (finished - first))} tokens/s"
    screen = console.screen(is_error=True)
    screen.print(
        f"[dim]{len(ids):,} tokens in, {count:,} out{rate}; first token after "
        f"{seconds_text(first - started)}; position {session.position:,} of "
        f"{engine.max_positions:,}; {engine.device}[/]"
    )
    return 0


def _prompt_ids(engine: SessionEngine, prompt: str | None, tokens: list[int] | None) -> list[int]:
    if tokens is not None:
        return tokens
    if engine.tokenizer is None:
        raise TokenError(
            "the checkpoint has no tokenizer.json, so text cannot be read; "
            "give token ids instead: --tokens 1,2,3"
        )
    if prompt is None and sys.stdin.isatty():
        raise TokenError(
            "nothing to continue; give --prompt TEXT, --tokens 1,2,3, or text on stdin"
        )
    ids = engine.tokenizer.encode(sys.stdin.read() if prompt is None else prompt)
    if not ids:
        raise TokenError("the prompt is empty; give at least one token")
    return ids


def _stream(engine: SessionEngine, session: Session, sampling: Sampling) -> tuple[int, float]:
    """Write tokens as they come; returns their number and the time of the first."""
    decoder = None if engine.tokenizer is None else engine.tokenizer.stream()
    count, first = 0, time.perf_counter()
    for token in session.generate(
        sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop=engine.checkpoint.stop_tokens,
    ):
        count += 1
        if count == 1:
            first = time.perf_counter()
        sys.stdout.write(f"{token} " if decoder is None else decoder.push(token))
        sys.stdout.flush()
    sys.stdout.write("\n" if decoder is None else decoder.flush() + "\n")
    return count, first
