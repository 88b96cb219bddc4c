"""What the routes of all APIs read and write alike: sampling, limits, model names, usage.

IS: fields that several APIs share, by the same names. IS NOT: a route.
"""

from __future__ import annotations

import secrets
from typing import Any

from flashrt.serve.answer import Answer, Heard
from flashrt.serve.ask import TokenLogprobs
from flashrt.serve.body import Fields
from flashrt.serve.refusal import bad
from flashrt.serve.served import Served, finite
from flashrt.serve.together import Several

SAMPLING = frozenset({
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "repeat_penalty", "logit_bias",
})  # fmt: skip
# Of other servers, or about accounts and caches of a cloud: they change nothing here.
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity", "cache_prompt", "id_slot", "timings_per_token",
    "return_progress", "add_generation_prompt",
})  # fmt: skip
OURS = frozenset({"session", "priority"})
MOST_STOPS, MOST_CHOICES, MOST_ALTERNATIVES = 16, 16, 20
_MOST_BIAS = 100.0
_INT64 = 1 << 63


def sampling_of(fields: Fields, served: Served) -> dict[str, Any]:
    """Arguments of Session.generate. What is not said is as the checkpoint recommends; a seed that
    is not given is drawn.
    """
    made: dict[str, Any] = dict(served.sampling)
    numbers = (
        ("temperature", "temperature", 0.0, 100.0),
        ("min_p", "min_p", 0.0, 1.0),
        ("presence_penalty", "presence_penalty", -2.0, 2.0),
        ("frequency_penalty", "frequency_penalty", -2.0, 2.0),
    )
    for name, argument, low, high in numbers:
        value = fields.number(name, low, high)
        if value is not None:
            made[argument] = value
    top_p = fields.number("top_p", 0.0, 1.0)
    if top_p is not None:
        made["top_p"] = max(top_p, 1e-6)  # 0 is "the likeliest alone" to OpenAI
    top_k = fields.whole("top_k", -1, (1 << 31) - 1)
    if top_k is not None:
        made["top_k"] = max(top_k, 0)  # -1 is "off" to others
    for name in ("repeat_penalty", "repetition_penalty"):
        value = fields.number(name, 1e-3, 1e3)
        if value is not None:
            made["repetition_penalty"] = value
    seed = fields.whole("seed", -_INT64, 2 * _INT64 - 1)
    made["seed"] = secrets.randbits(63) if seed is None else seed % (2 * _INT64)
    bias = _bias(fields, served)
    if bias:
        made["logit_bias"] = bias
    return made


def _bias(fields: Fields, served: Served) -> dict[int, float]:
    given = fields.object("logit_bias")
    if given is None:
        return {}
    vocab_size, made = served.engine.vocab_size, dict[int, float]()
    if len(given.value) > 300:
        raise bad("logit_bias", f"logit_bias has {len(given.value)} tokens; up to 300 can have one")
    for name in given.value:
        if not name.isascii() or not name.isdecimal() or len(name) > 10 or int(name) >= vocab_size:
            raise given.refuse(name, f"biases of token ids in [0, {vocab_size})")
        value = given.number(name, -_MOST_BIAS, _MOST_BIAS)
        if value is not None:
            made[int(name)] = value
    return made


def stops_of(fields: Fields, name: str = "stop") -> tuple[str, ...]:
    """Stop strings."""
    return fields.texts(name, MOST_STOPS)


def choices_of(fields: Fields) -> int:
    """How many choices."""
    return fields.whole("n", 1, MOST_CHOICES) or 1


def session_of(fields: Fields) -> str | None:
    """The named session that a request goes on."""
    name = fields.text("session")
    if name is not None and not 0 < len(name) <= 200:
        raise fields.refuse("session", "the id of a session")
    return name


def priority_of(fields: Fields) -> int:
    """Higher ones run first."""
    return fields.whole("priority", -100, 100) or 0


def usage_of(answer: Answer | Several) -> dict[str, Any]:
    """Usage as OpenAI's older APIs have it. `cached_tokens` were not fed to the model."""
    count = answer.token_count
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": count,
        "total_tokens": answer.prompt_tokens + count,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def finish_of(choice: Heard, *, may_call: bool = True) -> str:
    """OpenAI's finish_reason."""
    if choice.reason in ("length", "context"):
        return "length"
    return "tool_calls" if may_call and choice.calls else "stop"


def listed_tokens(
    served: Served, tokens: list[tuple[int, TokenLogprobs]] | tuple[tuple[int, TokenLogprobs], ...]
) -> list[dict[str, Any]]:
    """Logprobs as the chat API lists them."""
    return [
        {
            **served.logprob_entry(token, found.logprob),
            "top_logprobs": [served.logprob_entry(t, p) for t, p in found.top],
        }
        for token, found in tokens
    ]


def old_logprobs(
    served: Served,
    tokens: list[tuple[int, TokenLogprobs]] | tuple[tuple[int, TokenLogprobs], ...],
    offset: int,
) -> dict[str, Any]:
    """Logprobs as /v1/completions lists them."""
    texts = [served.spelling(token)[0] for token, _ in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [finite(found.logprob) for _, found in tokens],
        "top_logprobs": [
            {served.spelling(t)[0]: finite(p) for t, p in found.top} for _, found in tokens
        ],
        "text_offset": offsets,
    }
