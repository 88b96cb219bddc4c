"""Promise 1 and complete capsules, for every family: a new one is a line in tests/families.

The cases are those of test_exact, on other models: with or without recurrent state, biases, rotary
scaling; then each region of state is left out in turn, and lanes share launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on
from tests.families import FAMILIES
from tests.property.guessing import check_drafted_run
from tests.property.test_exact import (
    cold,
    fingerprint_of,
    test_any_partition_of_a_prompt,
    test_any_row_bucket,
    test_decode_equals_prefill_of_what_it_yielded,
    test_guards_are_whole,
    test_poison_then_restore_is_complete,
    test_rollback_to_any_position,
)

__all__ = [
    "test_any_partition_of_a_prompt",
    "test_any_row_bucket",
    "test_decode_equals_prefill_of_what_it_yielded",
    "test_guards_are_whole",
    "test_poison_then_restore_is_complete",
    "test_rollback_to_any_position",
]
VOCAB = 512


@pytest.fixture(scope="module", params=FAMILIES)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[flashrt.Engine]:
    folder = FAMILIES[request.param](tmp_path_factory.mktemp("family"))
    engine = flashrt.load(folder, device="cpu", max_positions=640, lanes=4)
    yield engine
    engine.close()


def test_forks_and_capsule_files(engine: flashrt.Engine, tmp_path: Path) -> None:
    """Red when a capsule of a lane, or a file of it, lacks something."""
    path = tmp_path / "state.frt"
    history, branch = list(range(1, 290)), [7, 8, 9]
    with engine.session() as session:
        session.prefill(history)
        capsule = session.snapshot()
        capsule.save(path)
        with session.fork() as twin:
            twin.prefill(branch)
            assert fingerprint_of(twin) == cold(engine, history + branch)
        session.prefill(range(300, 320))
        loaded = engine.load_capsule(path)
        session.restore(loaded)
        assert fingerprint_of(session) == cold(engine, history)
        loaded.drop()
        capsule.drop()


def test_a_state_without_a_region_is_another_state(engine: flashrt.Engine) -> None:
    """Negative control, for each region of state: were it not restored, the suite would notice."""
    digested = {r.name for r in engine.model.lane_regions if r.is_digested}
    with engine.session() as session:
        session.prefill(range(1, 200))
        capsule, digest = session.snapshot(), session.digest()
        session.prefill([5])
        after = session.logits()
        session.restore(capsule)
        lane = engine.arena.lane(session.lane.index)
        for band in (lane.fixed, lane.rows):
            for slot in band.slots:
                name = slot.region.name
                if name not in digested:
                    continue
                saved = engine.arena.read(slot)
                engine.arena.write(slot, np.zeros_like(saved))
                assert session.digest() != digest, f"{name} is not in the digest"
                # what the next token does not read; rows of a draft head only drafts do
                if name not in ("last_hidden", "journal") and not name.startswith("draft_"):
                    session.prefill([5])
                    assert not np.array_equal(session.logits(), after), f"{name} is not read"
                    session.restore(capsule)
                engine.arena.write(slot, saved)
                session.restore(capsule)
                assert session.digest() == digest
        capsule.drop()
    assert digested - {"last_hidden", "journal"}, "a family has state"


def test_lanes_that_share_launches(engine: flashrt.Engine) -> None:
    """Red when state of one lane is another's, or a launch sees rows that are not its own."""
    prompts, replies = ([1, 2, 3], list(range(20, 90)), [4]), []
    sessions = [engine.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    found: list[list[int]] = [[] for _ in prompts]
    streams = [s.generate(7 + i, temperature=0.8, seed=i) for i, s in enumerate(sessions)]
    for index, token in flashrt.together(*streams):
        found[index].append(token)
    for i, (session, prompt) in enumerate(zip(sessions, prompts, strict=True)):
        assert fingerprint_of(session) == cold(engine, prompt + found[i])
        session.rollback(len(prompt))
        replies.append(list(session.generate(7 + i, temperature=0.8, seed=i)))
        session.close()
    assert found == replies


@pytest.mark.parametrize("agree", [0.0, 0.8])
def test_drafting_changes_nothing(engine: flashrt.Engine, agree: float) -> None:
    """Where the family has a draft head: red when a verify is no decode, or a commit no prefill."""
    if any(r.name == "drafted" for r in engine.model.lane_regions):
        prompt = list(range(40, 90))
        check_drafted_run(engine, prompt, 24, 5, {}, agree=agree, is_poisoned=agree > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_under_random_schedules_of_threads(family: str, tmp_path: Path) -> None:
    """The same on the CUDA kernels: red when bits depend on rows, on the order of threads, or on
    what a decode behind a stop token finds to do.
    """
    folder, seen = FAMILIES[family](tmp_path), set()
    tokens = [(5 * i * i + i) % VOCAB for i in range(75)]
    for seed, cuts in ((0, [0, 75]), (1, [0, 1, 9, 10, 73, 75]), (2, [0, 64, 75])):
        engine = load_on(
            lambda seed=seed: SimtDevice("bfloat16", seed=seed), folder, max_positions=300
        )
        with engine.session() as session:
            for start, stop in itertools.pairwise(cuts):
                session.prefill(tokens[start:stop])
            before = fingerprint_of(session)
            reply = list(session.generate(3))
            after = fingerprint_of(session)
            session.rollback(len(tokens))
            # the decode that was queued behind the stop has no row, and changes nothing
            assert list(session.generate(3, stop=[reply[1]])) == reply[: reply.index(reply[1])]
            session.prefill(reply[session.position - len(tokens) :])
            assert fingerprint_of(session) == after
            seen.add((*before, *after, *reply))
        engine.close()
    assert len(seen) == 1
