"""Promise: on the cpu a matrix of codes behaves, to the bit, as the float32 matrix of its values.

Values are those of the reference dequantiser, sums those of `linear` over float32, which
test_cpu_exact.py and one test here hold against the stated order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu import layouts
from flashrt.backends.cpu.device import Activations, CpuDevice, PlainActivations
from flashrt.base.errors import BackendError, PlanError
from flashrt.core.backend import BoundLaunch
from flashrt.core.groups import SIZES, Groups, Planes, Scales
from flashrt.core.op import Op, bind
from flashrt.core.region import CODE_DTYPES, DType, Layout, Operand, Region, Role, View, as_view
from flashrt.ops.table import CURSOR_WORDS, DRAFT_INPUT, EMBED, LINEAR, OPS
from flashrt.weights.formats.dequantise import dequantise
from tests.backend.runner import bf16_bits, rng_for

Rows = NDArray[np.generic] | Planes
Floats = NDArray[np.float32]
SLOT = 4 << 20  # of each operand
MOST = 300  # rows of a launch


@dataclass(frozen=True)
class Format:
    """A dtype with groups, or without."""

    dtype: DType
    groups: Groups | None = None

    def __str__(self) -> str:
        g = self.groups
        return f"{self.dtype}" + ("" if g is None else f"-{g.scales}-{g.size}-{g.outer}")

    def region(self, n: int, k: int) -> Region:
        return Region("w", (n, k), self.dtype, Role.WEIGHT, Layout.MATRIX, groups=self.groups)

    def random(self, rng: np.random.Generator, n: int, k: int) -> Rows:
        """Rows of it: every code, and scales of both signs, some of them 0."""
        if self.groups is None:
            values = rng.standard_normal((n, k)).astype(np.float32)
            if self.dtype is DType.BF16:
                return bf16_bits(values)
            return values.astype(np.float16) if self.dtype is DType.F16 else values
        codes = rng.integers(0, 1 << self.dtype.bits, (n, k)).astype(np.uint8)
        if self.dtype is DType.E4M3:
            codes[codes & 127 == 127] = 1  # no NaN, and more of the subnormal ones
        return Planes(
            codes.view(np.int8) if self.dtype is DType.I8 else codes,
            tuple(
                _scales(rng, (n, -(-k // p.size) if p.size else 1), p.dtype)
                for p in self.groups.planes
            ),
        )

    def values(self, rows: Rows) -> Floats:
        return dequantise(self.dtype, self.groups, rows)


def _scales(
    rng: np.random.Generator, shape: tuple[int, int], dtype: np.dtype[np.generic]
) -> NDArray[np.generic]:
    if dtype.kind != "f":
        whole = rng.integers(0, 256, shape).astype(np.uint8)
        whole[whole & 127 == 127] = 3  # NaN, where it is a float8
        return whole.view(dtype)
    scales = rng.standard_normal(shape) * rng.choice([1e-4, 0.01, 3], shape)
    scales[rng.random(shape) < 0.05] = 0
    rounded: NDArray[np.generic] = scales.astype(dtype)
    return rounded


def _all_formats() -> Iterator[Format]:
    """Every dtype with every kind of scales, the sizes in turn."""
    sizes = itertools.cycle(SIZES)
    for dtype, scales in itertools.product(CODE_DTYPES, Scales):
        size = next(sizes)
        outer = 256 if scales in (Scales.TWO_LEVEL, Scales.TWO_LEVEL_MIN) else 0
        yield Format(dtype, Groups(size, scales, outer))


FORMATS = tuple(_all_formats())
VALUES = (Format(DType.F16), Format(DType.F32), Format(DType.BF16))
COMMON = (  # what checkpoints have
    Format(DType.U4, Groups(32, Scales.F16)),
    Format(DType.U4, Groups(32, Scales.TWO_LEVEL_MIN, 256)),
    Format(DType.U6, Groups(16, Scales.TWO_LEVEL, 256)),
    Format(DType.I8, Groups(32, Scales.F16)),
    Format(DType.E4M3, Groups(128, Scales.F32)),
    Format(DType.E2M1, Groups(16, Scales.E4M3_TIMES)),
)


class Bench:
    """A device with room for the operands of one launch."""

    def __init__(
        self,
        threads: int = 2,
        activations: Activations = "float32",
        plain: PlainActivations = "float32",
    ) -> None:
        self.device = CpuDevice(threads, activations=activations, plain=plain)
        self.device.build(OPS)
        self.memory = self.device.allocate("arena", 10 * SLOT)

    def run(self, op: Op, inputs: Sequence[tuple[Operand, Rows]], y: Region) -> Floats:
        """Operands in the order of the op, its last one the output."""
        operands: list[View] = []
        addresses = []
        for i, (operand, rows) in enumerate(inputs):
            view, at = as_view(operand), self.memory.address + i * SLOT
            storage = self.device.storage(view.region)
            assert storage.nbytes <= SLOT
            raw = np.full(storage.nbytes, 0xFF, np.uint8)
            self.device.pack(view.region, rows, raw)
            self.device.write(at, raw)
            operands.append(view)
            addresses.append(at + view.lead * storage.lead_nbytes)
        at = self.memory.address + len(inputs) * SLOT
        self.device.fill(at, SLOT, 0xFF)
        names = [p.name for p in op.params]
        bound = dict(zip(names, [*operands, y.view()], strict=True))
        attrs = {a.name: 1e-6 for a in op.attrs}
        self.device.eager([BoundLaunch(bind(op, bound, attrs), (*addresses, at))])
        out = np.empty(y.size, np.float32)
        self.device.read(at, out.view(np.uint8))
        return out.reshape(y.shape)

    def linear(self, w: Operand, rows: Rows, x: Floats, n: int) -> Floats:
        """The first n rows of x, all others poison."""
        t, k = x.shape
        x = x.copy()
        x[n:] = np.nan
        inputs = [
            (Region("x", (t, k), DType.ACT, Role.IO), x),
            (w, rows),
            (Region("cursor", (CURSOR_WORDS,), DType.I32, Role.IO), _cursor(n)),
        ]
        y = Region("y", (t, as_view(w).shape[0]), DType.F32, Role.IO)
        out = self.run(LINEAR, inputs, y)
        assert np.isnan(out[n:]).all()
        return out[:n]

    def embed(self, w: Region, rows: Rows, tokens: Sequence[int]) -> Floats:
        ids = np.array(tokens, np.int32)
        t, h = len(tokens), w.shape[1]
        inputs = [
            (Region("tokens", (t,), DType.I32, Role.IO), ids),
            (w, rows),
            (Region("cursor", (CURSOR_WORDS,), DType.I32, Role.IO), _cursor(t)),
            (Region("journal", (1, t, 1), DType.I32, Role.ROWS), ids.reshape(1, t, 1)),
        ]
        return self.run(EMBED, inputs, Region("x", (t, h), DType.F32, Role.IO))

    def draft_input(self, w: Region, rows: Rows, tokens: Sequence[int], hidden: Floats) -> Floats:
        t, h = hidden.shape
        ones = np.ones(h, np.float32)
        inputs = [
            (Region("tokens", (t,), DType.I32, Role.IO), np.array(tokens, np.int32)),
            (w, rows),
            (Region("hidden", (t, h), DType.ACT, Role.IO), hidden),
            (Region("last", (1, h), DType.ACT, Role.IO), hidden[:1]),
            (Region("w_token", (h,), DType.F32, Role.IO), ones),
            (Region("w_hidden", (h,), DType.F32, Role.IO), ones),
            (Region("cursor", (CURSOR_WORDS,), DType.I32, Role.IO), _cursor(t)),
        ]
        return self.run(DRAFT_INPUT, inputs, Region("y", (t, 2 * h), DType.ACT, Role.IO))


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.device.close()


def _cursor(rows: int) -> NDArray[np.int32]:
    words = np.zeros(CURSOR_WORDS, np.int32)
    words[1] = rows
    return words


def _bits(x: NDArray[np.generic]) -> NDArray[np.uint32]:
    """As words, all NaN alike."""
    words: NDArray[np.uint32] = np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)
    return words


def _assert_as_float32(
    bench: Bench, fmt: Format, shape: tuple[int, int], rows: Rows, counts: Sequence[int]
) -> None:
    k = shape[1]
    x = rng_for("x", k).standard_normal((max(counts), k)).astype(np.float32)
    whole = Format(DType.F32).region(*shape)
    wanted = _bits(bench.linear(whole, fmt.values(rows), x, max(counts)))
    for n in counts:
        got = _bits(bench.linear(fmt.region(*shape), rows, x, n))
        assert (got == wanted[:n]).all(), (str(fmt), shape, n)


@pytest.mark.parametrize("k", [96, 1030])
def test_linear_over_bfloat16_values_is_the_same_in_float16_and_float32(
    bench: Bench, k: int
) -> None:
    """Fault: chains or slices of linear_stored.c cut elsewhere than those of linear.c."""
    rng = rng_for("values", k)
    whole = (rng.integers(-128, 128, (45, k)) / 64).astype(np.float32)
    x = rng.standard_normal((40, k)).astype(np.float32)
    wanted = bench.linear(Format(DType.BF16).region(45, k), bf16_bits(whole), x, 40)
    for dtype, rows in ((DType.F32, whole), (DType.F16, whole.astype(np.float16))):
        for n in (1, 2, 3, 4, 5, 6, 7, 25, 40):
            got = bench.linear(Format(dtype).region(45, k), rows, x, n)
            assert (_bits(got) == _bits(wanted[:n])).all(), (dtype, n)


@pytest.mark.parametrize("fmt", [*VALUES, *FORMATS], ids=str)
def test_linear_has_the_bits_of_float32(bench: Bench, fmt: Format) -> None:
    """Fault: a shift, a mask or a scale of one dtype, kind or tile of tokens is another's."""
    for shape in ((45, 1030), (32, 256), (70, 45)):
        rows = fmt.random(rng_for(str(fmt), shape), *shape)
        _assert_as_float32(bench, fmt, shape, rows, (1, 2, 3, 4, 5, 6, 7, 13, 33))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("fmt", [*COMMON, *VALUES], ids=str)
