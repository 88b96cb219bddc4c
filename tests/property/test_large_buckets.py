"""Promise 1 with launches of 1,024 and 2,048 rows: the bits of launches of at most 64.

On simt, under random schedules of threads. The split of K that such launches may have is in
tests/backend/test_split_k.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on

TINY = Path(__file__).parents[1] / "golden" / "tiny"
Found = tuple[bytes, str]


def engine_of(prefill_rows: int, seed: int) -> flashrt.Engine:
    return load_on(
        lambda: SimtDevice(seed=seed), TINY, max_positions=2300, prefill_rows=prefill_rows
    )


@pytest.fixture(scope="module")
def large() -> Iterator[flashrt.Engine]:
    engine = engine_of(2048, seed=3)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def small() -> Iterator[flashrt.Engine]:
    engine = engine_of(64, seed=0)
    yield engine
    engine.close()


def tokens_of(n: int, seed: int = 0) -> list[int]:
    return list(map(int, np.random.default_rng(seed).integers(0, 512, n)))


def found(session: flashrt.Session) -> Found:
    return session.logits().tobytes(), session.digest()


def in_pieces(engine: flashrt.Engine, tokens: list[int], pieces: list[int]) -> Found:
    assert sum(pieces) == len(tokens)
    with engine.session() as session:
        at = 0
        for n in pieces:
            session.prefill(tokens[at : at + n])
            at += n
        return found(session)


# 1,024 rows, 2,048 and more; whole launches and ragged ones.
PIECES = (
    [[700], [1, 699]],
    pytest.param([[1024], [300, 724], [1023, 1]], marks=pytest.mark.slow),
    pytest.param([[2250], [2048, 202], [1025, 1225], [257, 1, 1990, 2]], marks=pytest.mark.slow),
)


@pytest.mark.parametrize("ways", PIECES, ids=lambda ways: str(sum(ways[0])))
def test_any_partition(large: flashrt.Engine, small: flashrt.Engine, ways: list[list[int]]) -> None:
    """Red: an index or a grid that ends at 256 rows, a tile whose order follows its launch."""
    tokens = tokens_of(sum(ways[0]))
    wanted = in_pieces(small, tokens, [len(tokens)])
    for pieces in ways:
        assert in_pieces(large, tokens, pieces) == wanted, pieces


def test_any_row_bucket(large: flashrt.Engine, small: flashrt.Engine) -> None:
    """Red: a kernel that takes the rows of the launch for valid ones."""
    assert large.model.buckets == (1, 8, 64, 256, 1024, 2048)
    head, tail = tokens_of(30), tokens_of(50, seed=1)
    wanted = in_pieces(small, head + tail, [80])
    for bucket in large.model.buckets[2:]:
        with large.session() as session:
            session.prefill(head)
            large.prefill(session.lane, np.array(tail, np.int32), bucket)
            assert found(session) == wanted, bucket


def test_a_capsule_fits_an_engine_with_other_buckets(
    large: flashrt.Engine, small: flashrt.Engine, tmp_path: Path
) -> None:
    """Red: buckets in the fingerprint, or in what a capsule holds."""
    with large.session() as session:
        session.prefill(tokens_of(90))
        session.snapshot().save(tmp_path / "c")
        wanted = found(session)
    with small.session() as session:
        session.restore(small.load_capsule(tmp_path / "c"))
        assert found(session) == wanted
