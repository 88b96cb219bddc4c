"""The public API against Hugging Face: logits, greedy tokens and states of each golden set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt
from tests.golden.expected import Expected, assert_close, assert_states, read_expected
from tests.tolerances import POSITION_ABSOLUTE

PROMPTS = range(6)


@pytest.fixture(scope="module")
def expected(golden_set: Path) -> Expected:
    return read_expected(golden_set)


@pytest.fixture(scope="module")
def engine(golden_set: Path, pytestconfig: pytest.Config) -> Iterator[flashrt.Engine]:
    device = pytestconfig.getoption("--device")
    engine = flashrt.load(
        golden_set,
        device=device,
        max_positions=1024,
        kv_dtype="float32",
        precision="high",  # of cuda and simt; the cpu has one alone
    )
    yield engine
    engine.close()


@pytest.fixture
def session(engine: flashrt.Engine) -> Iterator[flashrt.Session]:
    with engine.session() as session:
        yield session


@pytest.mark.parametrize("prompt", PROMPTS)
def test_last_logits_and_greedy_tokens(
    session: flashrt.Session, expected: Expected, prompt: int
) -> None:
    session.prefill(expected.prompts[prompt])
    assert_close(session.logits(), expected.arrays["logits_last"][prompt], "logits_last")
    tokens = list(session.generate(len(expected.greedy[prompt])))
    assert tokens == expected.greedy[prompt]
    session.rollback(session.position - 1)  # the logits that chose the last token
    assert_close(session.logits(), expected.arrays["greedy_logits_last"][prompt], "greedy")


def test_logits_of_every_position(engine: flashrt.Engine, expected: Expected) -> None:
    recorded = [i for i in PROMPTS if f"logits_all.{i}" in expected.arrays]
    assert recorded
    for prompt in recorded:
        with engine.session() as session:
            for position, token in enumerate(expected.prompts[prompt]):
                session.prefill([token])
                want = expected.arrays[f"logits_all.{prompt}"][position]
                worst = float(np.abs(session.logits() - want).max())
                assert worst <= POSITION_ABSOLUTE, (
                    f"prompt {prompt} at {position}: off by {worst:.2e}"
                )


def test_states_after_prefill(
    engine: flashrt.Engine, session: flashrt.Session, expected: Expected
) -> None:
    if expected.cache_prompt is None:
        pytest.skip("this set holds no states")
    session.prefill(expected.prompts[expected.cache_prompt])
    names = ("state", "window", "keys", "values")
    lane = {name: engine.lane_array(session.lane, name) for name in names}
    assert_states(lane, expected)


def test_another_recurrent_state_is_noticed(session: flashrt.Session, expected: Expected) -> None:
    """Negative control: with rows restored but not the fixed band, the comparison must fail."""
    prompt, token = expected.prompts[4], expected.greedy[4][0]
    session.prefill(prompt)
    capsule = session.snapshot()
    session.prefill([token])
    right = session.logits()
    session.prefill(expected.prompts[3])
    session.restore(capsule, bands=("rows",))
    session.prefill([token])
    with pytest.raises(AssertionError):
        assert_close(session.logits(), right, "ablated")
    session.restore(capsule)
    session.prefill([token])
    assert (session.logits() == right).all()