def test_any_rows_and_threads_give_the_same_bits(bench: Bench, fmt: Format, threads: int) -> None:
    """Fault: bits of a row depend on those beside it, or on who computes them."""
    before = bench.device.threads
    bench.device.resize(threads)
    try:
        rows = fmt.random(rng_for(str(fmt), threads), 141, 717)
        _assert_as_float32(bench, fmt, (141, 717), rows, range(1, MOST + 1))
    finally:
        bench.device.resize(before)


@pytest.mark.parametrize(
    "fmt",
    [f for f in FORMATS if f.groups is not None and f.groups.scales.value.startswith("float")],
    ids=str,
)
def test_scales_of_any_size_are_exact(bench: Bench, fmt: Format) -> None:
    """Fault: a scale near the ends of float32 is moved by a power of two and loses bits."""
    shape = (40, 512)
    rows = fmt.random(rng_for("extreme", str(fmt)), *shape)
    assert isinstance(rows, Planes)
    extreme = np.array([1e-38, -3e-42, 2e38, np.inf, np.nan, -1e31, 0, 1e-31], np.float64)
    with np.errstate(over="ignore"):
        for plane in rows.scales:
            if plane.dtype.kind == "f":
                plane[3:19, 0] = np.tile(extreme, 2).astype(plane.dtype)
    _assert_as_float32(bench, fmt, shape, rows, (1, 2, 7))
    got = bench.embed(fmt.region(*shape), rows, range(32))
    assert (_bits(got) == _bits(fmt.values(rows)[:32])).all()


