"""Sampling: the parameters that turn logits into a token, together with journal and position.

IS: the op, the ranges of its parameters, and what is in the regions `sampler`, `bias` and `mask`;
words of a sampler that are all 0 are greedy. IS NOT: sampling itself; kernels do that. An entry of
`bias` is a token id and a float32; bit t % 32 of word t / 32 of `mask` is set for an allowed token.

In this order, c being how often a token stands in the journal below the position:
  x = -inf for tokens that are not allowed, if there is a mask
  x += bias;  if c: x = x / repetition if x > 0 else x * repetition;  x -= presence + frequency * c
  z = (x - max) / temperature;  top_k, then top_p of what is left;  min_p relative to the likeliest
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from flashrt.base.checks import as_integer, as_number, shown
from flashrt.base.errors import SessionError
from flashrt.base.float_mode import DefaultFloatMode
from flashrt.core.op import Op, Param
from flashrt.core.region import DType
from flashrt.ops.params import cursors, f32, i32

SAMPLER_WORDS = 16
BIAS_ENTRIES = 512  # tokens that may have a logit bias
MASK_BITS = 32  # of a word of `mask`


class SamplerWord(IntEnum):
    """Words of the region `sampler`; those without a name are 0."""

    SEED_LOW = 0
    SEED_HIGH = 1
    TOP_K = 2  # int32; 0: off
    TEMPERATURE = 3  # float32, as are the next five
    TOP_P = 4
    MIN_P = 5
    REPETITION = 6  # 0: off
    PRESENCE = 7
    FREQUENCY = 8
    BIASES = 9  # int32: entries of `bias` that count
    MASKED = 10  # 1: tokens that `mask` does not allow are not drawn; 0: it is not read


SAMPLE = Op(
    "sample",
    "cursor.token = Gumbel-max over the logits that temperature, top_k, top_p and min_p leave, "
    "after mask, bias and penalties over the journal below the position; noise is Philox keyed by "
    "(seed, position); temperature 0 = argmax, the lowest id of equals; -1 for NaN, or no token",
    (
        f32("logits", "r", 1, "V"),
        Param("sampler", "r", (SAMPLER_WORDS,), (DType.U32,), words=SamplerWord),
        Param("bias", "r", (BIAS_ENTRIES, 2), (DType.U32,)),
        Param("mask", "r", ("M",), (DType.U32,)),
        i32("journal", "r", 1, "S", 1),
        f32("work", "w", 2, "V"),
        cursors("cursor", "rw"),
    ),
)


@dataclass(frozen=True, slots=True)
class SamplerParams:
    """A token is a function of these, the logits, the journal and the position. Defaults: greedy.

    `allowed`: bytes of `mask_words(V)` words, a bit per token; None allows all. Raises SessionError
    naming every parameter that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added), ids unique
    allowed: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in self.__slots__}
        problems: list[str] = []
        for name, wanted, is_fine in _RANGES:
            given = values[name]
            is_whole = name in _WHOLE
            value = as_integer(given) if is_whole else as_number(given)
            if value is None:
                kind = "an integer" if is_whole else "a number"
                problems.append(f"{name}={shown(given)} is not {kind} in {wanted}")
            elif not is_fine(value) or not (is_whole or is_fine(_as_f32(value))):
                problems.append(f"{name}={shown(given)} is not in {wanted}")
            else:
                object.__setattr__(self, name, value)  # numpy's scalars become Python's
        bias, problem = _checked_bias(self.logit_bias)
        object.__setattr__(self, "logit_bias", bias)
        if problem:
            problems.append(f"logit_bias: {problem}")
        if not isinstance(self.allowed, bytes | None):
            problems.append(f"allowed={shown(self.allowed)} is neither bytes nor None")
        if problems:
            raise SessionError(f"sampling parameters: {'; '.join(problems)}")

    def masked(self, allowed: bytes) -> SamplerParams:
        """The same with another mask. For every token: the rest is not checked again."""
        made = copy.copy(self)
        object.__setattr__(made, "allowed", allowed)
        return made

    def pack(self) -> bytes:
        """The bytes of region `sampler`."""
        words = np.zeros(SAMPLER_WORDS, np.uint32)
        words[SamplerWord.SEED_LOW] = self.seed & 0xFFFFFFFF
        words[SamplerWord.SEED_HIGH] = self.seed >> 32
        words[SamplerWord.TOP_K] = self.top_k
        words[SamplerWord.BIASES] = len(self.logit_bias)
        words[SamplerWord.MASKED] = self.allowed is not None
        floats = words.view(np.float32)
        with DefaultFloatMode():
            floats[SamplerWord.TEMPERATURE] = self.temperature
            floats[SamplerWord.TOP_P] = self.top_p
            floats[SamplerWord.MIN_P] = self.min_p
            floats[SamplerWord.REPETITION] = self.repetition_penalty
            floats[SamplerWord.PRESENCE] = self.presence_penalty
            floats[SamplerWord.FREQUENCY] = self.frequency_penalty
        return words.tobytes()

    def pack_bias(self) -> bytes:
        """The bytes of region `bias`."""
        with DefaultFloatMode():
            entries = b"".join(struct.pack("@if", *entry) for entry in self.logit_bias)
        return entries.ljust(8 * BIAS_ENTRIES, b"\0")


