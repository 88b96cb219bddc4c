"""Tiers: capsules between device, host and disk; lineage stays whole; a failure changes nothing."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.capsule.extent import Tier
from flashrt.capsule.image import rows_image
from flashrt.store.spill import Spill

GOLDEN = Path(__file__).parents[1] / "golden"
TIERS = ("device", "host", "disk")


@pytest.mark.parametrize("first", TIERS)
@pytest.mark.parametrize("second", TIERS)
def test_restore_straight_from_any_tier(
    engine: flashrt.Engine, session: flashrt.Session, first: str, second: str
) -> None:
    session.prefill(range(100))
    session.snapshot("root")
    session.prefill(range(45))
    leaf = session.snapshot("leaf")
    expected = session.digest(), list(session.generate(6))
    for tier in (first, second):
        leaf.to(tier)
        assert (leaf.tier, leaf.digest) == (tier, expected[0])
        engine.capsules.check_integrity()
        engine.poison_lane(session.lane)
        session.restore(leaf)
        assert (session.digest(), list(session.generate(6))) == expected
        engine.arena.check_guards()


def test_a_demoted_ancestor_leaves_its_rows_to_its_descendants(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    session.prefill(range(100))
    root = session.snapshot("root")
    session.prefill(range(30))
    leaf = session.snapshot("leaf")
    used = engine.capsules.used_nbytes(Tier.DEVICE)
    root.to("disk")
    assert (root.tier, leaf.tier) == ("disk", "device")
    assert engine.capsules.used_nbytes(Tier.DISK) == engine.stats()["fixed_bytes"]
    session.restore(root)
    assert session.digest() == root.digest
    leaf.to("host")  # nobody on the device needs the root's rows now
    assert engine.capsules.used_nbytes(Tier.DEVICE) == 0
    assert engine.capsules.used_nbytes(Tier.HOST) == used - engine.stats()["fixed_bytes"]
    session.prefill([5])
    child = session.snapshot("child")  # its rows follow rows of the host tier
    assert (child.parent, child.tier) == (root, "host")
    assert child.digest == session.digest()
    root.drop()
    for capsule in (child, leaf):
        engine.poison_lane(session.lane)
        session.restore(capsule)
        assert session.digest() == capsule.digest
    child.to("device")
    assert (child.tier, leaf.tier) == ("device", "host")
    assert engine.capsules.digest_capsule(child) == child.known_digest


def test_a_full_pool_keeps_a_capsule_where_it_is(engine: flashrt.Engine) -> None:
    fixed = engine.stats()["fixed_bytes"]
    small = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=400, pool_bytes=3 * fixed)
    session = small.session()
    session.prefill([1, 2, 3])
    first = session.snapshot()
    first.to("host")
    session.prefill([4])
    second = session.snapshot()
    with pytest.raises(flashrt.PoolFull):
        while True:
            session.snapshot()
    used = small.stats()["pool_used_bytes"]
    with pytest.raises(flashrt.PoolFull):
        first.to("device")
    assert (first.tier, second.tier) == ("host", "host")
    assert small.stats()["pool_used_bytes"] == used
    small.capsules.check_integrity()


def test_a_full_disk_changes_nothing(
    engine: flashrt.Engine, session: flashrt.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prefill(range(40))
    capsule = session.snapshot()
    calls: list[Path] = []
    real = Path.replace

    def full(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > 1:  # the fixed band still fits
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(flashrt.CapsuleError, match="No space left"):
        capsule.to("disk")
    monkeypatch.undo()
    assert (capsule.tier, len(calls)) == ("device", 2)
    engine.capsules.check_integrity()
    capsule.to("disk")
    assert capsule.tier == "disk"


def test_damage_on_disk_is_found_before_anything_moves(
    session: flashrt.Session, tmp_path: Path
) -> None:
    session.prefill(range(40))
    capsule = session.snapshot()
    capsule.to("disk")
    session.prefill([9])
    digest = session.digest()
    source = capsule.fixed.source
    path = Path(source.folder.url, "objects", source.digest[:2], source.digest[2:])
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    for call in (lambda: session.restore(capsule), lambda: capsule.to("device")):
        with pytest.raises(flashrt.CapsuleError, match="damaged"):
            call()
    assert (session.digest(), capsule.tier) == (digest, "disk")
    path.unlink()
    with pytest.raises(flashrt.CapsuleError, match="cannot read"):
        capsule.save(tmp_path / "c")


def test_kept_moves_are_used_only_where_the_bytes_lie_still(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    session.prefill(range(40))
    capsule, digest = session.snapshot(), session.digest()
    lane, table = session.lane, engine.capsules
    engine.poison_lane(lane)
    session.restore(capsule)
    engine.poison_lane(lane)
    kept = table.moves_to_restore(lane, capsule)
    assert kept is table.moves_to_restore(lane, capsule) is capsule.known_moves[lane.index]
    block = capsule.fixed.block
    capsule.to("host")
    session.prefill([3])
    other = session.snapshot()  # in the pool where the capsule was
    capsule.to("device")
    assert capsule.fixed.block != block
    engine.poison_lane(lane)
    assert table.moves_to_restore(lane, capsule) is not kept
    session.restore(capsule)
    assert session.digest() == digest != other.digest


def test_demotion_waits_for_nobody() -> None:
    """Over streams that run only when waited for: the pool's block is used again at once, by a
    capsule of another state, and the host's bytes are those of the first.
    """
    engine = flashrt.load(GOLDEN / "tiny", device="simt", max_positions=200, lanes=2)
    driver = engine.backend.driver
    with engine.session() as session:
        session.prefill(range(40))
        capsule, expected = session.snapshot(), session.digest()
        image = rows_image(engine.arena, capsule.segment).copy()
        blocks = {capsule.fixed.block, capsule.segment.rows.block}
        waits = driver.counts["cuStreamSynchronize"] + driver.counts["cuEventSynchronize"]
        capsule.to("host")
        assert driver.counts["cuStreamSynchronize"] + driver.counts["cuEventSynchronize"] == waits
        session.rollback(0)
        session.prefill(range(100, 140))
        later = session.snapshot()
        assert {later.fixed.block, later.segment.rows.block} == blocks
        with engine.session() as other:
            other.restore(capsule)
            assert other.digest() == expected
        assert np.array_equal(capsule.segment.rows.source.read(), image)
        assert capsule.digest == expected, "of the blocks as they were, not as they are"
        session.restore(later)
        assert session.digest() == later.digest != expected
    engine.close()


def test_a_rollback_passes_over_a_damaged_boundary(
    engine: flashrt.Engine, session: flashrt.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the older capsule, then to the empty boundary; what it passed over is said."""
    said: list[str] = []
    monkeypatch.setattr("flashrt.session.session.trace", lambda _, message: said.append(message))
    session.prefill(range(30))
    older = session.snapshot("older")
    session.prefill(range(10))
    deepest = session.snapshot("deepest")
    session.prefill(range(10))
    for damaged, kept in ((deepest, older), (older, None)):
        damaged.to("disk")
        source = damaged.fixed.source
        path = Path(source.folder.url, "objects", source.digest[:2], source.digest[2:])
        raw = bytearray(path.read_bytes())
        raw[100] ^= 4
        path.write_bytes(raw)
        replays = engine.stats()["replays"]
        session.rollback(45)
        assert engine.stats()["replays"] > replays  # a boundary below, and the journal
        assert f"{damaged}" in said[-1] and "damaged" in said[-1]
        assert session._parent is kept
        with engine.session() as cold:
            cold.prefill([*range(30), *range(10), *range(5)])
            assert session.digest() == cold.digest()
        session.prefill([1])
    assert len(said) == 2  # rows above the older one were written again: it alone was left
    engine.capsules.check_integrity()


