"""One server for the tests that leave nothing behind which others would notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serve.wire.running import Running


@pytest.fixture(scope="package")
def server() -> Iterator[Running]:
    running = Running()
    yield running
    running.end()


@pytest.fixture
def started() -> Iterator[Callable[..., Running]]:
    """Starts servers of a test's own."""
    made: list[Running] = []

    def start(*arguments: Any, **options: Any) -> Running:
        made.append(Running(*arguments, **options))
        return made[-1]

    yield start
    for running in made:
        running.end()
