"""Promises 1 and 2 on a model with a Mamba-2 state: bitwise, however tokens came to be committed.

The cases are those of test_exact, on the odd one of the tiny models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on
from tests import granite_models
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


@pytest.fixture(scope="module", params=["granite-odd"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[flashrt.Engine]:
    folder = tmp_path_factory.mktemp("granite") / request.param
    granite_models.write(folder, granite_models.CONFIGS[request.param])
    engine = flashrt.load(folder, device="cpu", max_positions=640, lanes=4)
    yield engine
    engine.close()


def test_forks_and_capsule_files(engine: flashrt.Engine, tmp_path: Path) -> None:
    """Red when a capsule lacks the state, or the window, of a Mamba layer."""
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


def test_lanes_that_share_replays_have_the_tokens_of_each_alone(engine: flashrt.Engine) -> None:
    """Red when a state or a window moves with the rows instead of the lane."""
    prompts, alone = ([3, 1, 4], list(range(50)), [9] * 20), []
    for prompt in prompts:
        with engine.session() as session:
            session.prefill(prompt)
            alone.append((list(session.generate(12)), session.digest()))
    sessions = [engine.session() for _ in prompts]
    seen: list[list[int]] = [[] for _ in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        session.prefill(prompt)
    for i, token in flashrt.together(*(session.generate(12) for session in sessions)):
        seen[i].append(token)
    together = [(tokens, s.digest()) for tokens, s in zip(seen, sessions, strict=True)]
    for session in sessions:
        session.close()
    assert together == alone


def test_pieces_under_random_schedules_of_threads(tmp_path: Path) -> None:
    """The same on the CUDA kernels."""
    folder = granite_models.write(tmp_path / "odd", granite_models.CONFIGS["granite-odd"])
    tokens, seen = [(5 * i * i + i) % granite_models.VOCAB for i in range(75)], set()
    for seed, cuts in ((0, [0, 75]), (1, [0, 1, 9, 10, 73, 75])):
        engine = load_on(
            lambda seed=seed: SimtDevice("bfloat16", seed=seed), folder, max_positions=300
        )
        with engine.session() as session:
            for start, stop in itertools.pairwise(cuts):
                session.prefill(tokens[start:stop])
            seen.add((*fingerprint_of(session), *session.generate(3)))
        engine.close()
    assert len(seen) == 1