def test_spilled_bytes_go_with_their_capsules(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    session.prefill(range(40))
    first, second = session.snapshot(), session.snapshot()  # equal bytes
    first.to("disk")
    second.to("disk")
    folder = Path(first.fixed.source.folder.url, "objects")
    assert len([p for p in folder.rglob("*") if p.is_file()]) == 2
    first.drop()
    session.restore(second)
    second.drop()
    assert [p for p in folder.rglob("*") if p.is_file()] == []


def test_images_do_not_depend_on_what_lay_there_before(
    engine: flashrt.Engine, session: flashrt.Session
) -> None:
    """Dead rows of the last granule, padding and gaps are canonical."""
    images = []
    for detour in ([], [7] * 150, [3] * 60):
        session.rollback(0)
        engine.poison_lane(session.lane)
        engine.capsules.reset(session.lane)
        session.prefill(detour)
        session.rollback(0)
        session.prefill(range(70))
        capsule = session.snapshot()
        images.append(rows_image(engine.arena, capsule.segment).tobytes())
        capsule.drop()
    assert len(set(images)) == 1
    assert np.frombuffer(images[0], np.uint8).any()


def test_unknown_tiers_and_dropped_capsules_are_refused(session: flashrt.Session) -> None:
    session.prefill([1])
    capsule = session.snapshot()
    with pytest.raises(flashrt.CapsuleError, match="device, host, disk"):
        capsule.to("tape")
    capsule.to("host")
    capsule.prefetch()
    capsule.drop()
    assert capsule.tier == "dropped"
    with pytest.raises(flashrt.CapsuleError, match="dropped"):
        capsule.to("device")


def test_spill_folders_go_with_their_process(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np, pathlib, os; from flashrt.store.spill import Spill; "
        "s = Spill(pathlib.Path(sys.argv[1])); "
        "assert s.put(np.arange(99, dtype=np.uint8)).read()[5] == 5; "
        "sys.argv[2] == 'die' and os.kill(os.getpid(), 9)"
    )

    def run(how: str) -> list[Path]:
        subprocess.run([sys.executable, "-c", code, str(tmp_path), how], check=how != "die")
        return list(tmp_path.iterdir())

    assert run("end") == []
    [left] = run("die")
    alive = Spill(tmp_path)
    alive.put(np.zeros(9, np.uint8))
    [mine] = tmp_path.iterdir()
    assert mine != left
    assert run("end") == [mine]  # it is locked
    del alive
    assert list(tmp_path.iterdir()) == []
