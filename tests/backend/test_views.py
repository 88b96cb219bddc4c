"""Views of device memory: what other libraries see is the memory itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from flashrt.backends.cuda.views import CUDA, DeviceArray
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError
from flashrt.core.region import DType, Layout, Region, Role

ROWS = Region("rows", (3, 4, 5), DType.F32, Role.ROWS)


@pytest.fixture
def device() -> Iterator[SimtDevice]:
    device = SimtDevice()
    yield device
    device.close()


def test_numpy_sees_writes_and_the_device_sees_numpy(device: SimtDevice) -> None:
    memory = device.allocate("arena", 4096)
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    device.write(memory.address + 256, array.view(np.uint8).reshape(-1))
    seen = device.view(ROWS, memory.address + 256).numpy()
    assert (seen == array).all()
    seen[1, 2, 3] = -7
    back = np.empty(4, np.uint8)
    device.read(memory.address + 256 + 4 * (20 + 10 + 3), back)
    assert back.view(np.float32)[0] == -7


def test_dlpack_is_the_memory_itself(device: SimtDevice) -> None:
    memory = device.allocate("arena", 4096)
    device.fill(memory.address, 4096, 0)
    view = device.view(ROWS, memory.address)
    seen = np.from_dlpack(view)
    assert seen.shape == (3, 4, 5)
    assert seen.dtype == np.float32
    assert seen.ctypes.data == memory.address
    assert view.__dlpack_device__() == (1, 0)


def test_dlpack_keeps_and_releases_its_view(device: SimtDevice) -> None:
    memory = device.allocate("arena", 4096)
    view = device.view(ROWS, memory.address)
    before = sys.getrefcount(view)
    used = np.from_dlpack(view)
    unused = view.__dlpack__()
    assert sys.getrefcount(view) == before + 2
    del used, unused
    gc.collect()
    assert sys.getrefcount(view) == before


def test_bfloat16_is_seen_as_bits(device: SimtDevice) -> None:
    memory = device.allocate("arena", 4096)
    bits = np.arange(16, dtype=np.uint16).reshape(4, 4)
    device.write(memory.address, bits.view(np.uint8).reshape(-1))
    region = Region("hidden", (4, 4), DType.ACT, Role.FIXED)
    assert (device.view(region, memory.address).numpy() == bits).all()


def test_matrices_are_refused(device: SimtDevice) -> None:
    region = Region("w", (16, 32), DType.BF16, Role.WEIGHT, Layout.MATRIX)
    with pytest.raises(BackendError, match="tensor-core operands"):
        device.view(region, 0)


def test_each_kind_of_memory_has_its_interface(device: SimtDevice) -> None:
    memory = device.allocate("arena", 4096)
    assert not hasattr(device.view(ROWS, memory.address), "__cuda_array_interface__")
    on_gpu = DeviceArray(0x7000, (2, 3), DType.BF16, (CUDA, 3), 99, device)
    assert on_gpu.__cuda_array_interface__ == {
        "shape": (2, 3), "typestr": "<u2", "data": (0x7000, False), "strides": None,
        "stream": 99, "version": 3,
    }  # fmt: skip
    assert on_gpu.__dlpack_device__() == (2, 3)
    with pytest.raises(BackendError, match="numpy cannot see device memory"):
        on_gpu.numpy()
