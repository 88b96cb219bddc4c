"""The bundled model: an engine to serve with, and another to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import flashrt
from flashrt.serve.core import Core
from flashrt.weights.bundled import bundled_checkpoint

LANES, LIMIT = 4, 1024


def load(
    lanes: int = LANES,
    limit: int = LIMIT,
    pool_bytes: int = 64 << 20,
    prefill_rows: int | None = None,
) -> flashrt.Engine:
    return flashrt.load(
        bundled_checkpoint(), device="cpu", max_positions=limit, lanes=lanes, pool_bytes=pool_bytes,
        prefill_rows=prefill_rows,
    )  # fmt: skip


@pytest.fixture(scope="session")
def other() -> Iterator[flashrt.Engine]:
    """Nobody is served by it."""
    with load(lanes=1) as engine:
        yield engine


@pytest.fixture
def serving() -> Iterator[Callable[..., Core]]:
    """Makes a core on an engine of its own, and closes both."""
    made: list[Core] = []

    def make(engine: flashrt.Engine | None = None, **options: object) -> Core:
        core = Core(engine or load(), **options)  # type: ignore[arg-type]
        made.append(core)
        return core.start()

    yield make
    for core in made:
        core.close(drain=False)
        core.engine.close()
