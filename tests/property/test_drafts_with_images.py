"""Drafting beside images changes the speed and nothing else: the draft head reads images' rows too.

What only they add: rows of the head's keys come of an image's rows in place of the table's, and
turn by places; both must not depend on how a prompt was cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.ops.sample import SamplerParams
from tests.property.test_exact import cold, fingerprint_of
from tests.property.test_images import history
from tests.seeing import with_draft_head, write


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flashrt.Engine]:
    folder = with_draft_head(write(tmp_path_factory.mktemp("drafts") / "seeing"))
    with flashrt.load(folder, "cpu", max_positions=300, lanes=4, images=True) as made:
        assert made.max_draft == 8 and made.sight is not None
        yield made


def head_rows(engine: flashrt.Engine, session: flashrt.Session) -> bytes:
    """Keys and values of the head, as far as they are committed."""
    names = ("draft_keys", "draft_values")
    rows = [engine.lane_array(session.lane, name)[:, 1 : session.position] for name in names]
    return b"".join(array.tobytes() for array in rows)


def test_any_partition_of_a_prompt(engine: flashrt.Engine) -> None:
    """Fault: a row of the head that depends on the launch, or on what lay in its input before."""
    tokens, rng = history(engine, 1, 2), np.random.default_rng(3)
    whole, found = cold(engine, tokens), set()
    for n in (0, 1, 5, 5, 5):
        cuts = sorted(rng.integers(1, len(tokens), n).tolist())
        with engine.session() as session:
            for start, stop in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
                session.prefill(tokens[start:stop])
            found.add(head_rows(engine, session))
            assert fingerprint_of(session) == whole, cuts
    assert len(found) == 1


def test_the_head_reads_the_image(engine: flashrt.Engine) -> None:
    """Fault: it reads some row of the table for all images, or rows that turn by position."""
    found = []
    for seed in (1, 2):
        with engine.session() as session:
            session.prefill(history(engine, seed)[:46])
            found.append(head_rows(engine, session))
    assert found[0] != found[1]


def test_a_draft_turns_as_the_row_that_it_guesses(engine: flashrt.Engine) -> None:
    """Behind an image, where places are not positions. Fault: guesses seldom agree, and nobody
    notices: no bit of an answer depends on them.
    """
    with engine.session() as session:
        session.prefill(history(engine, 1))
        lane, at = session.lane, session.position
        token = engine.sample(lane, SamplerParams())
        rows = []
        for _ in range(2):
            rows.append(engine.lane_array(lane, "draft_keys")[:, at].copy())
            engine.draft(lane, 1)
        rows.append(engine.lane_array(lane, "draft_keys")[:, at].copy())
        session.prefill([token])
        assert np.array_equal(rows[-1], engine.lane_array(lane, "draft_keys")[:, at])
        assert not np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("draft", [1, 3, 8, "auto"])
def test_drafting_changes_nothing(engine: flashrt.Engine, draft: Any) -> None:
    """Tokens, logits and state. Fault: rows of a verify that turn by position, not by place."""
    tokens = history(engine, 1, 2)
    for sampling in ({}, {"temperature": 0.8, "seed": 7}, {"repetition_penalty": 1.3}):
        with engine.session() as plain, engine.session() as drafting:
            plain.prefill(tokens)
            drafting.prefill(tokens)
            reply = list(plain.generate(40, **sampling))  # type: ignore[arg-type]
            before = engine.stats()["drafted"]
            assert list(drafting.generate(40, draft=draft, **sampling)) == reply  # type: ignore[arg-type]
            assert draft == "auto" or engine.stats()["drafted"] > before
            assert fingerprint_of(drafting) == fingerprint_of(plain)
            assert head_rows(engine, drafting) == head_rows(engine, plain)
            drafting.rollback(50)
            assert fingerprint_of(drafting) == cold(engine, tokens[:50])


def test_drafts_of_text_are_as_without_a_tower(engine: flashrt.Engine) -> None:
    """Fault: places that differ from positions where there are only texts."""
    tokens = [(5 * i * i + i) % 300 for i in range(60)]
    blind = flashrt.load(engine.checkpoint.path, "cpu", max_positions=300)
    with blind, blind.session() as one, engine.session() as other:
        for session in (one, other):
            session.prefill(tokens)
        assert head_rows(blind, one) == head_rows(engine, other)
        for length in (1, 4):
            blind.draft(one.lane, length)
            engine.draft(other.lane, length)
            drafted = [e.lane_array(s.lane, "drafted") for e, s in ((blind, one), (engine, other))]
            assert np.array_equal(*(d[1 : length + 1] for d in drafted))
        assert list(one.generate(20, draft=4)) == list(other.generate(20, draft=4))
        assert one.logits().tobytes() == other.logits().tobytes()


def test_lanes_draft_together(engine: flashrt.Engine) -> None:
    """Each lane's own places. Fault: those of another lane's image."""
    prompts = [history(engine, 5), [1, 2, 3], history(engine, 6, 5)]
    sessions = [engine.session() for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    found: list[list[int]] = [[] for _ in prompts]
    for index, token in flashrt.together(*(s.generate(12, draft=4) for s in sessions)):
        found[index].append(token)
    for session, prompt, reply in zip(sessions, prompts, found, strict=True):
        assert fingerprint_of(session) == cold(engine, prompt + reply)
        session.close()
