"""Drafting changes the speed and nothing else: tokens, logits and state, whatever agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from tests.property.guessing import (
    check_drafted_run,
    check_wrong_commit_shows,
    cold,
    guessing,
    interrupting,
    outcome,
    truth,
)

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = list(range(40, 90))
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 99},
    {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.2, "seed": 5},
    {"presence_penalty": -0.4, "logit_bias": {11: 3.0, 12: -np.inf}},
)


@given(
    st.lists(st.integers(0, 511), min_size=1, max_size=280),
    st.one_of(st.integers(1, 8), st.just("auto")),
    st.sampled_from(SAMPLING),
    st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_drafting_changes_nothing(
    engine: flashrt.Engine,
    prompt: list[int],
    draft: Any,
    params: dict[str, Any],
    agree: float,
    is_poisoned: bool,
) -> None:
    check_drafted_run(engine, prompt, 32, draft, params, agree=agree, is_poisoned=is_poisoned)


def test_accepted_drafts_save_replays(engine: flashrt.Engine) -> None:
    """Were nothing ever accepted, the suite would not say much."""
    following = truth(engine, PROMPT, 64)
    with engine.session() as session:
        session.prefill(PROMPT)
        before = engine.stats()
        with guessing(engine, PROMPT, following, 1.0):
            assert list(session.generate(55, draft=8)) == following[:55]
        after = engine.stats()
    assert after["verifies"] - before["verifies"] == 6  # 1 + 6 x 9 tokens
    assert after["drafted"] - before["drafted"] == 48
    assert after["accepted"] - before["accepted"] == 48


def test_a_rejected_draft_leaves_no_trace(engine: flashrt.Engine) -> None:
    with engine.session() as session:
        session.prefill(PROMPT)
        before = outcome(session)
        lane = session.lane
        names = ("state", "window", "last_hidden", "sampler", "bias", "mask")
        fixed = {name: engine.lane_array(lane, name).tobytes() for name in names}
        for length in range(1, 9):
            engine.draft(lane, length)
            assert 1 <= len(engine.verify(lane, length + 1)) <= length + 1
        engine.arena.poison_scratch()
        assert {name: engine.lane_array(lane, name).tobytes() for name in names} == fixed
        assert outcome(session) == before


def test_a_wrong_commit_is_noticed(engine: flashrt.Engine) -> None:
    check_wrong_commit_shows(engine, PROMPT)


@pytest.mark.parametrize("at", range(12))
def test_a_stop_token_inside_an_accepted_run(engine: flashrt.Engine, at: int) -> None:
    params = {"temperature": 1.0, "seed": 8}
    following = truth(engine, PROMPT, 24, **params)
    wanted = following[: following.index(following[at])]
    with engine.session() as session, guessing(engine, PROMPT, following, 1.0):
        session.prefill(PROMPT)
        got = list(session.generate(20, draft=8, stop=[following[at]], **params))
        assert got == wanted
        assert outcome(session) == cold(engine, PROMPT + wanted)


@pytest.mark.parametrize("taken", range(12))
def test_closing_leaves_what_was_yielded(engine: flashrt.Engine, taken: int) -> None:
    following = truth(engine, PROMPT, 24)
    with engine.session() as session, guessing(engine, PROMPT, following, 1.0):
        session.prefill(PROMPT)
        stream = session.generate(20, draft=5)
        got = [next(stream) for _ in range(taken)]
        stream.close()
        assert session.position == len(PROMPT) + taken
        capsule = session.snapshot()
        assert capsule.tokens.tolist() == PROMPT + got == PROMPT + following[:taken]
        assert outcome(session) == cold(engine, PROMPT + got)
        capsule.drop()


@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("after", range(14))
def test_an_interrupt_leaves_the_last_boundary(
    engine: flashrt.Engine, after: int, is_done: bool
) -> None:
    """Whichever replay it hits: a draft's, a verify's or a commit's, before or after it ran."""
    following, got = truth(engine, PROMPT, 40), list[int]()
    with engine.session() as session, guessing(engine, PROMPT, following, 0.8):
        session.prefill(PROMPT)
        stream = session.generate(30, draft=3)
        with interrupting(engine, after, is_done), pytest.raises(KeyboardInterrupt):
            got.extend(stream)
        assert session.tokens.tolist() == PROMPT + got
        got += session.generate(5, draft=2)
        assert got == following[: len(got)]
        assert outcome(session) == cold(engine, PROMPT + got)


def test_drafts_end_where_the_lane_does(engine: flashrt.Engine) -> None:
    prompt = (PROMPT * 20)[: engine.max_positions - 6]
    following = truth(engine, prompt, 6)
    with engine.session() as session, guessing(engine, prompt, following, 1.0):
        session.prefill(prompt)
        stream = session.generate(100, draft=8)
        assert list(stream) == following
        assert stream.reason == "context"
        assert outcome(session) == cold(engine, prompt + following)
    engine.arena.check_guards()


