"""A user's own kernel: a raw file, an op and an expansion; compiled, captured, named in errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashrt.backends.cuda.device import CudaDevice, open_device
from flashrt.backends.cuda.kernels import KernelLaunch, Shape
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError, CompileError, PlanError, SealedError
from flashrt.core.backend import BoundLaunch
from flashrt.core.op import Attr, Op, Param, bind
from flashrt.core.region import DType, Region, Role
from flashrt.core.runs import STRIDE_UNIT, TABLE_WORDS, Run, Stride, table_of
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


def test_a_kernel_over_runs(device: CudaDevice) -> None:
    """Each run scales the x of its lane; a third, which the grid has room for, is not there."""
    source = SOURCE.replace("scale_args a) {", "scale_args launch) {\n  OPEN_RUN(scale);")
    device.add_source(source, {"scale": expand}, name="scale.cu")
    device.build([SCALE])
    lane_bytes = 8192
    memory = device.allocate("arena", 3 * lane_bytes)
    table_at = device.allocate("runs", 4 * TABLE_WORDS).address
    strides = (Stride(lane=lane_bytes // STRIDE_UNIT),) * 2
    over = replace(launch(memory.address), runs=table_at, strides=strides, max_runs=3)
    graph = device.capture([over])
    x = np.arange(3 * N, dtype=np.float32).reshape(3, N)
    device.fill(memory.address, 3 * lane_bytes, 0)
    for lane in range(3):
        device.write(memory.address + lane * lane_bytes, x[lane].view(np.uint8))
    device.replay(graph, table_of((Run(2, 1), Run(0, 1))), table_at)
    raw = np.empty(3 * lane_bytes, np.uint8)
    device.read(memory.address, raw)
    y = raw.view(np.float32).reshape(3, -1)[:, N : 2 * N]
    assert (y == np.array([[2.5], [0], [2.5]], np.float32) * x).all()


def test_a_kernel_that_knows_no_runs_is_refused(device: CudaDevice) -> None:
    """Red: it would read lane 0 for every lane."""
    device.add_source(SOURCE, {"scale": expand}, name="scale.cu")
    device.build([SCALE])
    memory = device.allocate("arena", 8 * N)
    strides = (Stride(lane=1), Stride(lane=1))
    over = replace(launch(memory.address), runs=memory.address, strides=strides, max_runs=2)
    with pytest.raises(BackendError, match=r"let scale begin with OPEN_RUN\(scale\)"):
        device.capture([over])


def test_a_grid_without_room_for_runs_is_refused() -> None:
    with pytest.raises(PlanError, match="leaves no dimension for runs"):
        KernelLaunch("scale.cu", "scale", (), (1, 1, 2), (128, 1, 1)).of_runs(3)


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