def test_a_code_that_is_nan_makes_its_row_nan(bench: Bench) -> None:
    """Fault: the all-ones code of e4m3 is taken for 480."""
    fmt = Format(DType.E4M3, Groups(128, Scales.F32))
    rows = fmt.random(rng_for("nan"), 40, 200)
    assert isinstance(rows, Planes)
    rows.codes[5, 3], rows.codes[33, 199] = 0x7F, 0xFF
    _assert_as_float32(bench, fmt, (40, 200), rows, (1, 2, 9))


@pytest.mark.parametrize("fmt", [*VALUES, *FORMATS], ids=str)
def test_a_gathered_row_is_the_dequantised_one(bench: Bench, fmt: Format) -> None:
    """Fault: one element's index, shift or scale; the sign of a zero."""
    shape = (70, 333)
    rows = fmt.random(rng_for("embed", str(fmt)), *shape)
    tokens = [0, 1, 31, 32, 69, 15, 16, -1, 70]
    got = bench.embed(fmt.region(*shape), rows, tokens)
    assert (_bits(got[:7]) == _bits(fmt.values(rows)[tokens[:7]])).all()
    assert np.isnan(got[7:]).all()
    hidden = rng_for("hidden").standard_normal((7, 333)).astype(np.float32)
    drafts = [
        bench.draft_input(f.region(*shape), r, tokens[:7], hidden)
        for f, r in ((fmt, rows), (Format(DType.F32), fmt.values(rows)))
    ]
    assert (_bits(drafts[0]) == _bits(drafts[1])).all()


