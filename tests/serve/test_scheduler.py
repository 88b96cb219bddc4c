"""Promise: a request's tokens are those of a session alone, whoever else is served; none starves,
and what goes wrong in one stays there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import flashrt
from flashrt.serve.core import Core
from tests.serve.listening import alone, ask

Serving = Callable[..., Core]
SAMPLED = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2, "seed": 1},
    {"temperature": 0.7, "top_p": 0.8, "seed": 9, "logit_bias": {7: 4.0}},
]


def test_tokens_are_those_of_a_session_alone(serving: Serving, other: flashrt.Engine) -> None:
    """Fault: a piece of a prompt, a sampler or a restored state gets into another's lane."""
    core = serving()
    rng = np.random.default_rng(3)
    trunk = rng.integers(0, other.vocab_size, 150).tolist()
    asks = []
    for i in range(40):
        shared = trunk[: int(rng.integers(0, 150))] if i % 2 else []
        prompt = shared + rng.integers(0, other.vocab_size, int(rng.integers(1, 200))).tolist()
        n, options = int(rng.integers(1, 30)), SAMPLED[i % 4]
        starts = (len(shared),) if i % 3 else ()
        heard = ask(core, prompt, n, sampling=options, turn_starts=starts, owner=f"o{i % 3}")
        asks.append((prompt, n, options, heard))
    for prompt, n, options, heard in asks:
        heard.wait()
        assert heard.error is None
        assert heard.tokens.get(0, []) == alone(other, prompt, n, **options)
        assert heard.reasons == {0: "length"}
    assert core.scheduler.meters.cached_tokens > 500
    core.engine.capsules.check_integrity()
