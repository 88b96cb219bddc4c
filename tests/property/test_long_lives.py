"""Long lives: what was dropped is free, pools do not silt up, memory stays flat.

Red when a capsule keeps dropped ancestors alive, when an agent that keeps its newest capsule meets
PoolFull, when free bytes in pieces are of no use, or when merging or moving changes a byte.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flashrt
from flashrt.backends.cpu import device
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


class Soak:
    """Three agents that keep their newest capsule only, and three users who do anything, on one
    engine whose pool is too small for all that they would like to keep.
    """

    def __init__(self, engine: flashrt.Engine, seed: int) -> None:
        self.engine, self.choose = engine, random.Random(seed)
        self.agents = [engine.session() for _ in range(3)]
        self.newest: list[flashrt.Capsule | None] = [None] * 3
        self.users = [engine.session() for _ in range(3)]
        self.kept: dict[flashrt.Capsule, str] = {}
        self.n_full = self.n_checked = 0
        self.verbs: list[Callable[[int], None]] = [
            self.agent, self.agent, self.prefill, self.generate, self.snapshot, self.snapshot,
            self.restore, self.rollback, self.fork, self.drop, self.renew,
        ]  # fmt: skip

    def run(self, n_operations: int) -> None:
        """So many operations, each of somebody."""
        for _ in range(n_operations):
            self.choose.choice(self.verbs)(self.choose.randrange(3))

    def rest(self) -> tuple[int, int]:
        """Nothing is kept and all are at the beginning; objects, and bytes of the process, then."""
        for capsule in [*self.kept, *(c for c in self.newest if c is not None)]:
            capsule.drop()
        self.kept.clear()
        self.newest = [None] * 3
        for session in [*self.agents, *self.users]:
            session.rollback(0)
        self.engine.capsules.check_integrity()
        assert self.engine.capsules.pool.used_nbytes == 0
        assert len(self.engine.free_lanes) == 1
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(gc.get_objects()), pages * os.sysconf("SC_PAGE_SIZE")

    def agent(self, i: int) -> None:
        """A turn of somebody who needs no capsule but the newest."""
        session = self.agents[i]
        if session.position > 360:
            session.rollback(self.choose.randrange(20))
        session.prefill(self.some_tokens())
        made = self.snapshot_of(session)
        if made is not None:
            if (before := self.newest[i]) is not None:
                before.drop()
            self.newest[i] = made

    def prefill(self, i: int) -> None:
        if self.users[i].position < 340:
            self.users[i].prefill(self.some_tokens())

    def generate(self, i: int) -> None:
        session = self.users[i]
        if 0 < session.position < 380:
            list(session.generate(self.choose.randint(1, 6), temperature=0.7, seed=i))

    def snapshot(self, i: int) -> None:
        made = self.snapshot_of(self.users[i])
        if made is not None:
            self.kept[made] = made.digest

    def restore(self, i: int) -> None:
        if self.kept:
            capsule = self.choose.choice(list(self.kept))
            self.users[i].restore(capsule)
            self.n_checked += 1
            assert self.users[i].digest() == self.kept[capsule]

    def rollback(self, i: int) -> None:
        self.users[i].rollback(self.choose.randint(0, self.users[i].position))

    def fork(self, i: int) -> None:
        with self.users[i].fork(self.choose.choice([None, *self.kept])) as twin:
            twin.prefill([1, 2, 3][: 399 - twin.position])

    def drop(self, i: int) -> None:
        if self.kept:
            capsule = self.choose.choice(list(self.kept))
            capsule.drop()
            del self.kept[capsule]

    def renew(self, i: int) -> None:
        self.users[i].close()
        self.users[i] = self.engine.session()

    def snapshot_of(self, session: flashrt.Session) -> flashrt.Capsule | None:
        """None where the pool is full: then what nobody needs is less than was asked for."""
        try:
            return session.snapshot()
        except flashrt.PoolFull:
            self.n_full += 1
            assert not any(lane.waypoints for lane in self.engine.lanes)
            assert self.engine.capsules.pool.free_nbytes < asked_for(self.engine, session)
            return None

    def some_tokens(self) -> list[int]:
        return [self.choose.randrange(512) for _ in range(self.choose.choice((1, 2, 5, 20)))]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="nothing tells its memory here")
def test_a_soak(
    roomy: flashrt.Engine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--operations`, 100,000 by hand. Red when something is kept of what was dropped (objects or
    bytes after a quarter, and at the end), when a pool with room is called full, or when a capsule
    brings another state back.
    """
    n: int = request.config.getoption("--operations")
    whole = one_capsule_nbytes(roomy, 399)
    # Many small replays: two threads on shared cores would wait for each other most of the time.
    monkeypatch.setattr(device, "thread_count", lambda: 1)
    with load(8 * whole, lanes=7) as engine:
        soak = Soak(engine, seed=n)
        soak.run(n // 4)
        objects, nbytes = soak.rest()
        soak.run(n - n // 4)
        objects_after, nbytes_after = soak.rest()
        print(
            f"{n} operations: {objects} objects, then {objects_after}; {nbytes} bytes, then "
            f"{nbytes_after}; full {soak.n_full} times, {soak.n_checked} digests"
        )
        assert soak.n_full > n / 1000
        assert objects_after < 1.02 * objects
        assert nbytes_after < 1.02 * nbytes
