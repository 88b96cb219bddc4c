"""Backends for the tests of this folder: each that this machine can open.

IS: the factory `make_backend` and the fixtures `device` and `runner`. IS NOT: tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.simt.device import SimtDevice
from flashrt.core.backend import Backend
from tests.backend.runner import Runner

BACKENDS = ("cpu",)  # which of those that `make_backend` knows every test here runs on


def make_backend(name: str, threads: int | None = None) -> Backend:
    """A new device by name; `threads` matters to the cpu alone."""
    if name == "cpu":
        return CpuDevice(threads)
    if name == "simt":
        return SimtDevice()
    raise ValueError(f"no backend {name!r}; there are cpu and simt")


@pytest.fixture(scope="session", params=BACKENDS)
def device(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """An open backend, not yet built."""
    backend = make_backend(request.param)
    yield backend
    backend.close()


@pytest.fixture(scope="session")
def runner(device: Backend) -> Runner:
    """Runs single launches on the backend, all ops built."""
    return Runner(device)
