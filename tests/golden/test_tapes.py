"""The model declaration against Hugging Face: recorded tapes, run by the reference of each op."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrt.core.region import DType
from flashrt.models import Model, model_for
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from tests.golden.expected import Expected, assert_close, assert_states, read_expected
from tests.golden.tape_interpreter import TapeInterpreter


@pytest.fixture(scope="module")
def parts(golden_set: Path) -> tuple[Expected, Checkpoint, Model]:
    checkpoint = open_checkpoint(golden_set)
    model = model_for(
        checkpoint.config,
        max_positions=1024,
        kv_dtype=DType.F32,
        is_tied="lm_head.weight" not in checkpoint.tensors,
    )
    return read_expected(golden_set), checkpoint, model


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param(1, id="5 tokens"),
        pytest.param(3, id="65 tokens"),
        pytest.param(5, id="777 tokens", marks=pytest.mark.slow),
    ],
)
def test_prefill_then_decode(parts: tuple[Expected, Checkpoint, Model], prompt: int) -> None:
    expected, checkpoint, model = parts
    lane = TapeInterpreter(model, checkpoint)
    lane.prefill(expected.prompts[prompt])
    assert_close(lane.sample(), expected.arrays["logits_last"][prompt], "logits_last")
    tokens, logits = lane.greedy(48)
    assert tokens == expected.greedy[prompt]
    assert_close(logits, expected.arrays["greedy_logits_last"][prompt], "greedy_logits_last")


def test_states_after_prefill(parts: tuple[Expected, Checkpoint, Model]) -> None:
    expected, checkpoint, model = parts
    if expected.cache_prompt is None:
        pytest.skip("this set holds no states")
    lane = TapeInterpreter(model, checkpoint)
    lane.prefill(expected.prompts[expected.cache_prompt])
    assert_states(lane.lane, expected)
