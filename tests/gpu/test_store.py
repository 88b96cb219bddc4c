"""Tiers, files and store with the CUDA kernels: the same bits, guards whole."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashrt
from flashrt.backends.cuda.device import Precision
from flashrt.store import upkeep
from flashrt.store.store import Store

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("precision", ["bfloat16", "high"])
def test_capsules_outlive_their_engine(
    device_name: str, precision: Precision, tmp_path: Path
) -> None:
    first, second = (
        flashrt.load(
            GOLDEN / "tiny", device=device_name, max_positions=n, lanes=lanes, precision=precision
        )
        for n, lanes in ((96, 2), (128, 1))
    )
    session, store = first.session(), Store(tmp_path / "store")
    session.prefill(range(20))
    store.save(session.snapshot("root"))
    session.prefill([3, 4, 5])
    leaf, digest = session.snapshot("leaf"), session.digest()
    assert store.save(leaf).shared_nbytes > 0
    for tier in ("host", "disk", "device"):
        leaf.to(tier)
        first.poison_lane(session.lane)
        session.restore(leaf)
        assert (session.digest(), leaf.tier, leaf.digest) == (digest, tier, digest)
    leaf.save(tmp_path / "c.capsule")
    expected = list(session.generate(3, temperature=1.0, seed=2)), session.logits().tobytes()
    other = second.session()
    for capsule in (store.load(second, "leaf"), second.load_capsule(tmp_path / "c.capsule")):
        second.poison_lane(other.lane)
        other.restore(capsule)
        assert other.digest() == digest
        found = list(other.generate(3, temperature=1.0, seed=2)), other.logits().tobytes()
        assert found == expected
    assert upkeep.verify(store).problems == []
    for engine in (first, second):
        engine.arena.check_guards()
