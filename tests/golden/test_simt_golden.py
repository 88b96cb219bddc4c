"""The raw CUDA kernels, run by the SIMT shim, against Hugging Face: both precisions, every prompt.

IS: precision "high" held to the tolerance of float32, with the same greedy tokens; bfloat16 to a
relative one; and what a long run asks of the driver. IS NOT: exactness, see tests/property.
`--device simt` runs test_golden the same way, with logits of every position.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on
from tests.golden.expected import Expected, assert_close, assert_states, read_expected
from tests.tolerances import FAST_RELATIVE, LOGITS_RELATIVE

PROMPTS = (0, 1, 2, 3, *(pytest.param(i, marks=pytest.mark.slow) for i in (4, 5)))  # 200, 777


@pytest.fixture(scope="module")
def expected(golden_set: Path) -> Expected:
    return read_expected(golden_set)


def load(folder: Path, device: SimtDevice) -> flashrt.Engine:
    return load_on(lambda: device, folder, max_positions=1024, lanes=2, kv_dtype="float32")


@pytest.fixture(scope="module")
def high(golden_set: Path) -> Iterator[flashrt.Engine]:
    engine = load(golden_set, SimtDevice("high"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def bfloat16(golden_set: Path) -> Iterator[flashrt.Engine]:
    engine = load(golden_set, SimtDevice("bfloat16"))
    yield engine
    engine.close()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_high_gives_the_logits_and_tokens_of_float32(
    high: flashrt.Engine, expected: Expected, prompt: int
) -> None:
    with high.session() as session:
        session.prefill(expected.prompts[prompt])
        assert_close(session.logits(), expected.arrays["logits_last"][prompt], "logits_last")
        assert list(session.generate(48)) == expected.greedy[prompt][:48]
        session.rollback(session.position - 1)  # the logits that chose the last token
        assert_close(session.logits(), expected.arrays["greedy_logits_last"][prompt], "greedy")


def test_high_gives_the_states_of_float32(high: flashrt.Engine, expected: Expected) -> None:
    if expected.cache_prompt is None:
        pytest.skip("this set holds no states")
    with high.session() as session:
        session.prefill(expected.prompts[expected.cache_prompt])
        names = ("state", "window", "keys", "values")
        assert_states({n: high.lane_array(session.lane, n) for n in names}, expected)


def test_fast_rounds_what_the_default_keeps(golden_set: Path, expected: Expected) -> None:
    """As near as one bfloat16 throughout comes, and no nearer: a precision of its own."""
    engine, errors = load(golden_set, SimtDevice("fast")), []
    for prompt in range(3):
        with engine.session() as session:
            session.prefill(expected.prompts[prompt])
            errors.append(relative(session.logits(), expected.arrays["logits_last"][prompt]))
    engine.close()
    assert max(errors) <= FAST_RELATIVE, errors
    assert max(errors) > LOGITS_RELATIVE, f"{errors}: were these pairs?"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_bfloat16_is_near(bfloat16: flashrt.Engine, expected: Expected, prompt: int) -> None:
    with bfloat16.session() as session:
        session.prefill(expected.prompts[prompt])
        error = relative(session.logits(), expected.arrays["logits_last"][prompt])
    assert error <= LOGITS_RELATIVE, f"relative rms {error:.2e}"
    assert error > LOGITS_RELATIVE / 20, "as near as pairs: was this bfloat16?"


def test_bfloat16_is_near_at_every_position(bfloat16: flashrt.Engine, expected: Expected) -> None:
    """Positions where the delta rule nearly cancels amplify rounding; the last is seldom one."""
    recorded = [i for i in range(6) if f"logits_all.{i}" in expected.arrays]
    assert recorded
    for prompt in recorded:
        with bfloat16.session() as session:
            for position, token in enumerate(expected.prompts[prompt]):
                session.prefill([token])
                want = expected.arrays[f"logits_all.{prompt}"][position]
                error = relative(session.logits(), want)
                at = f"prompt {prompt} at {position}"
                assert error <= LOGITS_RELATIVE, f"{at}: relative rms {error:.2e}"


def relative(got: NDArray[np.float32], want: NDArray[np.float32]) -> float:
    """rms(got - want) / rms(want)"""
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.slow
def test_no_verb_makes_anything_after_load() -> None:
    """A thousand tokens, greedy and sampled, and capsules between: the driver makes nothing."""
    device = SimtDevice("bfloat16")
    engine = load(Path(__file__).parent / "tiny", device)
    with engine.session() as session:
        session.prefill(range(1, 70))
        start = device.driver.counts.copy()
        for turn in range(4):
            capsule = session.snapshot()
            before = device.driver.counts["cuGraphLaunch"]
            assert len(list(session.generate(250, temperature=0.3 * turn, seed=turn))) == 250
            assert device.driver.counts["cuGraphLaunch"] == before + 250
            session.restore(capsule)
            session.prefill(range(2, 40))
            with session.fork(capsule) as twin:
                twin.prefill([1, 2, 3])
            session.rollback(session.position - 5)
            capsule.drop()
        used = device.driver.counts - start
    engine.close()
    kinds = ("Alloc", "Free", "Module", "Capture", "Create", "Destroy", "Instantiate")
    assert not [call for call in used if any(kind in call for kind in kinds)]
