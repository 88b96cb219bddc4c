"""Promise 1, bitwise: logits and digest do not depend on how tokens came to be committed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from flashrt.capsule.table import CapsuleTable

VOCAB = 512
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=300)


def fingerprint_of(session: flashrt.Session) -> tuple[bytes, str]:
    return session.logits().tobytes(), session.digest()


def cold(engine: flashrt.Engine, tokens: list[int]) -> tuple[bytes, str]:
    """The oracle: the history on an empty lane, in one prefill."""
    with engine.session() as session:
        session.prefill(tokens)
        return fingerprint_of(session)


@given(TOKENS, st.data())
@settings(max_examples=40, deadline=None)
def test_any_partition_of_a_prompt(
    engine: flashrt.Engine, tokens: list[int], data: st.DataObject
) -> None:
    with engine.session() as session:
        at = 0
        while at < len(tokens):
            n = data.draw(st.one_of(st.just(1), st.integers(1, len(tokens) - at)))
            session.prefill(tokens[at : at + n])
            at += n
        assert fingerprint_of(session) == cold(engine, tokens)


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), TOKENS)
@settings(max_examples=20, deadline=None)
def test_any_row_bucket(engine: flashrt.Engine, tail: list[int], tokens: list[int]) -> None:
    seen = set()
    for bucket in engine.model.buckets[1:]:
        with engine.session() as session:
            session.prefill(tokens)
            engine.prefill(session.lane, np.array(tail, np.int32), bucket)
            seen.add(fingerprint_of(session))
    assert seen == {cold(engine, tokens + tail)}


@given(TOKENS, st.integers(1, 40), st.sampled_from([0.0, 0.7, 1.5]), st.integers(0, 1 << 40))
@settings(max_examples=20, deadline=None)
def test_decode_equals_prefill_of_what_it_yielded(
    engine: flashrt.Engine, tokens: list[int], n: int, temperature: float, seed: int
) -> None:
    with engine.session() as session:
        session.prefill(tokens)
        out = list(session.generate(n, temperature=temperature, top_k=50, top_p=0.95, seed=seed))
        assert session.tokens.tolist() == tokens + out
        assert fingerprint_of(session) == cold(engine, tokens + out)


@given(TOKENS, st.data())
@settings(max_examples=30, deadline=None)
def test_rollback_to_any_position(
    engine: flashrt.Engine, tokens: list[int], data: st.DataObject
) -> None:
    target = data.draw(st.integers(1, len(tokens)))
    with engine.session() as session:
        session.prefill(tokens)
        list(session.generate(data.draw(st.integers(0, 3))))
        session.rollback(target)
        assert session.tokens.tolist() == tokens[:target]
        assert fingerprint_of(session) == cold(engine, tokens[:target])


def test_threads_do_not_change_bits(engine: flashrt.Engine) -> None:
    tokens = np.random.default_rng(3).integers(0, VOCAB, 300)
    device = engine.backend
    results = []
    for threads in (1, 2, 3):
        device.resize(threads)
        results.append(cold(engine, tokens.tolist()))
    device.resize(2)
    assert len(set(results)) == 1


def test_poison_then_restore_is_complete(engine: flashrt.Engine) -> None:
    with engine.session() as session:
        session.prefill(range(1, 200))
        capsule = session.snapshot()
        expected = [*session.generate(20)], fingerprint_of(session)
        engine.arena.poison_scratch()
        engine.poison_lane(session.lane)
        session.restore(capsule)
        assert ([*session.generate(20)], fingerprint_of(session)) == expected
        capsule.drop()


def test_without_a_region_the_restore_is_incomplete(engine: flashrt.Engine) -> None:
    """Negative control: were the state not declared `fixed`, the suite would notice."""
    table: CapsuleTable = engine.capsules
    with engine.session() as session:
        session.prefill(range(1, 200))
        capsule = session.snapshot()
        before = fingerprint_of(session)
        slot = engine.arena.lane(session.lane.index).fixed.slot("state")
        saved = engine.arena.read(slot)
        engine.poison_lane(session.lane)
        session.restore(capsule)
        assert fingerprint_of(session) == before
        engine.arena.write(slot, np.zeros_like(saved))  # as if the region had been scratch
        assert session.digest() != before[1]
        session.prefill([5])
        with engine.session() as other:
            other.restore(capsule)
            other.prefill([5])
            assert other.logits().tobytes() != session.logits().tobytes()
        capsule.drop()
    table.check_integrity()


def test_rows_only_restore_diverges(engine: flashrt.Engine) -> None:
    prefix, detour = list(range(1, 150)), list(range(300, 340))
    with engine.session() as session:
        session.prefill(prefix)
        capsule = session.snapshot()
        expected = list(session.generate(24))
        session.prefill(detour)
        session.restore(capsule)
        assert list(session.generate(24)) == expected
        session.prefill(detour)
        session.restore(capsule, bands=("rows",))
        assert session.position == capsule.position
        assert list(session.generate(24)) != expected
        session.restore(capsule)
        assert list(session.generate(24)) == expected
        capsule.drop()


def test_a_thousand_tokens_allocate_compile_and_capture_nothing(engine: flashrt.Engine) -> None:
    long = flashrt.load(engine.checkpoint.path, device="cpu", max_positions=1100)
    session = long.session()
    session.prefill([1, 2, 3])
    assert len(list(session.generate(1))) == 1
    before = long.stats()
    assert len(list(session.generate(1000))) == 1000
    after = long.stats()
    for counter in ("allocations", "compilations", "captures"):
        assert after[counter] == before[counter]
    assert after["replays"] - before["replays"] == 1000
    with pytest.raises(flashrt.FlashrtError, match="seal"):
        long.backend.allocate("more", 1)
    with pytest.raises(flashrt.FlashrtError, match="seal"):
        long.graphs.capture(long.model.record("decode", 1))


def test_guards_are_whole(engine: flashrt.Engine) -> None:
    with engine.session() as session:
        session.prefill(range(1, 300))
        list(session.generate(5, temperature=1.0))
    engine.arena.check_guards()
    slot = engine.arena.lane(0).fixed.slot("sampler")
    address = engine.arena.memory.address + slot.stop
    engine.backend.fill(address + (-address % 256), 1, 0)
    with pytest.raises(flashrt.FlashrtError, match="past 'sampler'"):
        engine.arena.check_guards()
    engine.backend.fill(address + (-address % 256), 1, 0xA5)
