"""Eviction: what is cheap to make again goes first; pins and live lanes stay; nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashrt
from flashrt.capsule.eviction import Budgets, candidates, in_use
from flashrt.capsule.extent import Tier

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def small() -> flashrt.Engine:
    """Room for about four capsules on the device."""
    fixed = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=400).stats()["fixed_bytes"]
    return flashrt.load(
        GOLDEN / "tiny",
        device="cpu",
        max_positions=400,
        lanes=2,
        draft=False,
        pool_bytes=6 * fixed,
    )


def test_capsules_move_down_and_all_can_be_restored(small: flashrt.Engine) -> None:
    fixed = small.stats()["fixed_bytes"]
    small.budgets = Budgets(host_bytes=4 * fixed, disk_bytes=1 << 30)
    session, kept = small.session(), []
    for token in range(12):
        session.rollback(token % 3)
        session.prefill([token] * 15)
        kept.append((session.snapshot(), session.digest()))
        small.capsules.check_integrity()
        assert small.capsules.used_nbytes(Tier.HOST) <= 4 * fixed
    tiers = [c.tier for c, _ in kept]
    assert {"device", "host", "disk"} == set(tiers)
    for capsule, digest in kept:
        small.poison_lane(session.lane)
        session.restore(capsule)
        assert session.digest() == digest == capsule.digest


def test_without_budgets_a_full_pool_is_full(small: flashrt.Engine) -> None:
    session = small.session()
    with pytest.raises(flashrt.PoolFull):
        for token in range(12):
            session.prefill([token] * 15)
            session.snapshot()
    small.budgets = Budgets(disk_bytes=100)
    with pytest.raises(flashrt.PoolFull):
        session.snapshot()
    assert {c.tier for c in small.capsules.capsules} == {"device"}
    small.budgets = Budgets(disk_bytes=1 << 30)
    session.snapshot()
    assert small.capsules.used_nbytes(Tier.DISK) > 0 == small.capsules.used_nbytes(Tier.HOST)


def test_pinned_capsules_and_those_of_live_lanes_stay(small: flashrt.Engine) -> None:
    small.budgets = Budgets(host_bytes=1 << 30)
    session = small.session()
    session.prefill([1] * 5)
    pinned = session.snapshot("pinned")
    pinned.is_pinned = True
    for token in range(6):
        session.prefill([token] * 15)
        newest = session.snapshot()
    assert pinned.fixed.tier == newest.fixed.tier == Tier.DEVICE
    assert in_use(small.capsules, [session.lane]) == {newest}
    demoted = [c for c in small.capsules.capsules if c.fixed.tier is Tier.HOST]
    assert demoted


def test_the_order(engine: flashrt.Engine, session: flashrt.Session) -> None:
    session.prefill(range(200))
    deep = session.snapshot("deep")
    session.prefill([1])
    shallow = session.snapshot("shallow")  # one token from `deep`
    session.rollback(0)
    session.prefill([7] * 50)
    middle = session.snapshot("middle")
    found = candidates(engine.capsules, Tier.DEVICE)
    assert found[0].capsule is shallow
    assert {c.capsule: c.n_tokens for c in found} == {deep: 200, shallow: 1, middle: 50}
    fixed = engine.stats()["fixed_bytes"]
    assert {c.capsule: c.freed_nbytes for c in found}[deep] == fixed  # its rows are shared
    assert candidates(engine.capsules, Tier.DEVICE, frozenset({shallow}))[0].capsule is not shallow
    assert candidates(engine.capsules, Tier.HOST) == []
