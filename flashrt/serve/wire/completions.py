"""POST /v1/completions: text or token ids continued as they are, as OpenAI's older API has it.

IS: its request read, its answer written, whole or as chunks. Several prompts are several asks. IS
NOT: a chat template.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from flashrt.base.checks import as_integer
from flashrt.serve.answer import Answer, Heard, new_id
from flashrt.serve.body import Fields
from flashrt.serve.desk import Desk, Wanted
from flashrt.serve.http import QUIET, Call, EventStream, Json, sse, unless_gone
from flashrt.serve.refusal import Refusal, bad
from flashrt.serve.served import Served
from flashrt.serve.speaker import Ended, Said
from flashrt.serve.structure import grammar_of, shape_of
from flashrt.serve.together import Several
from flashrt.serve.wire import common
from flashrt.text.reply import TextDelta

DEFAULT_TOKENS, MOST_PROMPTS = 16, 64
_KNOWN = common.SAMPLING | common.IGNORED | common.OURS | {
    "model", "prompt", "suffix", "max_tokens", "n", "best_of", "stream", "stream_options",
    "logprobs", "echo", "stop", "response_format",
}  # fmt: skip


class Completions:
    """The route."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def __call__(self, call: Call) -> Response:
        """See http.Handler."""
        fields, served = call.fields, self._desk.served
        fields.only(_KNOWN)
        served.check_name(fields.text("model"))
        fields.refused("suffix", "text cannot be filled in before a suffix", "")
        n = common.choices_of(fields)
        best_of = fields.whole("best_of", 1, common.MOST_CHOICES)
        if best_of is not None and best_of != n:
            raise bad("best_of", f"best_of is {best_of}; only as many as n can be made")
        echo, streams = fields.flag("echo", False), fields.flag("stream", False)
        logprobs = fields.whole("logprobs", 0, common.MOST_ALTERNATIVES)
        if echo and logprobs is not None:
            raise bad("logprobs", "logprobs of an echoed prompt are not known; leave out echo")
        options = fields.object("stream_options")
        with_usage = False
        if options is not None:
            options.only({"include_usage", "include_obfuscation"})
            with_usage = options.flag("include_usage", False)
        prompts = await asyncio.to_thread(_prompts_of, fields, served)
        wanted = [_wanted_of(fields, served, prompt, n, logprobs) for prompt in prompts]
        echoed = [served.tokenizer.decode(p, skip_special=False) if echo else "" for p in prompts]
        answers: list[Answer] = []
        try:
            for one in wanted:
                answers.append(await self._desk.ask(one, call.owner))
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        several = Several(answers)
        made = _Made(served, several, n, echoed, with_tokens=logprobs is not None)
        if not streams:
            return await unless_gone(call.request, several, _whole(made))
        try:
            await several.begin()
        except BaseException:
            several.cancel()
            raise
        return EventStream(several, _chunks(made, with_usage), _failed, self._desk.access)


def _prompts_of(fields: Fields, served: Served) -> list[list[int]]:
    wanted = "a text, a list of texts, token ids, or a list of lists of token ids"
    given = fields.needed("prompt", wanted)
    if isinstance(given, str):
        return [served.tokens_of(given)]
    if not isinstance(given, list) or not given:
        raise fields.refuse("prompt", wanted)
    if isinstance(given[0], int):
        return [_ids_of(given, served, "prompt")]
    if len(given) > MOST_PROMPTS:
        raise bad("prompt", f"prompt has {len(given)} prompts; up to {MOST_PROMPTS} are taken")
    made = []
    for i, one in enumerate(given):
        if isinstance(one, str):
            made.append(served.tokens_of(one))
        elif isinstance(one, list):
            made.append(_ids_of(one, served, f"prompt[{i}]"))
        else:
            raise fields.refuse("prompt", wanted)
    return made


def _ids_of(given: list[Any], served: Served, at: str) -> list[int]:
    size = served.engine.vocab_size
    made = []
    for i, one in enumerate(given):
        token = as_integer(one)
        if token is None or not 0 <= token < size:
            raise bad(f"{at}[{i}]", f"{at}[{i}] is no token id in [0, {size})", "invalid_value")
        made.append(token)
    return made


def _wanted_of(
    fields: Fields, served: Served, tokens: list[int], n: int, logprobs: int | None
) -> Wanted:
    room = served.room(tokens, "prompt")
    most = fields.whole("max_tokens", 1)
    sampling = common.sampling_of(fields, served)
    shape = shape_of(fields.object("response_format"), "json_schema")
    if shape is not None:
        sampling["grammar"] = grammar_of(served, shape, in_thought=False)
    return Wanted(
        tokens=tokens,
        max_tokens=min(DEFAULT_TOKENS if most is None else most, room),
        sampling=sampling,
        n=n,
        stops=common.stops_of(fields),
        logprobs=logprobs,
        priority=common.priority_of(fields),
        session=common.session_of(fields),
    )


class _Made:
    """What all objects of one answer have."""

    def __init__(
        self, served: Served, answer: Several, n: int, echoed: list[str], *, with_tokens: bool
    ) -> None:
        self.served, self.answer, self.with_tokens = served, answer, with_tokens
        self._n, self._echoed = n, echoed
        self._id, self._created = new_id("cmpl-"), int(time.time())

    def echo(self, index: int) -> str:
        """The prompt before a choice, if it is wanted."""
        return self._echoed[index // self._n]

    def object(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One of them."""
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
            "choices": choices,
            **more,
        }

    def last(self) -> dict[str, Any]:
        """Usage and times, at the end."""
        return {"usage": common.usage_of(self.answer), "timings": self.answer.timings()}


async def _whole(made: _Made) -> Response:
    choices = []
    for i, heard in enumerate(await made.answer.whole()):
        echo = made.echo(i)
        choices.append({
            "index": i,
            "text": echo + heard.text,
            "finish_reason": common.finish_of(heard, may_call=False),
            "logprobs": _logprobs(made, heard, 0),
        })  # fmt: skip
    return Json(made.object(choices, **made.last()))


def _logprobs(made: _Made, heard: Heard, offset: int) -> dict[str, Any] | None:
    if not made.with_tokens:
        return None
    return common.old_logprobs(made.served, heard.tokens, offset)


async def _chunks(made: _Made, with_usage: bool) -> AsyncIterator[str]:
    answer = made.answer
    offsets = [0] * len(answer.heard)

    def chunk(
        index: int, text: str, finish: str | None = None, logprobs: Any = None, **more: Any
    ) -> str:
        choice = {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs}
        usage = {"usage": None} if with_usage else {}
        return sse(made.object([choice], **usage, **more))

    for i in range(len(answer.heard)):
        if echo := made.echo(i):
            yield chunk(i, echo)
    async for event in answer.events():
        if event is None:
            yield QUIET
        elif isinstance(event, Said):
            text = "".join(p.text for p in event.pieces if isinstance(p, TextDelta))
            logprobs = None
            if event.tokens:
                offset = offsets[event.index]
                logprobs = common.old_logprobs(made.served, event.tokens, offset)
                offsets[event.index] += sum(len(t) for t in logprobs["tokens"])
            yield chunk(event.index, text, logprobs=logprobs)
        elif isinstance(event, Ended):
            finish = common.finish_of(answer.heard[event.index], may_call=False)
            more = {} if with_usage or not answer.is_over else {"timings": answer.timings()}
            yield chunk(event.index, "", finish, **more)
    if with_usage:
        yield sse(made.object([], **made.last()))
    yield sse("[DONE]")


def _failed(refusal: Refusal) -> str:
    return sse(refusal.body("openai"))
