"""The draft head against the oracle's: rows, hidden states, logits and drafted tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.core.region import DType
from flashrt.models import model_for
from flashrt.weights.checkpoint import open_checkpoint
from tests.golden.expected import Expected, assert_close, read_expected
from tests.golden.tape_interpreter import TapeInterpreter


@pytest.fixture(scope="module")
def expected(golden_set: Path) -> Expected:
    return read_expected(golden_set)


@pytest.fixture(scope="module")
def engine(golden_set: Path, pytestconfig: pytest.Config) -> Iterator[flashrt.Engine]:
    device = pytestconfig.getoption("--device")
    engine = flashrt.load(
        golden_set, device=device, max_positions=1024, kv_dtype="float32", precision="high"
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def interpreter(expected: Expected) -> TapeInterpreter:
    """The prompt of the drafts, fed through tapes in float64."""
    checkpoint = open_checkpoint(expected.folder)
    model = model_for(
        checkpoint.config,
        max_positions=256,
        kv_dtype=DType.F32,
        has_draft_head=True,
        is_tied="lm_head.weight" not in checkpoint.tensors,
    )
    lane = TapeInterpreter(model, checkpoint)
    lane.prefill(expected.prompts[expected.draft_prompt])
    return lane


def test_drafts(engine: flashrt.Engine, expected: Expected) -> None:
    """The chain of drafts after a prompt, each from the head's own output before it."""
    with engine.session() as session:
        session.prefill(expected.prompts[expected.draft_prompt])
        first = next(iter(session.generate(1)))
        assert first == expected.greedy[expected.draft_prompt][0]
        lane, logits = session.lane, []
        for i in range(len(expected.drafts)):
            engine.draft(lane, 1 + i)  # the same drafts again, and one more
            logits.append(engine.lane_array(lane, "draft_logits")[0])
        assert_close(np.array(logits), expected.arrays["mtp.draft_logits"], "draft_logits")
        drafted = engine.lane_array(lane, "drafted")[: 1 + len(logits)]
        assert drafted.tolist() == [first, *expected.drafts]


def test_rows_and_every_slot(engine: flashrt.Engine, expected: Expected) -> None:
    """Row r of the head is slot r - 1 of the oracle; hidden state and logits slot by slot."""
    if "mtp.keys" not in expected.arrays:
        pytest.skip("this set holds drafts only")
    prompt = expected.prompts[expected.draft_prompt]
    following = [*prompt[1:], expected.greedy[expected.draft_prompt][0]]
    hidden, logits = [], []
    with engine.session() as session:
        lane = session.lane
        for token, after in zip(prompt, following, strict=True):
            session.prefill([token])
            engine.write_cursor(lane, 2, after)
            engine.draft(lane, 1)
            hidden.append(engine.lane_array(lane, "draft_hidden")[0])
            logits.append(engine.lane_array(lane, "draft_logits")[0])
        assert_close(np.array(hidden), expected.arrays["mtp.hidden"], "mtp.hidden")
        assert_close(np.array(logits), expected.arrays["mtp.logits"], "mtp.logits")
        session.prefill(following[-1:])
        for name in ("keys", "values"):
            rows = engine.lane_array(lane, f"draft_{name}")[:, 1 : len(prompt) + 1]
            assert_close(rows, expected.arrays[f"mtp.{name}"], f"mtp.{name}")


def test_rows_filled_by_prefill_are_those_of_a_draft(
    interpreter: TapeInterpreter, expected: Expected
) -> None:
    """Tapes by reference: the same chain, and rows that a prefill wrote many at a time."""
    first = int(np.argmax(interpreter.sample()))
    assert first == expected.greedy[expected.draft_prompt][0]
    lane, logits = interpreter.lane, []
    for i in range(len(expected.drafts)):
        interpreter.run(interpreter.model.record("draft_next" if i else "draft", 1))
        logits.append(lane["draft_logits"][0].copy())
    assert_close(np.array(logits), expected.arrays["mtp.draft_logits"], "draft_logits")
    assert lane["drafted"][: 1 + len(logits)].tolist() == [first, *expected.drafts]
    if "mtp.keys" in expected.arrays:
        n = len(expected.prompts[expected.draft_prompt])
        for name in ("keys", "values"):
            rows = lane[f"draft_{name}"][:, 1 : n + 1]
            assert_close(rows, expected.arrays[f"mtp.{name}"], f"mtp.{name}")


def test_verify_and_commit_are_decoding(interpreter: TapeInterpreter, expected: Expected) -> None:
    """Tapes by reference: two true tokens and a wrong one verified, two committed."""
    lane, greedy = interpreter.lane, expected.greedy[expected.draft_prompt]
    interpreter.sample()
    state = {name: array.copy() for name, array in lane.items()}
    wrong = (greedy[2] + 1) % interpreter.model.vocab_size
    lane["drafted"][:4] = [*greedy[:2], wrong, 5]
    lane["cursor"][1] = 4
    interpreter.run(interpreter.model.record("verify", 8))
    assert lane["verdict"][:3].tolist() == [2, greedy[1], greedy[2]]
    for name in ("state", "window", "last_hidden"):
        assert (lane[name] == state[name]).all()
    lane["cursor"][1] = 2
    interpreter.run(interpreter.model.record("commit", 9))
    committed = {name: array.copy() for name, array in lane.items()}
    for name, array in state.items():
        lane[name][...] = array
    interpreter.decode()
    interpreter.decode()
    assert lane["cursor"].tolist() == [*committed["cursor"][:1], 1, *committed["cursor"][2:]]
    n = int(lane["cursor"][0])
    for name in ("state", "window", "last_hidden"):
        np.testing.assert_allclose(committed[name], lane[name], rtol=1e-9, atol=1e-12)
    for name in ("journal", "keys", "values", "draft_keys", "draft_values"):
        rows = (committed[name][:, :n], lane[name][:, :n])
        np.testing.assert_allclose(*rows, rtol=1e-9, atol=1e-12)
