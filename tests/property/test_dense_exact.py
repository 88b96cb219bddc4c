"""Promise 1 on a model without recurrent state: bitwise, however tokens came to be committed.

The cases are those of test_exact, on a dense decoder with biases and rotary scaling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on
from tests import dense_models
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


@pytest.fixture(scope="module", params=["llama-biased"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[flashrt.Engine]:
    folder = tmp_path_factory.mktemp("dense") / request.param
    dense_models.write(folder, dense_models.CONFIGS[request.param])
    engine = flashrt.load(folder, device="cpu", max_positions=640, lanes=4)
    yield engine
    engine.close()


def test_forks_and_capsule_files(engine: flashrt.Engine, tmp_path: Path) -> None:
    """Red when a capsule of a lane without recurrent state lacks something."""
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


def test_pieces_under_random_schedules_of_threads(tmp_path: Path) -> None:
    """The same on the CUDA kernels: red when a bias or an ungated head depends on the rows."""
    folder = dense_models.write(tmp_path / "qwen2", dense_models.CONFIGS["qwen2"])
    tokens, seen = [(5 * i * i + i) % dense_models.VOCAB for i in range(75)], set()
    for seed, cuts in ((0, [0, 75]), (1, [0, 1, 9, 10, 73, 75]), (2, [0, 64, 75])):
        engine = load_on(
            lambda seed=seed: SimtDevice("bfloat16", seed=seed), folder, max_positions=300
        )
        with engine.session() as session:
            for start, stop in itertools.pairwise(cuts):
                session.prefill(tokens[start:stop])
            seen.add((*fingerprint_of(session), *session.generate(3)))
        engine.close()
    assert len(seen) == 1
