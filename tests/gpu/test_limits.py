"""The bare kernels behind each limit do all of the work that their rates are counted from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from flashrt.backends.cuda.device import CudaDevice, open_device
from flashrt.backends.cuda.extra_ops import (
    MMA_CHAINS,
    THREADS,
    add_kernels,
    copy_stream,
    mma_flop,
    mma_rate,
    read_stream,
)
from flashrt.backends.cuda.limits import LimitSizes, measure_limits
from flashrt.backends.simt.device import SimtDevice
from flashrt.ops import OPS

NBYTES = 16 * 70_001  # off every multiple: tails of blocks and of threads
BLOCKS = 7


@pytest.fixture
def device(device_name: str) -> Iterator[CudaDevice]:
    """On simt with the race detector."""
    made = open_device() if device_name == "cuda" else SimtDevice(seed=3, is_watched=True)
    add_kernels(made)
    made.build(OPS)
    yield made
    made.close()


def random_words(device: CudaDevice, address: int) -> np.ndarray:
    words = np.random.default_rng(8).integers(0, 1 << 32, NBYTES // 4, dtype=np.uint32)
    device.write(address, words.view(np.uint8))
    return words


def test_every_byte_is_copied_and_none_beyond(device: CudaDevice) -> None:
    src, dst = (device.allocate(name, NBYTES + 64).address for name in ("src", "dst"))
    words = random_words(device, src)
    device.fill(dst, NBYTES + 64, 0xA5)
    device.eager([copy_stream(src, dst, NBYTES)])
    found = np.empty(NBYTES // 4 + 16, np.uint32)
    device.read(dst, found.view(np.uint8))
    assert np.array_equal(found[:-16], words)
    assert (found[-16:] == 0xA5A5A5A5).all()


def test_every_byte_is_read(device: CudaDevice) -> None:
    src, out = device.allocate("src", NBYTES).address, device.allocate("out", 4 * BLOCKS).address
    words = random_words(device, src)
    device.eager([read_stream(src, out, NBYTES, BLOCKS)])
    found = np.empty(BLOCKS, np.uint32)
    device.read(out, found.view(np.uint8))
    assert np.bitwise_xor.reduce(found) == np.bitwise_xor.reduce(words)
    assert (found != 0).all()  # every block had a part


def test_every_mma_is_in_the_sum(device: CudaDevice) -> None:
    """Chains are alike and start from zero, so that sums grow with the steps, in every thread."""
    found = []
    out = device.allocate("out", 4 * THREADS).address
    for steps in (1, 2, 4):
        device.eager([mma_rate(out, 1, steps)])
        sums = np.empty(THREADS, np.float32)
        device.read(out, sums.view(np.uint8))
        found.append(sums.astype(np.float64))
    assert np.isfinite(found).all()
    assert (np.abs(found[0]) > 0).mean() > 0.9
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-3, atol=1e-2 * MMA_CHAINS)
    np.testing.assert_allclose(found[2], 4 * found[0], rtol=1e-3, atol=1e-2 * MMA_CHAINS)
    assert mma_flop(1, 4) == 4 * 8 * MMA_CHAINS * 4096


@pytest.mark.gpu
def test_limits_of_a_gpu_are_those_of_a_gpu() -> None:
    """Wide bounds: what is below or above them is a mistake in measuring, not a GPU."""
    found = measure_limits(open_device, LimitSizes(repeats=3))
    assert 5e10 < found.kernel_copy_bytes_per_s < 2e13
    assert 5e10 < found.driver_copy_bytes_per_s < 2e13
    assert 5e10 < found.read_bytes_per_s < 2e13
    assert 5e12 < found.mma_flops < 5e15
