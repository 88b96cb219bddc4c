"""Engines for the exactness suite: the tiny golden model, several lanes, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashrt

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def engine() -> flashrt.Engine:
    """Three lanes: two for the machine, one for its oracle."""
    return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=640, lanes=4)
