"""Devices for the tests of this folder: the GPU where there is one, and the simt device as its dry
run.

IS: `open_gpu`, which skips with the probe's reason, and the fixture `device_name` over both. A test
that says something about hardware alone is marked `gpu` itself. IS NOT: tests.
"""

from __future__ import annotations

import pytest

from flashrt.backends.cuda.device import CudaDevice, Precision, open_device
from flashrt.backends.cuda.probe import probe
from flashrt.backends.simt.device import SimtDevice


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_name(request: pytest.FixtureRequest) -> str:
    """simt always, cuda where it is usable."""
    name: str = request.param
    if name == "cuda":
        require_gpu()
    return name


@pytest.fixture
def gpu() -> None:
    """Skips where there is no GPU."""
    require_gpu()


def require_gpu() -> None:
    status = probe()
    if not status.is_usable:
        pytest.skip(str(status))


def open_named(name: str, precision: Precision = "bfloat16") -> CudaDevice:
    """A new device by name."""
    return SimtDevice(precision) if name == "simt" else open_device(precision)
