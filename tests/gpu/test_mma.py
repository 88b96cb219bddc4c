"""What exactness rests on in hardware: a column of mma depends on no other column.

The canonical order of `linear` puts tokens into the columns of one instruction, alone or in
company. The simt device has it by construction; a GPU is asked here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cuda.device import CudaDevice
from flashrt.backends.cuda.kernels import KernelLaunch, Shape
from flashrt.core.backend import BoundLaunch
from flashrt.core.op import Op, Param, bind
from flashrt.core.region import DType, Region, Role
from flashrt.ops import OPS
from tests.gpu.conftest import open_named

LANES = 32
BLOCKS = {"simt": 8, "cuda": 4096}
Words = NDArray[np.uint32]


def operand(name: str, access: str, words: int, dtype: DType) -> Param:
    return Param(name, access, ("blocks", LANES, words), (dtype,))  # type: ignore[arg-type]


MMA = Op(
    "mma_columns",
    "d = a b + c",
    (
        operand("a", "r", 4, DType.U32),
        operand("b", "r", 2, DType.U32),
        operand("c", "r", 4, DType.F32),
        operand("d", "w", 4, DType.F32),
    ),
)


def expansion(shape: Shape) -> tuple[KernelLaunch, ...]:
    grid = (shape.dims["blocks"], 1, 1)
    return (KernelLaunch("mma_columns.cu", "mma_columns", (), grid, (LANES, 1, 1)),)


class Multiplier:
    """Runs many mma at once; d as the 16 x 8 tiles that lanes hold parts of."""

    def __init__(self, device: CudaDevice, blocks: int) -> None:
        self.device, self.blocks = device, blocks
        device.add_source(Path(__file__).with_name("mma_columns.cu"), {"mma_columns": expansion})
        device.build(OPS)
        regions = {
            p.name: Region(p.name, (blocks, LANES, p.dims[2]), p.dtypes[0], Role.IO)  # type: ignore[arg-type]
            for p in MMA.params
        }
        sizes = {name: 4 * r.size for name, r in regions.items()}
        self.at = {name: device.allocate(name, size).address for name, size in sizes.items()}
        self.launch = BoundLaunch(bind(MMA, dict(regions), {}), tuple(self.at.values()))

    def run(self, a: Words, b: Words, c: Words) -> Words:
        """Bits of d, [blocks, 16, 8]."""
        for name, array in (("a", a), ("b", b), ("c", c)):
            self.device.write(self.at[name], np.ascontiguousarray(array).view(np.uint8).reshape(-1))
        self.device.eager([self.launch])
        d = np.empty((self.blocks, LANES, 4), np.uint32)
        self.device.read(self.at["d"], d.view(np.uint8).reshape(-1))
        tile = d.reshape(self.blocks, 8, 4, 2, 2)  # [g][t][half of rows][column of two]
        return tile.transpose(0, 3, 1, 2, 4).reshape(self.blocks, 16, 8)


def bfloat16_pairs(rng: np.random.Generator, *shape: int) -> Words:
    """Random normal bfloat16 of exponents over sixteen binades, two to a word."""
    halves = rng.integers(0, 1 << 16, (*shape, 2), dtype=np.uint32)
    exponent = rng.integers(120, 136, (*shape, 2), dtype=np.uint32)
    bits = halves & 0x807F | exponent << 7
    return (bits[..., 0] | bits[..., 1] << 16).astype(np.uint32)


@pytest.fixture
def inputs(device_name: str) -> tuple[Words, Words, Words]:
    rng, n = np.random.default_rng(3), BLOCKS[device_name]
    a, b = bfloat16_pairs(rng, n, LANES, 4), bfloat16_pairs(rng, n, LANES, 2)
    c = (rng.standard_normal((n, LANES, 4)) * 10).astype(np.float32).view(np.uint32)
    return a, b, c


def with_others(
    column: int, b: Words, c: Words, other_b: Words, other_c: Words
) -> tuple[Words, Words]:
    """Operands that keep one column: b of lanes 4 column + t, c of lanes 4 g + column // 2."""
    mixed_b, mixed_c = other_b.copy(), other_c.copy()
    mixed_b[:, 4 * column : 4 * column + 4] = b[:, 4 * column : 4 * column + 4]
    for half in (0, 2):
        at = (slice(None), slice(column // 2, None, 4), half + column % 2)
        mixed_c[at] = c[at]
    return mixed_b, mixed_c


def test_a_column_does_not_depend_on_the_others(
    device_name: str, inputs: tuple[Words, Words, Words]
) -> None:
    a, b, c = inputs
    n = len(a)
    rng = np.random.default_rng(4)
    zeros = np.zeros_like
    companies = {
        "zeros": (zeros(b), zeros(c)),
        "random": (bfloat16_pairs(rng, n, LANES, 2), zeros(c)),
        "infinities": (np.full_like(b, 0x7F807F80), np.full_like(c, 0x7F800000)),
        "nans": (np.full_like(b, 0xFFFFFFFF), np.full_like(c, 0xFFFFFFFF)),
    }
    device = open_named(device_name)
    try:
        multiplier = Multiplier(device, n)
        expected = multiplier.run(a, b, c)
        assert len(np.unique(expected)) > n  # sums of their own, not one constant
        for company, others in companies.items():
            for column in range(8):
                found = multiplier.run(a, *with_others(column, b, c, *others))
                assert np.array_equal(found[..., column], expected[..., column]), (company, column)
    finally:
        device.close()


def test_a_column_does_not_depend_on_where_it_stands(
    device_name: str, inputs: tuple[Words, Words, Words]
) -> None:
    """The same token in column j of one launch and column k of another."""
    a, b, c = inputs
    device = open_named(device_name)
    try:
        multiplier = Multiplier(device, len(a))
        zero = np.zeros_like(c)
        expected = multiplier.run(a, b, zero)
        turned = np.roll(b.reshape(len(b), 8, 4, 2), 3, axis=1).reshape(b.shape)
        found = multiplier.run(a, turned, zero)
        assert np.array_equal(found, np.roll(expected, 3, axis=2))
    finally:
        device.close()
