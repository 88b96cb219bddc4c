"""A user's own kernel: a raw file, an op and an expansion; compiled, captured, named in errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashrt.backends.cuda.device import CudaDevice, open_device
from flashrt.backends.cuda.kernels import KernelLaunch, Shape
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError, CompileError, SealedError
from flashrt.core.backend import BoundLaunch
from flashrt.core.op import Attr, Op, Param, bind
from flashrt.core.region import DType, Region, Role
from flashrt.ops.table import OPS

SCALE = Op("scale", "y = factor * x", (Param("x", "r", ("N",)), Param("y", "w", ("N",))), (
    Attr("factor", "float32"),
))  # fmt: skip
SOURCE = """
#include "flashrt.cuh"
KERNEL(BLOCK) scale(ARGS scale_args a) {
  begin();
  int i = blockIdx.x * BLOCK + threadIdx.x;
  if (i < a.N) a.y[i] = a.factor * a.x[i];
}
"""
N = 1000


def expand(shape: Shape) -> tuple[KernelLaunch, ...]:
    grid = (-(-shape.dims["N"] // 128), 1, 1)
    return (KernelLaunch("scale.cu", "scale", (("BLOCK", 128),), grid, (128, 1, 1)),)


@pytest.fixture(params=["simt", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[CudaDevice]:
    device = SimtDevice(seed=3) if request.param == "simt" else open_device()
    yield device
    device.close()


def launch(address: int) -> BoundLaunch:
    x, y = (Region(name, (N,), DType.F32, Role.IO) for name in "xy")
    return BoundLaunch(bind(SCALE, {"x": x, "y": y}, {"factor": 2.5}), (address, address + 4 * N))


def run(device: CudaDevice) -> None:
    memory = device.allocate("arena", 8 * N)
    graph = device.capture([launch(memory.address)])
    device.seal()
    x = np.linspace(-3, 3, N, dtype=np.float32)
    device.write(memory.address, x.view(np.uint8))
    device.replay(graph)
    y = np.empty(4 * N, np.uint8)
    device.read(memory.address + 4 * N, y)
    assert (y.view(np.float32) == np.float32(2.5) * x).all()


def test_kernel_from_text(device: CudaDevice) -> None:
    device.add_source(SOURCE, {"scale": expand}, name="scale.cu")
    device.build([*OPS, SCALE])
    run(device)
    with pytest.raises(SealedError, match="add a kernel source"):
        device.add_source(SOURCE, {"more": expand}, name="more.cu")


def test_kernel_from_a_file(device: CudaDevice, tmp_path: Path) -> None:
    (tmp_path / "scale.cu").write_text(SOURCE)
    device.add_source(tmp_path / "scale.cu", {"scale": expand})
    device.build([SCALE])
    run(device)


def test_an_own_kernel_changes_the_fingerprint(device: CudaDevice) -> None:
    device.build(OPS)
    before = device.kernel_digest
    device.add_source(SOURCE, {"scale": expand}, name="scale.cu")
    assert device.kernel_digest != before


def test_mistakes_are_named(device: CudaDevice) -> None:
    with pytest.raises(BackendError, match=r"no CUDA kernels for ops \['scale'\]"):
        device.build([SCALE])
    with pytest.raises(BackendError, match=r"ops \['linear'\] have expansions already"):
        device.add_source(SOURCE, {"linear": expand}, name="scale.cu")
    with pytest.raises(BackendError, match="needs a name"):
        device.add_source(SOURCE, {"scale": expand})
    with pytest.raises(CompileError, match="choose another name"):
        device.add_source(SOURCE, {"scale": expand}, name="copy.cu")


def test_a_source_that_does_not_compile_shows_the_log(device: CudaDevice) -> None:
    device.add_source(SOURCE.replace("a.factor", "factor"), {"scale": expand}, name="scale.cu")
    device.build([SCALE])
    memory = device.allocate("arena", 8 * N)
    with pytest.raises(CompileError, match=r"scale.cu -DBLOCK=128 does not compile(.|\n)*factor"):
        device.capture([launch(memory.address)])


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(BackendError, match="precision 'half' is not one of"):
        SimtDevice("half")  # type: ignore[arg-type]
