"""Promise 1 on a model of codes: bitwise, however tokens came to be committed.

The cases are those of test_exact, on matrices of float8 in blocks, of NVFP4 and of bfloat16, some
of them parts of one stacked matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on
from tests.property.test_exact import (
    fingerprint_of,
    test_any_partition_of_a_prompt,
    test_any_row_bucket,
    test_decode_equals_prefill_of_what_it_yielded,
    test_guards_are_whole,
    test_poison_then_restore_is_complete,
    test_rollback_to_any_position,
)
from tests.quantised_models import FORMS, SHAPE, write_both

__all__ = [
    "test_any_partition_of_a_prompt",
    "test_any_row_bucket",
    "test_decode_equals_prefill_of_what_it_yielded",
    "test_guards_are_whole",
    "test_poison_then_restore_is_complete",
    "test_rollback_to_any_position",
]
MIXED = next(form for form in FORMS if form.name == "mixed")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flashrt.Engine]:
    folder, _ = write_both(tmp_path_factory.mktemp("models"), MIXED)
    engine = flashrt.load(folder, device="cpu", max_positions=640, lanes=4)
    yield engine
    engine.close()


@pytest.mark.slow
def test_pieces_under_random_schedules_of_threads(tmp_path: Path) -> None:
    """The same on the CUDA kernels: red when the fold of a scale depends on the rows."""
    folder, _ = write_both(tmp_path, MIXED)
    tokens = [(5 * i * i + i) % SHAPE.vocab_size for i in range(75)]
    seen = set()
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
