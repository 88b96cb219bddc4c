"""Exactness on hardware: the same bits at any split, in decode and in prefill, from any capsule.

The property suite proves this on cpu and simt; here the GPU answers, on a tiny model with every
kind of layer and on a real shape with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashrt.backends.cuda.device import Precision, open_device
from flashrt.commands.bench.gpu.engine import load_synthetic
from flashrt.load import load_on
from flashrt.session.engine import SessionEngine

TINY = Path(__file__).parents[1] / "golden" / "tiny"
FEW_CUTS = [(1,), (8, 17), (256,), (31, 32, 33, 290)]

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["tiny bfloat16", "tiny high", "0.8b bfloat16"])
def engine(request: pytest.FixtureRequest) -> Iterator[SessionEngine]:
    model, precision = request.param.split()
    made = _load(model, precision)
    yield made
    made.close()


def _load(model: str, precision: Precision) -> SessionEngine:
    if model == "tiny":
        return load_on(
            lambda: open_device(precision), TINY, max_positions=512, lanes=2, draft=False
        )
    return load_synthetic(lambda: open_device(precision), model, max_positions=512).engine


@pytest.fixture(scope="module")
def prompt(engine: SessionEngine) -> np.ndarray:
    return np.random.default_rng(11).integers(0, engine.vocab_size, 300).astype(np.int32)


@pytest.fixture(scope="module")
def expected(engine: SessionEngine, prompt: np.ndarray) -> tuple[str, bytes, list[int]]:
    """Digest, logits and the next tokens after a prefill in one piece."""
    with engine.session() as session:
        session.prefill(prompt)
        return session.digest(), session.logits().tobytes(), list(session.generate(8))


@pytest.mark.parametrize("cuts", [*FEW_CUTS, tuple(range(1, 300))], ids=lambda c: f"{len(c)} cuts")
def test_any_split_gives_the_same_bits(
    engine: SessionEngine,
    prompt: np.ndarray,
    expected: tuple[str, bytes, list[int]],
    cuts: tuple[int, ...],
) -> None:
    with engine.session() as session:
        for part in np.split(prompt, cuts):
            session.prefill(part)
        assert session.logits().tobytes() == expected[1]
        assert session.digest() == expected[0]
        assert list(session.generate(8)) == expected[2]


def test_what_decode_wrote_prefill_would_have_written(
    engine: SessionEngine, prompt: np.ndarray, expected: tuple[str, bytes, list[int]]
) -> None:
    with engine.session() as session:
        session.prefill(prompt)
        generated = list(session.generate(40, temperature=0.8, seed=3))
        by_decode = session.digest(), session.logits().tobytes()
    with engine.session() as session:
        session.prefill(np.append(prompt, generated))
        assert (session.digest(), session.logits().tobytes()) == by_decode
    assert by_decode[0] != expected[0]


def test_capsules_bring_back_every_bit(
    engine: SessionEngine, prompt: np.ndarray, expected: tuple[str, bytes, list[int]]
) -> None:
    with engine.session() as session:
        session.prefill(prompt)
        capsule = session.snapshot()
        list(session.generate(20, temperature=1.0, seed=1))
        session.restore(capsule)
        assert session.digest() == expected[0]
        with session.fork(capsule) as twin:
            assert list(twin.generate(8)) == expected[2]
        session.rollback(123)
        session.prefill(prompt[123:])
        assert session.logits().tobytes() == expected[1]
        engine.poison_lane(engine.lanes[0])
        engine.poison_lane(engine.lanes[1])
        session.restore(capsule)
        assert list(session.generate(8)) == expected[2]
        capsule.drop()


def test_two_runs_of_one_process_agree(
    engine: SessionEngine, prompt: np.ndarray, expected: tuple[str, bytes, list[int]]
) -> None:
    """Nothing depends on which block finished first."""
    for _ in range(5):
        with engine.session() as session:
            session.prefill(prompt)
            assert session.logits().tobytes() == expected[1]


def test_no_kernel_writes_past_its_region(engine: SessionEngine) -> None:
    engine.backend.sync()
    engine.arena.check_guards()


def test_a_thousand_tokens_ask_the_driver_for_nothing_but_graphs() -> None:
    device = open_device()
    engine = load_on(lambda: device, TINY, max_positions=1100, draft=False)
    with engine.session() as session:
        session.prefill([1, 2, 3])
        before, counters = device.driver.counts.copy(), engine.stats()
        assert len(list(session.generate(1000))) == 1000
        used = device.driver.counts - before
        after = engine.stats()
    engine.close()
    assert used["cuGraphLaunch"] == 1000
    assert used["cuMemcpyDtoHAsync"] < 100, "tokens are sent by their replays"
    assert not [c for c in used if "Alloc" in c or "Module" in c or "Capture" in c or "Create" in c]
    for name in ("allocations", "compilations", "captures"):
        assert after[name] == counters[name]


@pytest.mark.parametrize("precision", ["bfloat16", "high"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafting_changes_nothing_but_speed(precision: Precision, temperature: float) -> None:
    engine = load_on(lambda: open_device(precision), TINY, max_positions=256, lanes=1, draft=True)
    found = set()
    with engine.session() as session:
        for draft in (0, 1, 2, 4, 8):
            session.rollback(0)
            session.prefill(range(40))
            tokens = [*session.generate(60, temperature=temperature, seed=3, draft=draft)]
            found.add((*tokens, session.logits().tobytes(), session.digest()))
    drafted = engine.stats()["drafted"]
    engine.close()
    assert drafted > 0
    assert len(found) == 1
