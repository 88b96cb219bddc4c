"""Promise 1 with keys and values of one byte: bitwise, however tokens came to be committed.

The cases are those of test_exact, on a dense decoder and on a hybrid whose draft head has rows too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt
from tests import dense_models
from tests.property.test_exact import (
    cold,
    fingerprint_of,
    test_any_partition_of_a_prompt,
    test_poison_then_restore_is_complete,
    test_rollback_to_any_position,
)

__all__ = [
    "test_any_partition_of_a_prompt",
    "test_poison_then_restore_is_complete",
    "test_rollback_to_any_position",
]
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=["int8", "float8"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[flashrt.Engine]:
    folder = GOLDEN / "tiny"
    if request.param == "float8":
        folder = dense_models.write(
            tmp_path_factory.mktemp("dense") / "qwen3", dense_models.CONFIGS["qwen3"]
        )
    engine = flashrt.load(folder, device="cpu", max_positions=640, lanes=4, kv_dtype=request.param)
    yield engine
    engine.close()


def test_a_capsule_holds_codes_and_scales(engine: flashrt.Engine, tmp_path: Path) -> None:
    """Red when the scales of rows are not rows, or a file of a capsule lacks them."""
    history = list(range(1, 290))
    with engine.session() as session:
        session.prefill(history)
        session.snapshot().save(tmp_path / "state.frt")
        session.prefill(range(300, 320))
        engine.poison_lane(session.lane)
        session.restore(engine.load_capsule(tmp_path / "state.frt"))
        assert fingerprint_of(session) == cold(engine, history)


def test_drafts_are_those_of_decoding() -> None:
    """Red when the draft head's rows have no scales of their own."""
    engine = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=300, kv_dtype="float8")
    with engine.session() as session:
        session.prefill(range(1, 60))
        capsule = session.snapshot()
        plain = list(session.generate(24))
        session.restore(capsule)
        assert list(session.generate(24, draft=3)) == plain
        assert engine.stats()["verifies"] > 0
        drafted = fingerprint_of(session)
        session.restore(capsule)
        session.prefill(plain)
        assert fingerprint_of(session) == drafted
    engine.close()


@pytest.mark.parametrize("device", ["cpu", "simt"])
@pytest.mark.parametrize("kv_dtype", ["int8", "float8"])
def test_logits_are_near_those_of_float32(kv_dtype: str, device: str, tmp_path: Path) -> None:
    """Red when a device multiplies codes by something else than their scale, or when the result
    depends on the pieces that a prompt came in.
    """
    folder = dense_models.write(tmp_path / "llama", dense_models.CONFIGS["llama"])
    tokens, found = [(5 * i * i + i) % dense_models.VOCAB for i in range(70)], []
    for kv in ("float32", kv_dtype):
        engine = flashrt.load(folder, device, max_positions=300, kv_dtype=kv, precision="high")
        with engine.session() as session:
            session.prefill(tokens[:64])
            session.prefill(tokens[64:])
            found.append(session.logits())
            at_once = fingerprint_of(session)
        with engine.session() as session:
            for start, stop in ((0, 1), (1, 9), (9, 70)):
                session.prefill(tokens[start:stop])
            assert fingerprint_of(session) == at_once
        engine.close()
    error = np.sqrt(np.mean((found[1] - found[0]) ** 2) / np.mean(found[0] ** 2))
    assert 1e-4 < error < {"int8": 0.03, "float8": 0.1}[kv_dtype]
