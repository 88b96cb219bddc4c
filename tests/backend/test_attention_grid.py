"""Attention of few rows: its grid goes by the device, not by the positions of the cache.

IS: the same bits where a block takes several blocks of keys and where it takes one; the size of the
grid. IS NOT: attention itself, see test_ops.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.kernels import Shape
from flashrt.backends.simt.device import SimtDevice
from flashrt.core.region import DType
from tests.backend.cases import attention
from tests.backend.runner import Runner

S = 1400  # positions: six blocks of keys


def grid(max_positions: int, n_sms: int, rows: int = 1) -> kernels.Grid:
    dims = {
        "T": rows, "TP": rows, "D": 256, "Nq": 24, "Nk": 4, "B": -(-max_positions // 256),
        "S": max_positions,
    }  # fmt: skip
    caches = {"keys": DType.BF16, "values": DType.BF16}
    shape = Shape("attention", dims, caches, {"shift": 0, "gated": 1}, DType.BF16, n_sms)
    return kernels.EXPANSIONS["attention"](shape)[0].grid


def test_the_grid_does_not_grow_with_the_cache() -> None:
    """Red: a grid over max_positions, of which most blocks find nothing to do."""
    assert grid(4096, 132) == (16, 4, 1)
    assert grid(262_144, 132) == (132, 4, 1)
    assert grid(262_144, 132, rows=9)[0] * grid(262_144, 132, rows=9)[1] <= 4 * 132


@pytest.fixture(scope="module")
def runners() -> Iterator[tuple[Runner, Runner]]:
    """A device whose blocks take several blocks of keys each, and one with as many as there are."""
    made = SimtDevice(multiprocessors=1, seed=3, is_watched=True), SimtDevice(multiprocessors=108)
    yield Runner(made[0]), Runner(made[1])
    for device in made:
        device.close()


@pytest.mark.parametrize(("position", "rows"), [(0, 1), (255, 1), (1276, 3), (1399, 1)])
@pytest.mark.parametrize("shift", [0, 1])
def test_blocks_that_take_several_have_the_bits_of_one_each(
    runners: tuple[Runner, Runner], position: int, rows: int, shift: int
) -> None:
    """Red: weights of a block of keys that are overwritten while a warp still reads them; a block
    that is left out, or taken twice.
    """
    case = attention(rows, rows, (4, 2), D=32, position=position, S=S, kv="bf16", shift=shift)
    few, many = (runner.run(case)["y"] for runner in runners)
    assert few.tobytes() == many.tobytes()