def unpack(sampler: bytes, bias: bytes) -> SamplerParams:
    """What `pack` and `pack_bias` wrote, floats as float32 has them, and no mask: that is kept
    elsewhere. Raises SessionError for bytes that they do not write.
    """
    words = np.frombuffer(sampler, np.uint32).copy()
    words[SamplerWord.MASKED] &= ~np.uint32(1)
    floats = words.view(np.float32)
    seed = int(words[SamplerWord.SEED_HIGH]) << 32 | int(words[SamplerWord.SEED_LOW])
    n_biases = int(words[SamplerWord.BIASES])
    entries = struct.iter_unpack("@if", bias[: 8 * min(n_biases, BIAS_ENTRIES)])
    params = SamplerParams(
        temperature=float(floats[SamplerWord.TEMPERATURE]),
        top_k=int(words[SamplerWord.TOP_K]),
        top_p=float(floats[SamplerWord.TOP_P]),
        min_p=float(floats[SamplerWord.MIN_P]),
        seed=seed,
        repetition_penalty=float(floats[SamplerWord.REPETITION]),
        presence_penalty=float(floats[SamplerWord.PRESENCE]),
        frequency_penalty=float(floats[SamplerWord.FREQUENCY]),
        logit_bias=tuple(entries),
    )
    if params.pack() != words.tobytes() or params.pack_bias() != bias:
        raise SessionError("sampling parameters: the words are not those of any")
    return params


def mask_words(vocab_size: int) -> int:
    """Words of region `mask`."""
    return -(-vocab_size // MASK_BITS)


_WHOLE = ("top_k", "seed")
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature", "[0, inf)", lambda x: 0 <= x < np.inf),
    ("top_k", "[0, 2^31)", lambda x: 0 <= x < 1 << 31),
    ("top_p", "(0, 1]", lambda x: 0 < x <= 1),
    ("min_p", "[0, 1]", lambda x: 0 <= x <= 1),
    ("seed", "[0, 2^64)", lambda x: 0 <= x < 1 << 64),
    ("repetition_penalty", "(0, inf)", lambda x: 0 < x < np.inf),
    ("presence_penalty", "(-inf, inf)", lambda x: abs(x) < np.inf),
    ("frequency_penalty", "(-inf, inf)", lambda x: abs(x) < np.inf),
)


def _as_f32(value: float) -> float:
    """What the kernels get: 0 and infinity when it is beyond float32."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _checked_bias(given: object) -> tuple[tuple[tuple[int, float], ...], str]:
    """The entries as Python's numbers, and what is wrong with them, if anything is."""
    entries: list[tuple[int, float]] = []
    try:
        pairs = [(token, value) for token, value in given]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return (), f"{shown(given)} is not a sequence of (token id, number)"
    for token, value in pairs:
        known, added = as_integer(token), as_number(value)
        if known is None or not 0 <= known < 1 << 31 or added is None:
            return (), f"({shown(token)}, {shown(value)}) is not (token id, number)"
        entries.append((known, added))
    if len(entries) > BIAS_ENTRIES or len({token for token, _ in entries}) < len(entries):
        return (), f"wants up to {BIAS_ENTRIES} tokens, each once"
    if any(not _as_f32(value) < np.inf for _, value in entries):
        return (), "a value is NaN or inf; -inf forbids a token"
    return tuple(entries), ""
