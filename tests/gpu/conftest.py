"""Devices for the tests of this folder: the GPU, and the simt device as its dry run.

IS: the fixture `device_name` over both. A test that says something about hardware alone is marked
`gpu` itself; the suite's conftest leaves those out where there is no GPU. IS NOT: tests.
"""

from __future__ import annotations

import pytest

from flashrt.backends.cuda.device import CudaDevice, Precision, open_device
from flashrt.backends.simt.device import SimtDevice


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def device_name(request: pytest.FixtureRequest) -> str:
    """Each device."""
    name: str = request.param
    return name


def open_named(name: str, precision: Precision = "bfloat16") -> CudaDevice:
    """A new device by name."""
    return SimtDevice(precision) if name == "simt" else open_device(precision)
