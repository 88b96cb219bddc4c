"""Small engines for unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import flashrt

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def engine() -> flashrt.Engine:
    return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=400, lanes=3)


@pytest.fixture
def session(engine: flashrt.Engine) -> Iterator[flashrt.Session]:
    with engine.session() as session:
        yield session
    for capsule in list(engine.capsules.capsules):
        capsule.drop()
    engine.capsules.check_integrity()
