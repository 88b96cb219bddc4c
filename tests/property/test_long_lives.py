"""Long lives: what was dropped is free, pools do not silt up, memory stays flat.

Red when a capsule keeps dropped ancestors alive, when an agent that keeps its newest capsule meets
PoolFull, when free bytes in pieces are of no use, or when merging or moving changes a byte.
"""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashrt
from flashrt.capsule.lineage import segment_layout
from flashrt.core.planner import align

GOLDEN = Path(__file__).parents[1] / "golden"


def load(pool_bytes: int | None = None, lanes: int = 2) -> flashrt.Engine:
    return flashrt.load(
        GOLDEN / "tiny", device="cpu", max_positions=400, lanes=lanes, pool_bytes=pool_bytes
    )


def one_capsule_nbytes(engine: flashrt.Engine, position: int) -> int:
    with engine.session() as session:
        session.prefill(range(position))
        capsule = session.snapshot()
        nbytes = capsule.nbytes
        capsule.drop()
    return nbytes


@pytest.fixture(scope="module")
def roomy() -> Iterator[flashrt.Engine]:
    with load(lanes=3) as engine:
        yield engine


def test_dropped_capsules_are_gone(roomy: flashrt.Engine) -> None:
    with roomy.session() as session:
        for i in range(300):
            session.prefill([i])
            session.snapshot().drop()
        first = session.snapshot("first")
        for i in range(16):
            session.prefill([i])
            newest = session.snapshot()
            if i % 2:
                newest.drop()
        gc.collect()
        made = [o for o in gc.get_objects() if isinstance(o, flashrt.Capsule)]
        assert len([c for c in made if c.owner is roomy.capsules]) <= 1 + 8 + 2
        assert newest.parent is not None
        for capsule in list(roomy.capsules.capsules):
            if capsule is not first:
                capsule.drop()
        last = session.snapshot()
        assert last.parent is first
        first.drop()
        assert last.parent is None
        last.drop()
    assert roomy.capsules.pool.used_nbytes == 0


def test_an_agent_that_keeps_its_newest_capsule_never_meets_a_full_pool(
    roomy: flashrt.Engine,
) -> None:
    """Room for two capsules of the longest history: the newest, and the one after it."""
    whole = one_capsule_nbytes(roomy, 399)
    with load(2 * whole + 4096) as engine, engine.session() as session:
        newest: flashrt.Capsule | None = None
        for i in range(399):
            session.prefill([(i * 7) % 512])
            made = session.snapshot()
            if newest is not None:
                newest.drop()
            newest = made
            engine.capsules.check_integrity()
        assert newest is not None
        digest = newest.digest
        session.rollback(100)
        session.restore(newest)
        assert session.digest() == digest
        with roomy.session() as cold:
            cold.prefill(newest.tokens)
            assert cold.digest() == digest


@pytest.mark.parametrize("seed", range(4))
def test_a_full_pool_is_full(roomy: flashrt.Engine, seed: int) -> None:
    """PoolFull only where the bytes that no capsule needs are fewer than asked for."""
    choose = random.Random(seed)
    fixed = roomy.stats()["fixed_bytes"]
    with load(9 * fixed + 200_000, lanes=3) as engine:
        sessions = [engine.session() for _ in range(3)]
        known: dict[flashrt.Capsule, str] = {}
        n_full = 0
        for step in range(250):
            session = choose.choice(sessions)
            if session.position > 300:
                session.rollback(choose.randrange(40))
            session.prefill([choose.randrange(512) for _ in range(choose.choice((1, 3, 9, 40)))])
            if known and choose.random() < 0.3:
                capsule = choose.choice(sorted(known, key=lambda c: c.position))
                capsule.drop()
                del known[capsule]
            elif known and choose.random() < 0.2:
                session.restore(choose.choice(sorted(known, key=lambda c: c.position)))
            try:
                made = session.snapshot()
                known[made] = made.digest
            except flashrt.PoolFull:
                n_full += 1
                assert all(not s.lane.waypoints for s in sessions)
                assert engine.capsules.pool.free_nbytes < asked_for(engine, session)
            engine.capsules.check_integrity()
            if step % 25 == 0:
                for capsule, digest in known.items():
                    assert capsule.digest == digest
        assert n_full > 5
        for capsule, digest in known.items():
            sessions[0].restore(capsule)
            assert sessions[0].digest() == digest


def asked_for(engine: flashrt.Engine, session: flashrt.Session) -> int:
    """Bytes that a snapshot needs: a fixed band, and rows from the nearest capsule below."""
    base = session.lane.base(session.position)
    start = 0 if base is None else base.stop
    rows = engine.arena.lane(0).rows
    nbytes = segment_layout(rows, start, session.position)[1] if session.position > start else 0
    return align(engine.capsules.fixed_nbytes) + align(nbytes)


@pytest.mark.slow
def test_memory_is_flat(roomy: flashrt.Engine) -> None:
    """Objects after a quarter of a long run, and at its end."""
    choose = random.Random(7)
    whole = one_capsule_nbytes(roomy, 399)
    counts = []
    with load(6 * whole) as engine:
        session, newest = engine.session(), None
        for step in itertools.count():
            if session.position > 380:
                session.rollback(0)
            session.prefill([choose.randrange(512)])
            made = session.snapshot()
            if newest is not None:
                newest.drop()
            newest = made
            if step % 10 == 0:
                with session.fork() as twin:
                    list(twin.generate(2))
            if step in (2000, 8000):
                gc.collect()
                counts.append(len(gc.get_objects()))
            if step == 8000:
                break
    assert counts[1] < 1.02 * counts[0]
