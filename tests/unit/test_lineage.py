"""What snapshots store and restores move: asserted on the bytes of copy lists."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.capsule.extent import Extent, HostBytes
from flashrt.capsule.restore import read_moves
from flashrt.core.copylist import Copy, CopyList

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
    moves = engine.capsules.moves_to_restore(session.lane, prefix)
    assert moves.nbytes == fixed
    session.restore(prefix)
    assert session.digest() == digest

    with engine.session() as other:  # a lane that holds nothing gets all of it
        assert engine.capsules.moves_to_restore(other.lane, prefix).nbytes == prefix.nbytes

    used = engine.stats()["pool_used_bytes"]
    branches = []
    for token in range(8):  # N branches store the prefix once
        session.restore(prefix)
        session.prefill([token] * 20)
        branches.append(session.snapshot(f"branch {token}"))
    assert all(b.parent is prefix for b in branches)
    own = engine.stats()["pool_used_bytes"] - used
    waypoints = len(session.lane.waypoints) * fixed
    assert own <= sum(b.nbytes for b in branches) + waypoints
    assert sum(b.nbytes - fixed for b in branches) < rows / 20

    moves = engine.capsules.moves_to_restore(session.lane, branches[0])  # sibling: own rows only
    assert fixed < moves.nbytes <= branches[0].nbytes
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
        assert engine.capsules.moves_to_restore(session.lane, capsule).nbytes == fixed
        session.restore(capsule)
        assert session.digest() == capsule.digest
    session.restore(parent)
    session.prefill([7])  # overwrites a row of the child
    assert engine.capsules.moves_to_restore(session.lane, child).nbytes > fixed
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
        CopyList((Copy(0, 0, width=8, height=2, src_pitch=4, dst_pitch=8),)).check(100)
    with pytest.raises(flashrt.FlashrtError, match="leaves 100 bytes"):
        CopyList((Copy(0, 90, 20),)).check(100)


def test_a_granule_is_copied_from_one_segment_only(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    for stop in (50, 101, 170):  # boundaries inside granules of 32
        session.prefill(range(session.position, stop))
        leaf = session.snapshot()
    with engine.session() as other:
        engine.poison_lane(other.lane)
        moves = engine.capsules.moves_to_restore(other.lane, leaf)
        written = [
            (c.dst + i * c.dst_pitch, c.dst + i * c.dst_pitch + c.width)
            for c in moves
            for i in range(c.height)
        ]
        written.sort()
        assert len(moves.copies) > 7  # fixed, and three segments of three row regions
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(written))
        other.restore(leaf)
        assert other.digest() == session.digest()


def test_copies_that_collide_are_refused() -> None:
    """Red while overlap was checked nowhere: two heads' rows of one region, one row too wide; a
    copy onto itself; and in other memory, where a source may be anywhere.
    """
    rows = [Copy(1000, 0, 30, 2, 30, 60), Copy(1100, 30, 30, 2, 30, 60)]
    CopyList(rows).check(2000)
    wide = [rows[0], rows[1]._replace(dst=29)]
    with pytest.raises(flashrt.FlashrtError, match="write the same bytes"):
        CopyList(wide).check(2000)
    with pytest.raises(flashrt.FlashrtError, match="writes what"):
        CopyList([Copy(10, 19, 10)]).check(2000)
    CopyList([Copy(10, 19, 10)]).check(2000, 2000)


def test_a_restore_from_several_tiers_does_not_collide(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    """Red when uploads are checked apart from copies within the device."""
    session.prefill([1])
    capsule = session.snapshot()
    plan = engine.arena.lane(0)
    at, n = plan.fixed.offset, capsule.fixed.nbytes
    image = HostBytes(n, lambda: np.zeros(n, np.uint8))
    parts = [(capsule.fixed, [Copy(0, at, n)]), (Extent(n, image), [Copy(0, at + n - 1, 8)])]
    with pytest.raises(flashrt.FlashrtError, match="write the same bytes"):
        read_moves(engine.arena, parts, 0)


def test_a_fork_clears_nothing_before_it_copies(
    engine: flashrt.Engine, session: flashrt.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red while a new lane was filled with zeros, region by region, and then overwritten."""
    session.prefill(range(30))
    capsule = session.snapshot()
    filled: list[int] = []
    fill = engine.backend.fill
    monkeypatch.setattr(engine.backend, "fill", lambda *a: (filled.append(a[1]), fill(*a))[1])
    before = engine.stats()
    twin, third = session.fork(), session.fork(capsule)
    after = engine.stats()
    assert filled == []
    assert after["copies"] - before["copies"] == 2  # a fork is one batch
    assert twin.digest() == third.digest() == session.digest()
    twin.close()
    third.close()


@pytest.mark.parametrize("is_poisoned", [False, True])
@pytest.mark.parametrize("how", ["fork", "restore"])
def test_a_lane_is_put_right_whatever_was_in_it(
    engine: flashrt.Engine, session: flashrt.Session, how: str, is_poisoned: bool
) -> None:
    """Its history, waypoints and held rows were those of a longer history that shares a prefix.

    Red when a fork or restore leans on a reset before: waypoints or a journal that are kept, or
    rows that are taken for held.
    """
    session.prefill(range(100))
    capsule = session.snapshot()
    with engine.session() as other:
        other.restore(capsule)
        other.rollback(60)
        for token in range(40):  # rows and waypoints of another history, from 60 on
            other.prefill([token] * 5)
        assert other.lane.waypoints[-1].position > 100 > 60
        if is_poisoned:
            engine.poison_lane(other.lane)
        if how == "fork":
            engine.capsules.fork(session.lane, other.lane)
        else:
            engine.capsules.restore(other.lane, capsule)
        engine.forget_host_view(other.lane)
        engine.capsules.check_integrity()
        lane = other.lane
        assert all(w.position <= lane.intact for w in lane.waypoints)
        assert (lane.position, lane.held) == (100, capsule.segment)
        assert lane.tokens.tolist() == list(range(100))
        assert engine.capsules.digest_lane(lane) == capsule.digest
        engine.prefill(lane, np.arange(20, dtype=np.int32))
        session.prefill(range(20))
        assert engine.capsules.digest_lane(lane) == session.digest()


def test_waypoints_of_another_history_are_forgotten(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    session.prefill(range(200))
    ones = session.snapshot()
    session.rollback(10)
    for _ in range(10):  # waypoints of this history lie elsewhere than those of `ones`
        session.prefill([7] * 19)
    assert session.lane.waypoints
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
    engine.poison_lane(engine.free_lanes[-1])  # no rows of an earlier session by luck
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


def test_tokens_come_back_with_rows_that_never_left(session: flashrt.Session) -> None:
    """Red when going back to an ancestor loses the tokens of rows that the lane still holds."""
    session.prefill(range(40))
    low = session.snapshot()
    session.prefill(range(100, 140))
    high = session.snapshot()
    for start in (200, 300):
        session.restore(low)
        session.prefill(range(start, start + 60))
        for _ in range(3):
            session.restore(high)
            assert session.tokens.tolist() == high.tokens.tolist()
            session.restore(low)
