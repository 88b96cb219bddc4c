"""`flashrt run`: one prompt, and what the model makes of it, streamed.

IS: a question through the checkpoint's chat template, or text or token ids as they are; counts on
stderr. IS NOT: a conversation.
"""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrt.base.errors import FlashrtError, TokenError
from flashrt.commands import console
from flashrt.commands.checkpoints import EngineOptions, open_engine
from flashrt.session.chat import Chat, Reply, open_chat
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Generation, Session
from flashrt.text.tokenizer import Tokenizer
from flashrt.view.units import seconds_text, significant
from flashrt.vision.pixels import file_of


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
    *,
    is_raw: bool = False,
    images: Sequence[Path] = (),
) -> int:
    """The command: text in, text out where there is a tokenizer, else ids in, ids out.

    Text is a user's message where the checkpoint has a chat template, unless it `is_raw`; `images`
    go before it.
    """
    if images and (is_raw or tokens is not None):
        raise FlashrtError("--image goes with a text and a template: leave out --raw, --tokens")
    parts = [image_part(path) for path in images]
    text = console.read_stdin() if prompt is None and tokens is None else prompt
    engine = open_engine(checkpoint, options)
    if text is None or is_raw or not (engine.text.can_talk or parts):
        answer = _continued(engine, _prompt_ids(engine, text, tokens), sampling)
    else:
        answer = _replied(open_chat(engine), text, sampling, parts)
    started, first = time.perf_counter(), 0.0
    for piece in answer.pieces:
        first = first or time.perf_counter()
        console.write(piece)
    finished = time.perf_counter()
    console.write("\n")
    _tell(engine, answer, first - started if first else None, finished - first)
    return 0


@dataclass(slots=True)
class _Answer:
    """What is written, and afterwards how it came."""

    session: Session
    pieces: Iterator[str]
    tokens_in: int = 0
    tokens_out: int = 0
    reason: str | None = None


def _continued(engine: SessionEngine, ids: list[int], sampling: Sampling) -> _Answer:
    """Token ids, and what follows them."""
    session = engine.session()

    def pieces() -> Iterator[str]:
        session.prefill(ids)
        options = dataclasses.asdict(sampling)
        generation = session.generate(**options, stop=engine.checkpoint.stop_tokens)
        yield from _written(generation, engine.tokenizer, answer)
        answer.reason = generation.reason

    answer = _Answer(session, pieces(), len(ids))
    return answer


def _written(generation: Generation, tokenizer: Tokenizer | None, answer: _Answer) -> Iterator[str]:
    decoder = None if tokenizer is None else tokenizer.stream()
    for token in generation:
        answer.tokens_out += 1
        yield f"{token} " if decoder is None else decoder.push(token)
    if decoder is not None:
        yield decoder.flush()


def image_part(path: Path) -> dict[str, object]:
    """A file as a part of a message, which holds it from here on. Raises ImageError."""
    file = file_of(path)
    assert file is not None, "only arrays have none"
    data = base64.b64encode(file).decode()
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/{path.suffix[1:]};base64,{data}"},
    }


def with_images(text: str, parts: Sequence[Mapping[str, object]]) -> str | list[dict[str, object]]:
    """The content of a message: images, then a text."""
    return [*map(dict, parts), {"type": "text", "text": text}] if parts else text


def _replied(
    chat: Chat, question: str, sampling: Sampling, images: Sequence[Mapping[str, object]]
) -> _Answer:
    """A user's message, and the assistant's."""
    if not question.strip():
        raise TokenError("the prompt is empty; give a text")
    chat.add("user", with_images(question, images))

    def pieces() -> Iterator[str]:
        reply: Reply = chat.stream(**dataclasses.asdict(sampling))
        yield from reply
        answer.tokens_in, answer.tokens_out = chat.fed_tokens, reply.token_count
        answer.reason = reply.reason

    answer = _Answer(chat.session, pieces())
    return answer


def _prompt_ids(engine: SessionEngine, text: str | None, tokens: list[int] | None) -> list[int]:
    if tokens is not None:
        return tokens
    if engine.tokenizer is None:
        raise TokenError(
            "the checkpoint has no tokenizer, so text cannot be read; "
            "give token ids instead: --tokens 1,2,3"
        )
    first = engine.text.first_token
    ids = [*([] if first is None else [first]), *engine.tokenizer.encode(text or "")]
    if not ids:
        raise TokenError("the prompt is empty; give at least one token")
    return ids


def _tell(engine: SessionEngine, answer: _Answer, first_s: float | None, rest_s: float) -> None:
    """Counts and times, on stderr."""
    count = answer.tokens_out
    is_timed = first_s is not None and count > 1
    rate = f", {significant((count - 1) / rest_s)} tokens/s" if is_timed else ""
    first = "no text" if first_s is None else f"first text after {seconds_text(first_s)}"
    console.screen(is_error=True).print(
        f"{answer.tokens_in:,} tokens in, {count:,} out{rate}; {first}; "
        f"ended by {answer.reason}; position {answer.session.position:,} of "
        f"{engine.max_positions:,}; {engine.device}",
        style="dim",
    )
