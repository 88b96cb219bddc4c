"""Backends for the tests of this folder: each that this machine has.

IS: the factory `make_backend` and the fixtures `device`, `runner` and `cpu`. IS NOT: tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.cuda.device import Precision, open_device
from flashrt.backends.simt.device import SimtDevice
from flashrt.core.backend import Backend
from tests.backend.runner import Runner

# Every test here runs on each of them; "-high" is precision "high".
BACKENDS = (
    "cpu",
    "simt",
    "simt-high",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("cuda-high", marks=pytest.mark.gpu),
)


def make_backend(name: str, threads: int | None = None) -> Backend:
    """A new device by name; `threads` matters to the cpu alone."""
    precision: Precision = "high" if name.endswith("-high") else "bfloat16"
    kind = name.removesuffix("-high")
    if kind == "simt":
        return SimtDevice(precision)
    if kind == "cuda":
        return open_device(precision)
    if name != "cpu":
        raise ValueError(
            f"no backend {name!r}; there are cpu, and simt and cuda with or without -high"
        )
    return CpuDevice(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what a test marked `only_on` does not speak of."""
    items[:] = [item for item in items if _is_about_its_device(item)]


def _is_about_its_device(item: pytest.Item) -> bool:
    callspec: Any = getattr(item, "callspec", None)
    device = callspec.params.get("device") if callspec else None
    return device is None or all(device in mark.args for mark in item.iter_markers("only_on"))


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


@pytest.fixture(scope="session")
def cpu() -> Iterator[Runner]:
    """The cpu, for the others to be held against."""
    backend = make_backend("cpu")
    yield Runner(backend)
    backend.close()
