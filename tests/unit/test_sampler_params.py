"""Parameters of sampling: numbers in range, as Python's numbers; all else is named and refused.

Red when a wrong type reaches `struct` or a comparison, whose TypeError names no parameter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import SessionError
from flashrt.ops.sample import SamplerParams, unpack

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 1.0}, r"top_k=1\.0 is not an integer in \[0, 2\^31\)"),
    ({"top_k": True}, "top_k=True is not an integer"),
    ({"top_k": 1 << 31}, "top_k=2147483648 is not in"),
    ({"seed": None}, "seed=None is not an integer"),
    ({"seed": 1.5}, "seed=1.5 is not an integer"),
    ({"seed": np.float64(3)}, "is not an integer"),
    ({"seed": "7"}, "seed='7' is not an integer"),
    ({"seed": -1}, "seed=-1 is not in"),
    ({"temperature": None}, "temperature=None is not a number"),
    ({"temperature": "hot"}, "temperature='hot' is not a number"),
    ({"temperature": float("nan")}, "temperature=nan is not in"),
    ({"temperature": 1e300}, r"temperature=1e\+300 is not in"),  # infinite in float32
    ({"top_p": [0.5]}, r"top_p=\[0\.5\] is not a number"),
    ({"top_p": 1e-60}, "top_p=1e-60 is not in"),  # 0 in float32
    ({"min_p": False}, "min_p=False is not a number"),
    ({"repetition_penalty": 1j}, "repetition_penalty=1j is not a number"),
    ({"logit_bias": 5}, "logit_bias: 5 is not a sequence"),
    ({"logit_bias": ((1.5, 2.0),)}, r"logit_bias: \(1\.5, 2\.0\) is not"),
    ({"logit_bias": ((3, None),)}, r"logit_bias: \(3, None\) is not"),
    ({"logit_bias": ((3, 1e300),)}, "logit_bias: a value is NaN or inf"),
    ({"logit_bias": ((3, 1.0), (3, 2.0))}, "each once"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(flashrt.SessionError, match=said):
        SamplerParams(**options)


def test_every_problem_is_named() -> None:
    with pytest.raises(flashrt.SessionError, match=r"top_k=1\.0 .*; seed=None .*; logit_bias: 5 "):
        SamplerParams(top_k=1.0, seed=None, logit_bias=5)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    bias = ((np.int32(4), np.float32(0.5)),)
    given = SamplerParams(np.float32(0.5), np.int64(3), np.float16(1), seed=np.uint64(1 << 63))
    assert given == SamplerParams(0.5, 3, 1, seed=1 << 63)
    assert type(given.seed) is int and type(given.temperature) is float
    plain = SamplerParams(logit_bias=((4, 0.5),))
    assert SamplerParams(logit_bias=bias).pack_bias() == plain.pack_bias()


def test_a_session_stays_as_it_was(session: flashrt.Session) -> None:
    session.prefill([1, 2, 3])
    digest = session.digest()
    for options in ({"top_k": 1.0}, {"seed": None}, {"logit_bias": [3]}, {"logit_bias": {"a": 1}}):
        with pytest.raises(flashrt.SessionError):
            session.generate(2, **options)  # type: ignore[arg-type]
    assert session.digest() == digest


@pytest.mark.parametrize(
    "params",
    [
        SamplerParams(),
        SamplerParams(0.7, 40, 0.9, 0.05, (1 << 64) - 1, 1.1, -0.5, 0.25),
        SamplerParams(2.0, seed=7, logit_bias=((0, -float("inf")), (9, 1.5), ((1 << 31) - 1, -2))),
    ],
)
def test_what_was_packed_is_unpacked(params: SamplerParams) -> None:
    """As the kernels see it. Red when two words change places, or a bias is lost."""
    found = unpack(params.pack(), params.pack_bias())
    assert (found.pack(), found.pack_bias()) == (params.pack(), params.pack_bias())
    assert (found.seed, found.top_k) == (params.seed, params.top_k)
    assert found.temperature == np.float32(params.temperature)
    assert found.frequency_penalty == params.frequency_penalty
    assert dict(found.logit_bias) == dict(params.logit_bias)
    words = np.frombuffer(params.pack(), np.uint32).copy()
    words[12] = 1  # a word without a name
    with pytest.raises(SessionError, match="not those of any"):
        unpack(words.tobytes(), params.pack_bias())
