"""The sampler's parameters: what turns logits into a token, together with journal and position.

IS: their ranges, and the words of the regions `sampler` and `bias` that op `sample` reads. IS NOT:
sampling; kernels do that. Called by: engine (writes the regions), session, tests.

`sampler` is 16 words: [0] seed low, [1] seed high (uint32), [2] top_k (int32, 0 = off), [3]
temperature, [4] top_p, [5] min_p, [6] repetition (0 = off), [7] presence, [8] frequency (float32),
[9] number of entries in `bias` (int32), the rest 0: all 0 is greedy. An entry of `bias` is a token
id and a float32.

In this order, c being how often a token stands in the journal below the position:
  x += bias;  if c: x = x / repetition if x > 0 else x * repetition;  x -= presence + frequency * c
  z = (x - max) / temperature;  top_k, then top_p of what is left;  min_p relative to the likeliest
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashrt.base.errors import SessionError
from flashrt.ops.table import BIAS_ENTRIES, SAMPLER_WORDS


@dataclass(frozen=True, slots=True)
class SamplerParams:
    """A token is a function of these, the logits, the journal and the position. Defaults: greedy.

    Raises SessionError naming every parameter that is out of range.
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

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        problems = [
            f"{name}={values[name]} is not in {wanted}"
            for name, wanted, is_fine in _RANGES
            if not is_fine(values[name])
        ]
        ids = [token for token, _ in self.logit_bias]
        if len(ids) > BIAS_ENTRIES or len(set(ids)) < len(ids) or any(i < 0 for i in ids):
            problems.append(f"logit_bias: wants up to {BIAS_ENTRIES} tokens, each once")
        if any(not value < np.inf for _, value in self.logit_bias):
            problems.append("logit_bias: a value is NaN or inf; -inf forbids a token")
        if problems:
            raise SessionError(f"sampling parameters: {'; '.join(problems)}")

    @property
    def adjusts_logits(self) -> bool:
        """Whether bias or penalties do anything."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return bool(self.logit_bias) or penalties != (1.0, 0.0, 0.0)

    def pack(self) -> bytes:
        """The bytes of region `sampler`."""
        words = struct.pack(
            "@2Ii6fi",
            self.seed & 0xFFFFFFFF,
            self.seed >> 32,
            self.top_k,
            self.temperature,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            len(self.logit_bias),
        )
        return words.ljust(4 * SAMPLER_WORDS, b"\0")

    def pack_bias(self) -> bytes:
        """The bytes of region `bias`."""
        entries = b"".join(struct.pack("@if", *entry) for entry in self.logit_bias)
        return entries.ljust(8 * BIAS_ENTRIES, b"\0")


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
