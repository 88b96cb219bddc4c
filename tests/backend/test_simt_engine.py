"""A whole model on the simt device: one graph per token, the same bits at any split and schedule.

The raw CUDA kernels, capture, staging and copies of the CUDA backend run here, from checkpoint to
tokens; the tiny golden model keeps it quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashrt.backends.simt.device import SimtDevice
from flashrt.load import Precision, load_on
from flashrt.session.engine import SessionEngine

CHECKPOINT = Path(__file__).parents[1] / "golden" / "tiny"
N_TOKENS = 39  # over buckets, granules and mma tiles, on none of their boundaries
SCHEDULES = (0, 1, 2)  # 0: threads and blocks in order


def load(device: SimtDevice, max_positions: int = 128) -> SessionEngine:
    return load_on(lambda: device, CHECKPOINT, max_positions=max_positions, lanes=2, draft=False)


def prompt(engine: SessionEngine) -> list[int]:
    rng = np.random.default_rng(11)
    return rng.integers(0, engine.vocab_size, N_TOKENS).tolist()


@pytest.fixture(scope="module", params=["bfloat16", "high"])
def precision(request: pytest.FixtureRequest) -> Precision:
    chosen: Precision = request.param
    return chosen


@pytest.fixture(scope="module")
def expected(precision: Precision) -> tuple[str, bytes, list[int]]:
    """Digest, logits and the next tokens after a prefill in one piece, in order."""
    engine = load(SimtDevice(precision))
    with engine.session() as session:
        session.prefill(prompt(engine))
        found = session.digest(), session.logits().tobytes(), list(session.generate(6))
    engine.close()
    return found


@pytest.fixture(scope="module", params=SCHEDULES)
def engine(request: pytest.FixtureRequest, precision: Precision) -> Iterator[SessionEngine]:
    # 108 multiprocessors choose smaller tiles than 16 do: another geometry, the same bits
    device = SimtDevice(
        precision, seed=request.param, multiprocessors=16 + 92 * (request.param % 2)
    )
    engine = load(device)
    yield engine
    engine.close()


@pytest.mark.parametrize("cuts", [(), (1, 2, 3), (8, 17), (32, 33), tuple(range(1, N_TOKENS))])
def test_any_split_gives_the_same_bits(
    engine: SessionEngine, expected: tuple[str, bytes, list[int]], cuts: tuple[int, ...]
) -> None:
    with engine.session() as session:
        for part in np.split(np.array(prompt(engine)), cuts):
            session.prefill(part)
        assert session.digest() == expected[0]
        assert session.logits().tobytes() == expected[1]
        assert list(session.generate(6)) == expected[2]


def test_capsules_bring_back_every_bit(
    engine: SessionEngine, expected: tuple[str, bytes, list[int]]
) -> None:
    tokens = prompt(engine)
    with engine.session() as session:
        session.prefill(tokens)
        capsule = session.snapshot()
        assert list(session.generate(6, temperature=0.9, seed=1)) is not None
        session.restore(capsule)
        assert session.digest() == expected[0]
        with session.fork(capsule) as twin:
            assert list(twin.generate(6)) == expected[2]
        session.rollback(20)
        session.prefill(tokens[20:])
        assert session.logits().tobytes() == expected[1]
        capsule.drop()


def test_no_kernel_races(precision: Precision, expected: tuple[str, bytes, list[int]]) -> None:
    """The race detector watches every kernel of a prefill, a decode and a capsule."""
    engine = load(SimtDevice(precision, seed=5, is_watched=True))
    with engine.session() as session:
        session.prefill(prompt(engine))
        capsule = session.snapshot()
        assert list(session.generate(2)) == expected[2][:2]
        session.restore(capsule)
        assert session.digest() == expected[0]
    engine.close()


@pytest.mark.slow
def test_a_thousand_tokens_ask_the_driver_for_nothing_but_graphs() -> None:
    device = SimtDevice()
    engine = load(device, max_positions=1100)
    with engine.session() as session:
        session.prefill([1, 2, 3])
        before, counters = device.driver.counts.copy(), engine.stats()
        assert len(list(session.generate(1000))) == 1000
        used = device.driver.counts - before
        after = engine.stats()
    engine.close()
    assert used["cuGraphLaunch"] == 1000
    per_token = {
        "cuGraphLaunch", "cuMemcpyDtoDAsync", "cuEventRecord", "cuEventSynchronize",
    }  # fmt: skip
    # Beside these only the few copies of waypoints and of the sampler's parameters.
    assert sum(n for call, n in used.items() if call not in per_token) < 100
    assert not [c for c in used if "Alloc" in c or "Module" in c or "Capture" in c or "Create" in c]
    for name in ("allocations", "compilations", "captures"):
        assert after[name] == counters[name]
