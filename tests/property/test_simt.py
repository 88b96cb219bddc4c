"""Promise 1 on the raw CUDA kernels: bitwise, under random schedules of their threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on

GOLDEN = Path(__file__).parents[1] / "golden"
SEEDS = (0, 1, 2)  # 0: threads in order
PRECISIONS = ("bfloat16", *(pytest.param(p, marks=pytest.mark.slow) for p in ("high", "fast")))
Found = tuple[bytes, str]


@pytest.fixture(scope="module", params=PRECISIONS)
def engines(request: pytest.FixtureRequest) -> list[flashrt.Engine]:
    """The same model under several schedules."""
    return [
        load_on(
            lambda seed=seed: SimtDevice(request.param, seed=seed),
            GOLDEN / "tiny",
            max_positions=300,
            lanes=3,
        )
        for seed in SEEDS
    ]


def found(session: flashrt.Session) -> Found:
    return session.logits().tobytes(), session.digest()


def cold(engine: flashrt.Engine, tokens: list[int]) -> Found:
    with engine.session() as session:
        session.prefill(tokens)
        return found(session)


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_partitions_and_schedules(engines: list[flashrt.Engine], data: st.DataObject) -> None:
    """One cold prefill in order against pieces, decode and rollback under each schedule."""
    tokens = data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=100))
    expected = cold(engines[0], tokens)
    for engine in engines:
        with engine.session() as session:
            at = 0
            while at < len(tokens):
                n = data.draw(st.one_of(st.just(1), st.integers(1, len(tokens) - at)))
                session.prefill(tokens[at : at + n])
                at += n
            assert found(session) == expected
            out = list(session.generate(3, temperature=0.8, seed=5))
            assert found(session) == cold(engines[0], tokens + out)
            session.rollback(len(tokens))
            assert found(session) == expected


@given(st.data())
@settings(max_examples=4, deadline=None)
def test_any_row_bucket(engines: list[flashrt.Engine], data: st.DataObject) -> None:
    head = data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=60))
    tail = data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=8))
    engine = engines[data.draw(st.integers(0, len(engines) - 1))]
    seen = set()
    for bucket in engine.model.buckets[1:]:
        with engine.session() as session:
            session.prefill(head)
            engine.prefill(session.lane, np.array(tail, np.int32), bucket)
            seen.add(found(session))
    assert seen == {cold(engines[0], head + tail)}


@given(st.data())
@settings(max_examples=6, deadline=None)
def test_capsules_are_complete(engines: list[flashrt.Engine], data: st.DataObject) -> None:
    """Snapshot, poison all but the capsule, restore on another lane, fork, go on."""
    prefix = data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=80))
    branch = data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=20))
    engine = engines[data.draw(st.integers(0, len(engines) - 1))]
    with engine.session() as session, engine.session() as other:
        session.prefill(prefix)
        capsule = session.snapshot()
        assert capsule.digest == session.digest()
        session.prefill(branch)
        engine.arena.poison_scratch()
        engine.poison_lane(other.lane)
        other.restore(capsule)
        other.prefill(branch)
        assert found(other) == found(session) == cold(engines[0], prefix + branch)
        moves = engine.capsules.moves_to_restore(session.lane, capsule)
        assert moves.nbytes == engine.stats()["fixed_bytes"]
        session.restore(capsule)
        assert found(session) == cold(engines[0], prefix)
        capsule.drop()
    engine.capsules.check_integrity()


def test_rows_only_restore_diverges(engines: list[flashrt.Engine]) -> None:
    engine = engines[1]
    with engine.session() as session:
        session.prefill(range(1, 60))
        capsule = session.snapshot()
        expected = list(session.generate(12))
        session.prefill(range(300, 340))
        session.restore(capsule, bands=("rows",))
        assert list(session.generate(12)) != expected
        session.restore(capsule)
        assert list(session.generate(12)) == expected
        capsule.drop()


def test_a_token_is_one_graph_launch(engines: list[flashrt.Engine]) -> None:
    """Counted by the driver: nothing allocates, compiles or captures after load."""
    engine = engines[0]
    with engine.session() as session:
        session.prefill([1, 2, 3])
        assert len(list(session.generate(1))) == 1
        before = engine.stats()
        assert len(list(session.generate(200))) == 200
        after = engine.stats()
    for counter in ("allocations", "compilations", "captures"):
        assert after[counter] == before[counter]
    assert after["replays"] - before["replays"] == 200
