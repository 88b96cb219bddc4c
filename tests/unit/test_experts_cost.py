"""What a launch over experts costs: weights of those that are hit, once, by one of its kernels."""

from __future__ import annotations

import pytest

from flashrt.backends.cuda.device import ACTS
from flashrt.backends.cuda.kernels import expand
from flashrt.commands.bench.gpu.cost.effort import Effort, Task, effort_of, moved_by
from flashrt.core.op import Launch, bind
from flashrt.core.region import DType, Layout, Region, Role
from flashrt.ops.experts import EXPERTS_IN, EXPERTS_OUT
from flashrt.ops.work import experts_hit, work_of

E, P, H, I = 256, 8, 2048, 512  # noqa: E741  of Qwen3.5 35B-A3B
BFLOAT16 = ACTS["bfloat16"]


def launches(rows: int) -> dict[str, Launch]:
    """Both ops, of weights in bfloat16."""

    def scratch(name: str, *shape: int, dtype: DType = DType.F32) -> Region:
        return Region(name, shape, dtype, Role.SCRATCH)

    def matrix(name: str, *shape: int) -> Region:
        return Region(name, shape, DType.BF16, Role.WEIGHT, Layout.MATRIX)

    h = scratch("h", rows, P, I, dtype=DType.ACT_WIDE)
    shared = {
        "picks": scratch("picks", rows, P, dtype=DType.I32), "h": h,
        "cursor": scratch("cursor", 16, dtype=DType.I32),
        "groups": scratch("groups", E, 2, dtype=DType.I32),
        "members": scratch("members", rows, P, 2, dtype=DType.I32),
    }  # fmt: skip
    x = scratch("x", rows, H, dtype=DType.ACT_WIDE)
    return {
        "in": bind(EXPERTS_IN, shared | {"x": x, "w": matrix("in", 2 * E * I, H)}, {}),
        "out": bind(
            EXPERTS_OUT,
            shared | {
                "w": matrix("out", E * H, I), "gates": scratch("gates", rows, P),
                "products": scratch("products", rows, P, H), "y": scratch("y", rows, H),
            },
            {},
        ),
    }  # fmt: skip


def test_bytes_are_those_of_the_experts_that_are_hit() -> None:
    """Red: all experts are read for one row; an expert is read once per row that picked it."""
    assert experts_hit(1, P, E) == P
    assert 2 * P > experts_hit(2, P, E) > 2 * P - 1
    assert experts_hit(2048, P, E) == pytest.approx(E)
    for rows, hit in ((1, P), (2048, E)):
        for launch, whole in zip(
            launches(rows).values(), (4 * E * I * H, 2 * E * H * I), strict=True
        ):
            found = moved_by(launch, BFLOAT16, 0).by_name["w"]
            assert found == pytest.approx(whole * hit / E, rel=1e-6)
            flop = work_of(launch, BFLOAT16, 0).flop
            assert flop == rows * P * whole // E  # two per weight, which has two bytes


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_one_kernel_of_an_op_reads_the_weights(rows: int) -> None:
    """Red: the kernel that groups picks waits for the weights; or nobody does."""
    for launch in launches(rows).values():
        moved, efforts = moved_by(launch, BFLOAT16, 0), list[Effort]()
        for i, kernel in enumerate(expand(launch, BFLOAT16, 132, "sm_90")):
            task = Task(kernel, launch, BFLOAT16, rows, 0, moved, i == 0)
            efforts.append(effort_of(task, lambda _: 132))
        assert [bool(e.is_reader) for e in efforts].count(True) == 1
        (reader,) = (e for e in efforts if e.is_reader)
        products = work_of(launch, BFLOAT16, 0).flop / (2 * 16 * 8 * 16)
        assert reader.tensor >= 2 * products  # x goes in two parts, and tiles are not full
