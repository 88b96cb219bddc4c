"""Threads of the CPU pool in this folder: one, where many small replays are struck.

IS: the fixture `one_thread`. Two test processes on two cores would otherwise wait for each other's
threads most of the time. No bit depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashrt.backends.cpu import device


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Engines that a file of tests loads run on the calling thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "thread_count", lambda: 1)
        yield