@pytest.mark.parametrize("fmt", [*VALUES, *FORMATS], ids=str)
def test_packing_in_c_is_packing_in_numpy(bench: Bench, fmt: Format) -> None:
    """Fault: what fills up rows, columns or groups differs, or is not written."""
    for shape in ((1, 1), (45, 300), (64, 512), (33, 1031), (300, 320)):
        region, rows = fmt.region(*shape), fmt.random(rng_for("pack", str(fmt), shape), *shape)
        storage = bench.device.storage(region)
        assert storage.nbytes == storage.lead_nbytes * 32 * -(-shape[0] // 32)
        raw = np.full(storage.nbytes, 0xFF, np.uint8)
        bench.device.pack(region, rows, raw)
        wanted = (
            layouts.pack_planes(region, rows)
            if isinstance(rows, Planes)
            else layouts.pack(region, rows)
        )
        assert raw.tobytes() == wanted.tobytes(), shape
        if not isinstance(rows, Planes):
            assert (bench.device.unpack(region, raw) == rows).all()


@pytest.mark.parametrize("fmt", COMMON, ids=str)
def test_panels_of_a_matrix_are_a_matrix(bench: Bench, fmt: Format) -> None:
    """Fault: a part of a matrix begins elsewhere than its rows say."""
    rows = fmt.random(rng_for("span", str(fmt)), 96, 300)
    assert isinstance(rows, Planes)
    x = rng_for("x").standard_normal((2, 300)).astype(np.float32)
    region = fmt.region(96, 300)
    part = bench.linear(region.span(32, 64), rows, x, 2)
    alone = bench.linear(fmt.region(64, 300), rows.rows(32, 96), x, 2)
    assert (_bits(part) == _bits(alone)).all()
    whole = np.empty(bench.device.storage(region).nbytes, np.uint8)
    bench.device.pack(region, rows, whole)
    pieces = []
    for start, stop in ((0, 32), (32, 96)):
        piece = fmt.region(stop - start, 300)
        raw = np.empty(bench.device.storage(piece).nbytes, np.uint8)
        bench.device.pack(piece, rows.rows(start, stop), raw)
        pieces.append(raw)
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


def test_what_does_not_fit_a_region_is_refused(bench: Bench) -> None:
    """Fault: C reads beyond arrays that are smaller than the region says."""
    fmt = COMMON[0]
    rows = fmt.random(rng_for("refused"), 8, 64)
    assert isinstance(rows, Planes)
    out = np.empty(1 << 16, np.uint8)
    with pytest.raises(PlanError, match="planes are"):
        bench.device.pack(fmt.region(8, 96), rows, out)
    with pytest.raises(PlanError, match="planes are"):
        bench.device.pack(fmt.region(8, 64), Planes(rows.codes, ()), out)
    with pytest.raises(PlanError, match="needs groups"):
        bench.device.storage(Format(DType.U4).region(8, 64))
    with pytest.raises(BackendError, match="got float64"):
        bench.device.pack(Format(DType.F32).region(8, 64), np.zeros((8, 64)), out)
    with pytest.raises(PlanError, match="not unpacked"):
        bench.device.unpack(fmt.region(8, 64), out)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3"])
def test_any_vector_width_gives_the_same_bits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Fault: a width, or its conversion of float16, float8 or float4, computes something else."""
    if not any("native" in flag for flag in toolchain.CFLAGS):
        pytest.skip("kernels are not built for this machine")
    narrow = tuple(f.replace("native", target) for f in toolchain.CFLAGS)
    monkeypatch.setattr(toolchain, "CFLAGS", narrow)
    other = Bench()
    x = rng_for("x").standard_normal((40, 333)).astype(np.float32)
    for fmt in (*VALUES, *FORMATS):
        rows, region = fmt.random(rng_for(str(fmt)), 45, 333), fmt.region(45, 333)
        for n in (1, 2, 3, 4, 5, 6, 40):
            wide, slim = (_bits(b.linear(region, rows, x, n)) for b in (bench, other))
            assert (wide == slim).all(), (str(fmt), n)
    other.device.close()
    bench.device.build(OPS)  # the pool is the process's
