"""Drafting on the raw CUDA kernels changes nothing: bitwise, in both precisions, threads at random.

IS: random histories of drafted runs, snapshots, restores, rollbacks and interrupts against plain
decoding. IS NOT: the policy or the edges of a run, see test_drafting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on
from tests.property.guessing import (
    check_drafted_run,
    check_wrong_commit_shows,
    cold,
    guessing,
    interrupting,
    outcome,
    truth,
)

TINY = Path(__file__).parents[1] / "golden" / "tiny"
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 7},
    {"temperature": 1.1, "seed": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"presence_penalty": 0.5, "logit_bias": {11: 3.0, 12: -np.inf}},
)


@pytest.fixture(scope="module", params=["bfloat16", pytest.param("high", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> Iterator[flashrt.Engine]:
    """Two lanes: the tested session's and its oracle's; positions beyond a block of 256 keys."""
    engine = load_on(lambda: SimtDevice(request.param, seed=5), TINY, max_positions=320, lanes=2)
    yield engine
    engine.close()


prompts = st.one_of(
    st.lists(st.integers(0, 511), min_size=1, max_size=60),
    st.integers(240, 262).map(lambda n: [(7 * i) % 512 for i in range(n)]),
)


@given(
    prompts,
    st.integers(1, 4),
    st.sampled_from(SAMPLING),
    st.sampled_from([0.0, 0.6, 1.0]),
    st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_drafting_changes_nothing(
    engine: flashrt.Engine,
    prompt: list[int],
    draft: int,
    params: dict[str, Any],
    agree: float,
    is_poisoned: bool,
) -> None:
    check_drafted_run(engine, prompt, 12, draft, params, agree=agree, is_poisoned=is_poisoned)


@given(st.data())
@settings(max_examples=5, deadline=None)
def test_snapshots_rollbacks_and_interrupts_in_between(
    engine: flashrt.Engine, data: st.DataObject
) -> None:
    prompt = data.draw(st.lists(st.integers(0, 511), min_size=1, max_size=30))
    params = data.draw(st.sampled_from(SAMPLING))
    following = truth(engine, prompt, 30, **params)
    history = prompt + following
    with engine.session() as session, guessing(engine, prompt, following, 0.8):
        session.prefill(prompt)
        capsule = session.snapshot()
        for _ in range(4):
            verb = data.draw(st.sampled_from(["generate", "interrupt", "rollback", "restore"]))
            if verb == "rollback":
                session.rollback(data.draw(st.integers(len(prompt), session.position)))
            elif verb == "restore":
                session.restore(capsule)
            else:
                draft, n = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 5))
                stream = session.generate(n, draft=draft, **params)
                if verb == "generate":
                    list(stream)
                else:
                    after, is_done = data.draw(st.integers(0, 6)), data.draw(st.booleans())
                    with (
                        interrupting(engine, after, is_done),
                        contextlib.suppress(KeyboardInterrupt),
                    ):
                        list(stream)
            if data.draw(st.booleans()):
                capsule.drop()
                capsule = session.snapshot()
            n = session.position
            assert session.tokens.tolist() == history[:n]
        assert outcome(session) == cold(engine, history[:n])
        capsule.drop()
    engine.capsules.check_integrity()
    engine.arena.check_guards()


def test_accepted_drafts_save_launches(engine: flashrt.Engine) -> None:
    """Were nothing ever accepted, the suite would not say much; and no verb makes anything new."""
    prompt = list(range(40, 60))
    following = truth(engine, prompt, 20)
    with engine.session() as session:
        session.prefill(prompt)
        before = engine.stats()
        with guessing(engine, prompt, following, 1.0):
            assert list(session.generate(16, draft=4)) == following[:16]
        after = engine.stats()
    counts = {name: after[name] - before[name] for name in ("verifies", "drafted", "accepted")}
    assert counts == {"verifies": 3, "drafted": 12, "accepted": 12}  # 1 + 3 x 5 tokens
    for counter in ("allocations", "compilations", "captures"):
        assert after[counter] == before[counter]


def test_a_wrong_commit_is_noticed(engine: flashrt.Engine) -> None:
    check_wrong_commit_shows(engine, list(range(40, 60)))
