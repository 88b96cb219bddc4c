"""What snapshots store and restores move: asserted on the bytes of copy plans."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.core.copyplan import Copy, CopyPlan

GOLDEN = Path(__file__).parents[1] / "golden"


def test_back_to_a_16k_prefix_moves_no_rows() -> None:
    engine = flashrt.load(
        GOLDEN / "tiny", device="cpu", max_positions=16_700, lanes=2, pool_bytes=64 << 20
    )
    fixed = engine.stats()["fixed_bytes"]
    session = engine.session()
    session.prefill(np.arange(16_384) % 512)
    prefix = session.snapshot("prefix")
    digest = session.digest()
    rows = prefix.nbytes - fixed
    assert rows > 16_384 * 2 * 2 * 32 * 2  # keys and values, 2 heads of 32, bfloat16, one layer

    list(session.generate(100))
    plan = engine.capsules.plan_restore(session._lane, prefix)
    assert plan.nbytes == fixed
    session.restore(prefix)
    assert session.digest() == digest

    with engine.session() as other:  # a lane that holds nothing gets all of it
        assert engine.capsules.plan_restore(other._lane, prefix).nbytes == prefix.nbytes

    used = engine.stats()["pool_used_bytes"]
    branches = []
    for token in range(8):  # N branches store the prefix once
        session.restore(prefix)
        session.prefill([token] * 20)
        branches.append(session.snapshot(f"branch {token}"))
    assert all(b.parent is prefix for b in branches)
    own = engine.stats()["pool_used_bytes"] - used
    waypoints = len(session._lane.waypoints) * fixed
    assert own <= sum(b.nbytes for b in branches) + waypoints
    assert sum(b.nbytes - fixed for b in branches) < rows / 20

    plan = engine.capsules.plan_restore(session._lane, branches[0])  # sibling: own rows only
    assert fixed < plan.nbytes <= branches[0].nbytes
    session.restore(branches[0])
    prefix.drop()  # descendants keep the rows
    assert session.tokens[-1] == 0
    with engine.session() as other:
        other.restore(branches[3])
        other.prefill([1])
        session.restore(branches[3])
        session.prefill([1])
        assert other.digest() == session.digest()


def test_ping_pong_between_ancestor_and_descendant_moves_no_rows(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    fixed = engine.stats()["fixed_bytes"]
    session.prefill(range(100))
    parent = session.snapshot()
    session.prefill(range(100, 150))
    child = session.snapshot()
    for capsule in (parent, child, parent, child):
        assert engine.capsules.plan_restore(session._lane, capsule).nbytes == fixed
        session.restore(capsule)
        assert session.digest() == capsule.digest
    session.restore(parent)
    session.prefill([7])  # overwrites a row of the child
    assert engine.capsules.plan_restore(session._lane, child).nbytes > fixed
    session.restore(child)
    assert session.digest() == child.digest


def test_a_second_snapshot_at_the_same_boundary_shares_all_rows(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    session.prefill(range(64))
    first, second = session.snapshot(), session.snapshot()
    assert second.nbytes == engine.stats()["fixed_bytes"] < first.nbytes
    first.drop()
    first.drop()
    session.rollback(0)
    session.restore(second)
    assert session.position == 64


def test_a_full_pool_refuses_and_changes_nothing(engine: flashrt.Engine) -> None:
    fixed = engine.stats()["fixed_bytes"]
    small = flashrt.load(
        GOLDEN / "tiny", device="cpu", max_positions=400, pool_bytes=fixed + 130_000
    )
    session = small.session()
    session.prefill(range(200))
    first = session.snapshot()  # waypoints made room for it
    list(session.generate(5))
    digest, used = session.digest(), small.stats()["pool_used_bytes"]
    with pytest.raises(flashrt.PoolFull, match="pool_bytes"):
        session.snapshot()
    assert (session.digest(), small.stats()["pool_used_bytes"]) == (digest, used)
    first.drop()
    session.snapshot()
    small.capsules.check_integrity()


def test_rollback_uses_the_nearest_boundary(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    session.prefill(range(390))
    before = engine.stats()["replays"]
    session.rollback(385)
    assert engine.stats()["replays"] - before <= 2
    session.rollback(130)
    assert session.tokens.tolist() == list(range(130))


def test_forks_share_and_part(engine: flashrt.Engine, session: flashrt.Session) -> None:
    session.prefill(range(120))
    capsule = session.snapshot()
    twin = session.fork()
    assert twin.digest() == session.digest()
    assert list(twin.generate(5)) == list(session.generate(5))
    twin.prefill([1])
    session.prefill([2])
    assert twin.digest() != session.digest()
    third = twin.fork(capsule)
    assert third.digest() == capsule.digest
    with pytest.raises(flashrt.LaneBusy, match="3 lanes"):
        session.fork()
    twin.close()
    third.close()


def test_copies_are_checked_before_they_run() -> None:
    with pytest.raises(flashrt.FlashrtError, match="under the width"):
        CopyPlan((Copy(0, 0, width=8, height=2, src_pitch=4, dst_pitch=8),)).check(100)
    with pytest.raises(flashrt.FlashrtError, match="leaves 100 bytes"):
        CopyPlan((Copy(0, 90, 20),)).check(100)


def test_a_granule_is_copied_from_one_segment_only(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    for stop in (50, 101, 170):  # boundaries inside granules of 32
        session.prefill(range(session.position, stop))
        leaf = session.snapshot()
    with engine.session() as other:
        engine.poison_lane(other._lane)
        plan = engine.capsules.plan_restore(other._lane, leaf)
        written = [
            (c.dst + i * c.dst_pitch, c.dst + i * c.dst_pitch + c.width)
            for c in plan
            for i in range(c.height)
        ]
        written.sort()
        assert len(plan.copies) > 7  # fixed, and three segments of three row regions
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(written))
        other.restore(leaf)
        assert other.digest() == session.digest()


def test_waypoints_of_another_history_are_forgotten(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    session.prefill(range(200))
    ones = session.snapshot()
    session.rollback(10)
    for _ in range(10):  # waypoints of this history lie elsewhere than those of `ones`
        session.prefill([7] * 19)
    assert session._lane.waypoints
    session.restore(ones)
    session.rollback(190)
    with engine.session() as oracle:
        oracle.prefill(range(190))
        assert session.digest() == oracle.digest()


def test_a_fork_holds_only_the_rows_it_copied(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    session.prefill(range(100))
    parent = session.snapshot()
    session.prefill(range(100, 180))
    child = session.snapshot()
    session.restore(parent)  # the lane still holds the child's rows, beyond its position
    engine.poison_lane(engine._free[-1])  # no rows of an earlier session by luck
    with session.fork() as twin:
        twin.restore(child)
        assert twin.digest() == child.digest


def test_parents_follow_the_session(session: flashrt.Session) -> None:
    session.prefill(range(50))
    first = session.snapshot()
    session.prefill(range(50))
    second = session.snapshot()
    assert (first.parent, second.parent) == (None, first)
    session.rollback(70)
    assert session.snapshot().parent is first
    session.rollback(20)
    assert session.snapshot().parent is None