def test_log_probabilities(engine: flashrt.Engine) -> None:
    """Of each token, the same with drafts and without; of the logits as they are."""
    params = {"temperature": 1.3, "top_k": 20, "seed": 2}
    following = truth(engine, PROMPT, 30, **params)
    seen = []
    for draft in (0, 4):
        with engine.session() as session, guessing(engine, PROMPT, following, 0.7):
            session.prefill(PROMPT)
            stream = session.generate(20, draft=draft, **params)
            seen.append([(token, session.logprobs(3)) for token in stream])
    assert seen[0] == seen[1]
    with engine.session() as session:
        session.prefill(PROMPT)
        for token, (logprob, top) in seen[0][:4]:
            x = session.logits().astype(np.float64)
            logs = x - np.log(np.exp(x).sum())
            assert logprob == pytest.approx(logs[token], abs=1e-5)
            assert [i for i, _ in top] == np.argsort(-logs)[:3].tolist()
            session.prefill([token])
            with pytest.raises(flashrt.SessionError, match="right after"):
                session.logprobs()


def test_questions_between_tokens_change_nothing(engine: flashrt.Engine) -> None:
    params = {"temperature": 1.0, "seed": 21}
    following = truth(engine, PROMPT, 40, **params)
    with engine.session() as session, guessing(engine, PROMPT, following, 0.8):
        session.prefill(PROMPT)
        asked = np.random.default_rng(5)
        for i, token in enumerate(session.generate(30, draft=6, **params)):
            assert token == following[i]
            if asked.random() < 0.3:
                session.logits()
            if asked.random() < 0.2:
                session.snapshot().drop()
        assert outcome(session) == cold(engine, PROMPT + following[:30])


def test_another_sampler_takes_over_in_the_middle_of_a_run(engine: flashrt.Engine) -> None:
    following = truth(engine, PROMPT, 20)
    with engine.session() as session, guessing(engine, PROMPT, following, 1.0):
        session.prefill(PROMPT)
        stream = session.generate(12, draft=8)
        history = PROMPT + [next(stream) for _ in range(4)]
        stream.close()
        hot = truth(engine, history, 10, temperature=1.5, seed=6)
        assert list(session.generate(6, 1.5, seed=6)) == hot[:6]
        assert outcome(session) == cold(engine, history + hot[:6])


def test_a_generator_that_moves_on_after_a_rollback_is_refused(engine: flashrt.Engine) -> None:
    following = truth(engine, PROMPT, 20)
    with engine.session() as session, guessing(engine, PROMPT, following, 1.0):
        session.prefill(PROMPT)
        stream = session.generate(12, draft=8)
        for _ in range(5):
            next(stream)
        session.rollback(len(PROMPT) + 2)  # into the run that is not committed
        with pytest.raises(flashrt.SessionError, match="changed meanwhile"):
            next(stream)
        assert list(session.generate(6, draft=3)) == following[2:8]
        assert outcome(session) == cold(engine, PROMPT + following[:8])


@pytest.mark.parametrize("draft", [0, 3])
def test_logits_that_are_not_numbers_are_reported(engine: flashrt.Engine, draft: int) -> None:
    with engine.session() as session:
        session.prefill(PROMPT)
        capsule = session.snapshot()
        slot = engine.arena.lane(session.lane.index).fixed.slot("last_hidden")
        hidden = engine.arena.read(slot)
        engine.arena.write(slot, np.full_like(hidden, np.nan))
        with pytest.raises(flashrt.SessionError, match="position 50 hold NaN"):
            list(session.generate(4, draft=draft))
        assert session.tokens.tolist() == PROMPT
        session.restore(capsule)
        every = dict.fromkeys(range(512), -np.inf)
        with pytest.raises(flashrt.SessionError, match="leave no token"):
            list(session.generate(4, draft=draft, logit_bias=every))
        assert list(session.generate(9, draft=draft)) == truth(engine, PROMPT, 9)
        capsule.drop()


def test_without_the_head(engine: flashrt.Engine) -> None:
    plain = flashrt.load(engine.checkpoint.path, device="cpu", max_positions=200, draft=False)
    names = {s.region.name for s in plain.arena.plan.slots()}
    assert not [name for name in names if name.startswith(("draft", "verify"))]
    assert plain.max_draft == 0 < engine.max_draft
    assert plain.fingerprint != engine.fingerprint
    session = plain.session()
    session.prefill(PROMPT)
    with pytest.raises(flashrt.SessionError, match="no draft head"):
        session.generate(4, draft=2)
    with pytest.raises(flashrt.SessionError, match="no draft head"):
        session.generate(4, draft="auto")
    assert list(session.generate(20)) == truth(engine, PROMPT, 20)


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    from flashrt.weights.random_checkpoint import write_random_checkpoint

    path = write_random_checkpoint(tmp_path / "c", has_draft_head=False)
    assert flashrt.load(path, device="cpu", max_positions=64).max_draft == 0
    with pytest.raises(flashrt.CheckpointError, match=r"mtp\."):
        flashrt.load(path, device="cpu", max_positions=64, draft=True)


@pytest.mark.parametrize("taken", range(1, 6))
def test_guesses_below_a_descendant_do_not_reach_it(engine: flashrt.Engine, taken: int) -> None:
    """Red when a verify writes rows that the lane goes on taking for a capsule's.

    Back at an ancestor the lane still holds the descendant's rows; drafting there writes over them.
    """
    with engine.session() as session:
        session.prefill(PROMPT)
        ancestor = session.snapshot()
        session.prefill(range(300, 380))
        descendant = session.snapshot()
        session.restore(ancestor)
        stream = session.generate(20, temperature=1.5, seed=taken, draft=4)
        for _ in range(taken):
            next(stream)
        stream.close()
        session.restore(descendant)
        assert session.digest() == descendant.digest
        descendant.drop()
        ancestor.drop()
