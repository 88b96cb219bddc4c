"""Formats of stored weights: blocks of ggml against ggml's own package, and the dequantiser against
exact arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.region import CODE_DTYPES, DType
from flashrt.weights.formats.blocks import BLOCK_TYPES, BlockMatrix
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.reordered import ColumnsReordered, RowsReordered
from flashrt.weights.formats.stored import PlainMatrix, Rows, StoredMatrix, Tensor

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
RANGES = {
    DType.I8: (-128, 127), DType.U4: (0, 15), DType.U5: (0, 31), DType.U6: (0, 63),
    DType.E4M3: (0, 0x7E), DType.E2M1: (0, 15),
}  # fmt: skip


def random_blocks(kind: str, count: int, seed: int = 0) -> Bytes:
    """Blocks of random bytes with scales that are finite: zeros, extremes and small ones too."""
    rng, layout = np.random.default_rng(seed), BLOCK_TYPES[kind].layout
    raw = rng.integers(0, 256, count * layout.itemsize, dtype=np.uint8)
    special = np.array([0, -0.0, 6e-8, -6e-8, 6e-5, 65504, -65504, 1], np.float16)
    for field in layout.names or ():
        if layout[field] == np.float16:
            scales = rng.normal(size=count).astype(np.float16)
            scales[: len(special)] = special[:count]
            raw.view(layout)[field] = rng.permutation(scales)
    return raw


def same_bits(got: NDArray[np.generic], expected: NDArray[np.generic]) -> bool:
    return bool((got.view(np.uint32) == expected.view(np.uint32)).all())


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_are_ggml_s_to_the_bit(kind: str) -> None:
    """Red if a nibble, a high bit or a scale is taken from the wrong place."""
    block, theirs = BLOCK_TYPES[kind], gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[theirs] == (block.elements, block.layout.itemsize)
    raw = random_blocks(kind, 60)
    planes = block.planes(raw, 5)
    assert planes.shape == (5, 12 * block.elements)
    assert planes.codes.dtype == (np.int8 if block.dtype is DType.I8 else np.uint8)
    low, high = RANGES[block.dtype]
    assert low <= planes.codes.min() <= planes.codes.max() <= high
    for plane, made in zip(block.groups.planes, planes.scales, strict=True):
        assert made.dtype == plane.dtype
    expected = gguf.quants.dequantize(raw.reshape(5, -1), theirs)
    assert same_bits(dequantise(block.dtype, block.groups, planes), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_ggml_quantises(kind: str) -> None:
    """Red if real blocks, whose codes and scales belong together, come out as other values."""
    theirs = gguf.GGMLQuantizationType[kind]
    weights = np.random.default_rng(1).normal(size=(4, 96)).astype(np.float32)
    raw = gguf.quants.quantize(weights, theirs)
    block = BLOCK_TYPES[kind]
    made = dequantise(block.dtype, block.groups, block.planes(raw.reshape(-1), 4))
    assert same_bits(made, gguf.quants.dequantize(raw, theirs))
    assert np.abs(made - weights).max() < 0.4


# -- the dequantiser ------------------------------------------------------------------------------


def nearest(exact: Fraction) -> np.float32:
    """The float32 that an exact value rounds to, ties to even."""
    guess = np.float32(float(exact))
    near = [
        guess,
        np.nextafter(guess, np.float32(-np.inf)),
        np.nextafter(guess, np.float32(np.inf)),
    ]
    best = min(abs(Fraction(float(v)) - exact) for v in near)
    ties = [v for v in near if abs(Fraction(float(v)) - exact) == best]
    return next(v for v in ties if len(ties) == 1 or int(v.view(np.uint32)) % 2 == 0)


def value_of(dtype: DType, groups: Groups, code: int, scales: Sequence[float]) -> np.float32:
    """One value by the formulas of core.groups, in exact arithmetic, rounded where they say."""
    if dtype is DType.E4M3:
        sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
        q = Fraction(mantissa + 8 * (exponent > 0)) * Fraction(2) ** (max(exponent, 1) - 10)
        q = -q if sign else q
    elif dtype is DType.E2M1:
        exponent, mantissa = code >> 1 & 3, code & 1
        q = Fraction(mantissa + 2 * (exponent > 0)) * Fraction(2) ** (max(exponent, 1) - 2)
        q = -q if code >> 3 else q
    else:
        q = Fraction(code)
    if not groups.scales.has_min and dtype in (DType.U4, DType.U5, DType.U6):
        q -= {DType.U4: 8, DType.U5: 16, DType.U6: 32}[dtype]
    exact = [Fraction(v) for v in scales]
    match groups.scales:
        case Scales.TWO_LEVEL:
            s, m = exact[0] * exact[1], Fraction(0)
        case Scales.TWO_LEVEL_MIN:
            s, m = exact[0] * exact[2], -exact[1] * exact[3]
        case Scales.E4M3_TIMES:
            s, m = Fraction(float(nearest(exact[0] * exact[1]))), Fraction(0)
        case Scales.E4M3_OVER:
            s, m = Fraction(float(nearest(exact[0] / exact[1]))), Fraction(0)
        case _:
            s, m = exact[0], exact[1] if groups.scales.has_min else Fraction(0)
    return nearest(q * s + m)


E4M3 = [value_of(DType.E4M3, Groups(32, Scales.F32), c, [1.0]) for c in range(0x7F)]
halves = st.floats(-8, 8, width=16)
singles = st.floats(2**-20, 64, width=32) | st.floats(-64, -(2**-20), width=32)


@functools.cache
def plane_values(groups: Groups) -> st.SearchStrategy[tuple[float, ...]]:
    """An element of each plane."""
    by_dtype: dict[str, st.SearchStrategy[float]] = {
        "float16": halves, "float32": singles, "int8": st.integers(-128, 127).map(float),
        "uint8": st.integers(0, 255).map(float),
    }  # fmt: skip
    kinds = [by_dtype[plane.dtype.name] for plane in groups.planes]
    if groups.scales in (Scales.E4M3_TIMES, Scales.E4M3_OVER):
        kinds[0] = st.integers(0, 0x7E).map(float)  # bits
    return st.tuples(*kinds)


ALL_GROUPS = [
    Groups(size, scales, 32 if scales in (Scales.TWO_LEVEL, Scales.TWO_LEVEL_MIN) else 0)
    for size in (16, 32)
    for scales in Scales
]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data(), st.sampled_from(CODE_DTYPES), st.sampled_from(ALL_GROUPS), st.integers(1, 70))
def test_values_are_rounded_once(
    data: st.DataObject, dtype: DType, groups: Groups, columns: int
) -> None:
    """Red if a zero, a sign or a plane is missed, a group's end is wrong, or a value is rounded
    twice."""
    element = data.draw(plane_values(groups))
    code = data.draw(st.integers(*RANGES[dtype]))
    codes = np.full((2, columns), code, np.int8 if dtype is DType.I8 else np.uint8)
    shapes = [(2, -(-columns // p.size) if p.size else 1) for p in groups.planes]
    planes = []
    for plane, shape, value in zip(groups.planes, shapes, element, strict=True):
        array = np.full(shape, value).astype(plane.dtype)
        array[0] = 0  # what is compared is row 1, in the last group
        array[1, :-1] = 0
        planes.append(array)
    scales = list(element)
    if groups.scales in (Scales.E4M3_TIMES, Scales.E4M3_OVER):
        scales[0] = float(E4M3[int(scales[0])])
    made = dequantise(dtype, groups, Planes(codes, tuple(planes)))
    assert made.shape == (2, columns)
    assert made[1, -1] == value_of(dtype, groups, code, scales)


def test_a_tie_that_the_minimum_breaks() -> None:
    """Red if q s + m is summed in float64 and then rounded: the second rounding sees a tie."""
    s, m = np.float32(1 + 2**-23), np.float32(-(2**-60))
    planes = Planes(np.full((1, 32), 3, np.uint8), (np.full((1, 1), s), np.full((1, 1), m)))
    groups = Groups(32, Scales.F32_MIN)
    expected = value_of(DType.U4, groups, 3, [float(s), float(m)])
    assert (dequantise(DType.U4, groups, planes) == expected).all()
    assert expected != np.float32(3 * np.float64(s) + np.float64(m))


def test_values_stay_values() -> None:
    """Red if bfloat16 bits are taken for numbers."""
    bits = np.array([[0x3F80, 0xC000]], np.uint16)
    assert dequantise(DType.BF16, None, bits).tolist() == [[1.0, -2.0]]
    assert dequantise(DType.F16, None, np.array([[0.5]], np.float16)).tolist() == [[0.5]]


def test_rows_and_groups_that_do_not_belong_together() -> None:
    """Red if planes of another shape are stretched over the codes."""
    groups = Groups(32, Scales.F16)
    codes = np.zeros((2, 64), np.uint8)
    with pytest.raises(PlanError, match="expected"):
        dequantise(DType.U4, groups, Planes(codes, (np.ones((2, 1), np.float16),)))
    with pytest.raises(PlanError, match="codes need groups"):
        dequantise(DType.U4, None, Planes(codes, ()))
    with pytest.raises(PlanError, match="groups need codes"):
        dequantise(DType.F32, groups, np.zeros((2, 64), np.float32))


# -- matrices -------------------------------------------------------------------------------------


class Source:
    """Bytes of one tensor, and which of them were read, in order."""

    def __init__(self, raw: Bytes) -> None:
        self.raw = raw
        self.seen: list[tuple[int, int]] = []

    def read(self, tensor: Tensor, first_byte: int, out: memoryview) -> None:
        out[:] = self.raw[first_byte : first_byte + len(out)].data
        self.seen += [(first_byte, first_byte + len(out))]

    @property
    def order(self) -> list[int]:
        return [i for start, stop in self.seen for i in range(start, stop)]


def rows_of(matrix: StoredMatrix, source: Source, chunk: int) -> list[Rows]:
    return [
        matrix.read(at, min(chunk, matrix.shape[0] - at), source.read)
        for at in range(0, matrix.shape[0], chunk)
    ]


def values_of(matrix: StoredMatrix, source: Source, chunk: int = 32) -> Floats:
    parts = rows_of(matrix, source, chunk)
    return np.concatenate([dequantise(matrix.dtype, matrix.groups, part) for part in parts])


def tensor_of(kind: str, rows: int, columns: int, raw: Bytes) -> Tensor:
    return Tensor("blk.0.ssm_out.weight", kind, (rows, columns), Path("f.gguf"), 0, raw.nbytes)


ORDER = np.random.default_rng(5).permutation(96)


@pytest.mark.parametrize("kind", ["F32", "Q5_1"])
@pytest.mark.parametrize("is_reordered", [False, True])
def test_rows_in_any_chunks(kind: str, is_reordered: bool) -> None:
    """Red if a byte is read twice or in an order that depends on the chunks: digests would too."""
    if kind == "F32":
        raw = np.random.default_rng(0).normal(size=96 * 64).astype(np.float32).view(np.uint8)
        stored: PlainMatrix | BlockMatrix = PlainMatrix(tensor_of(kind, 96, 64, raw))
    else:
        raw = random_blocks(kind, 96 * 2)
        stored = BlockMatrix(tensor_of(kind, 96, 64, raw))
    expected = values_of(stored, Source(raw), 96)
    expected = expected[ORDER] if is_reordered else expected
    for chunk in (32, 64, 96):
        matrix = RowsReordered(stored, ORDER) if is_reordered else stored
        source = Source(raw)
        assert (values_of(matrix, source, chunk) == expected).all()
        assert source.order == list(range(raw.nbytes))


def test_reordered_rows_begin_at_the_first() -> None:
    """Red if rows of a matrix that was not read yet are made up."""
    raw = random_blocks("Q8_0", 96)
    matrix = RowsReordered(BlockMatrix(tensor_of("Q8_0", 96, 32, raw)), ORDER)
    with pytest.raises(CheckpointError, match="from row 0 on"):
        matrix.read(32, 32, Source(raw).read)


@pytest.mark.parametrize(
    ("kind", "run", "size", "outer"),
    [("Q4_K", 64, 32, 64), ("Q6_K", 128, 16, 128), ("Q8_0", 16, 16, 0), ("Q4_1", 96, 32, 0)],
)
def test_columns_move_with_their_scales(kind: str, run: int, size: int, outer: int) -> None:
    """Red if scales stay where they were, or an outer scale is lost where heads part a group."""
    columns = 768
    raw = random_blocks(kind, 40 * columns // BLOCK_TYPES[kind].elements)
    stored = BlockMatrix(tensor_of(kind, 40, columns, raw))
    order = np.random.default_rng(2).permutation(columns // run)
    matrix = ColumnsReordered(stored, order, run)
    assert matrix.groups is not None
    assert (matrix.groups.size, matrix.groups.outer) == (size, outer)
    expected = values_of(stored, Source(raw)).reshape(40, -1, run)[:, order].reshape(40, columns)
    assert same_bits(values_of(matrix, Source(raw)), expected)


def test_columns_of_values_move() -> None:
    """Red if only codes are put in order."""
    raw = np.arange(4 * 12, dtype=np.float32).view(np.uint8)
    stored = PlainMatrix(tensor_of("F32", 4, 12, raw))
    moved = values_of(ColumnsReordered(stored, np.array([2, 0, 1]), 4), Source(raw))
    assert moved[0].tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]


def test_heads_that_part_the_smallest_groups() -> None:
    """Red if codes of two heads are given one scale."""
    stored = BlockMatrix(tensor_of("Q8_0", 4, 64, random_blocks("Q8_0", 8)))
    with pytest.raises(CheckpointError, match="groups of 32 columns cross heads of 8"):
        ColumnsReordered(stored, np.arange(8), 8)
