"""Promise: with int16 and int8 activations, `linear` over codes has the bits that linear_int8.c
defines, whatever rows, threads and vectors do; and other weights do not notice.

The definition is stated here once more, in numpy: exact integers, and float32 with every fma
rounded once.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cache import Binary
from flashrt.backends.choose import CPU_ACTIVATIONS, PRECISIONS, open_backend
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu import device as cpu_device
from flashrt.backends.cpu.device import INTEGER_CODES, Activations, CpuDevice
from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.region import DType
from flashrt.ops.table import OPS
from flashrt.weights.formats.dequantise import code_values, scales_and_minima
from tests.backend.runner import rng_for
from tests.backend.test_formats_cpu import COMMON, FORMATS, MOST, VALUES, Bench, Format

Floats = NDArray[np.float32]
UNIT, SLICE = 32, 256
CODES = tuple(f for f in FORMATS if f.dtype in INTEGER_CODES)
USUAL = tuple(f for f in COMMON if f.dtype in INTEGER_CODES)
SHAPES = ((45, 1030), (32, 256), (70, 45))
COUNTS = (1, 2, 3, 4, 5, 6, 7, 13, 33)
LIMITS: dict[Activations, int] = {"int16": 32639, "int8": 127}


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a b + c, rounded once: the product is exact in float64, whose sum is rounded to odd."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    is_even = (total.view(np.int64) & 1) == 0
    nudged = np.nextafter(total, np.copysign(np.inf, lost))
    is_inexact = (lost != 0) & np.isfinite(lost)
    return np.where(is_inexact & is_even, nudged, total).astype(np.float32)


def quantised(x: Floats, limit: int) -> tuple[NDArray[np.int64], Floats]:
    """q [T, K filled up] and dx [T, units]."""
    t, k = x.shape
    most = np.float32(limit)
    units = np.pad(x, ((0, 0), (0, -k % UNIT))).reshape(t, -1, UNIT)
    largest = np.abs(units).max(axis=2)
    is_finite = np.isfinite(units).all(axis=2)
    is_used = is_finite & (largest >= np.float32(2.0**-100))
    dx = np.where(is_used, largest / most, np.float32(0))
    inverse = most / np.where(is_used, largest, np.float32(1))
    q = np.rint(units * inverse[:, :, None])
    q = np.where(is_used[:, :, None], q, 0).astype(np.int64)
    return q.reshape(t, -1), np.where(is_finite, dx, np.float32(np.nan))


def defined(fmt: Format, rows: Planes, x: Floats, limit: int) -> Floats:
    """y, as the header of linear_int8.c says."""
    assert fmt.groups is not None
    with np.errstate(all="ignore"):
        s, m = scales_and_minima(fmt.groups, rows)
        u = code_values(fmt.dtype, rows.codes, is_centred=m is None)
        if fmt.dtype is DType.E2M1:
            u, s = u * 2, s * np.float32(0.5)
        whole = np.pad(u.astype(np.int64), ((0, 0), (0, -x.shape[1] % UNIT)))
        s = np.pad(s, ((0, 0), (0, 1)))
        m = None if m is None else np.pad(m, ((0, 0), (0, 1)))
        q, dx = quantised(x, limit)
        return _sums(fmt.groups.size, whole, s, m, q, dx)


def _sums(
    size: int, u: NDArray[np.int64], s: Floats, m: Floats | None, q: NDArray[np.int64], dx: Floats
) -> Floats:
    block, k = min(size, UNIT), u.shape[1]
    y = np.zeros((len(q), len(u)), np.float32)
    for k0 in range(0, k, SLICE):
        part = np.zeros_like(y)
        for first in range(k0, min(k0 + SLICE, k), block):
            there, group = slice(first, first + block), first // size
            dots = (q[:, there] @ u[:, there].T).astype(np.float32)
            step = dx[:, first // UNIT, None]
            part = fma(s[None, :, group] * step, dots, part)
            if m is not None:
                total = q[:, there].sum(axis=1, keepdims=True).astype(np.float32)
                part = fma(np.broadcast_to(m[None, :, group], y.shape), step * total, part)
        y = part if k0 == 0 else y + part
    return y


def random_rows(rng: np.random.Generator, t: int, k: int) -> Floats:
    """Rows of ordinary values, a few of them large."""
    x = rng.standard_normal((t, k)) * rng.choice([1, 1, 1, 30], (t, k))
    return np.asarray(x, np.float32)


def bits(x: Floats) -> NDArray[np.uint32]:
    """As words, all NaN alike."""
    words: NDArray[np.uint32] = np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32)
    return words


class IntegerBench(Bench):
    """With the definition of its activations."""

    def __init__(self, activations: Activations) -> None:
        super().__init__(activations=activations)
        self.activations = activations

    def defined(self, fmt: Format, rows: Planes, x: Floats) -> NDArray[np.uint32]:
        """Bits of y."""
        return bits(defined(fmt, rows, x, LIMITS[self.activations]))


@pytest.fixture(scope="module", params=LIMITS)
def bench(request: pytest.FixtureRequest) -> Iterator[IntegerBench]:
    made = IntegerBench(request.param)
    yield made
    made.device.close()


@pytest.mark.parametrize("fmt", CODES, ids=str)
def test_linear_has_the_bits_of_the_definition(bench: IntegerBench, fmt: Format) -> None:
    """Fault: a shift, a zero, a scale, a block or a tile of tokens is another's."""
    for shape in SHAPES:
        rows = fmt.random(rng_for("int8", str(fmt), shape), *shape)
        assert isinstance(rows, Planes)
        x = random_rows(rng_for("x", shape), max(COUNTS), shape[1])
        wanted = bench.defined(fmt, rows, x)
        for n in COUNTS:
            got = bits(bench.linear(fmt.region(*shape), rows, x, n))
            assert (got == wanted[:n]).all(), (str(fmt), shape, n)


@pytest.mark.parametrize("dtype", INTEGER_CODES, ids=str)
@pytest.mark.parametrize("size", [16, 32, 128])
def test_the_largest_codes_and_activations_do_not_saturate(
    bench: IntegerBench, dtype: DType, size: int
) -> None:
    """Fault: one product more is added up in 16 bits than fits."""
    codes = {DType.I8: (-128, 127), DType.E2M1: (7, 15)}.get(dtype, (0, (1 << dtype.bits) - 1))
    for scales in (Scales.F32, Scales.F32_MIN):
        fmt = Format(dtype, Groups(size, scales))
        of = np.array([*codes, *codes] * 8)[:, None].repeat(512, axis=1)
        of[::3, ::2] = codes[0]
        planes = tuple(np.full((32, 512 // size), v, np.float32) for v in (0.25, -3.0))
        kind = np.int8 if dtype is DType.I8 else np.uint8
        rows = Planes(of.astype(kind), planes[: len(fmt.groups.planes if fmt.groups else ())])
        x = np.ones((7, 512), np.float32)
        x[1], x[2, ::2], x[3, 1::4], x[4, 256:] = -1, -1, -1, -1
        wanted = bench.defined(fmt, rows, x)
        for n in (1, 2, 7):
            assert (bits(bench.linear(fmt.region(32, 512), rows, x, n)) == wanted[:n]).all(), n


@pytest.mark.parametrize("fmt", USUAL, ids=str)
def test_what_cannot_be_quantised_makes_its_own_row_nan(bench: IntegerBench, fmt: Format) -> None:
    """Fault: a NaN or an infinity becomes a number, or spoils its neighbours; a row of zeros, or of
    the smallest numbers, is divided by zero.
    """
    rows = fmt.random(rng_for("nan", str(fmt)), 40, 300)
    assert isinstance(rows, Planes)
    x = random_rows(rng_for("x"), 9, 300)
    x[1, 299], x[3, 5], x[4, 64] = np.nan, np.inf, -np.inf
    x[5], x[6], x[7] = 0, 1e-42, -3e38
    x[8, :32] = 2.0**-100
    wanted = bench.defined(fmt, rows, x)
    for n in (1, 2, 9):
        got = bench.linear(fmt.region(40, 300), rows, x, n)
        assert (bits(got) == wanted[:n]).all()
    assert np.isnan(got[[1, 3, 4]]).all() and np.isfinite(got[[0, 2, 5, 6, 8]]).all()
    assert (got[[5, 6]] == 0).all() or fmt.groups is None
    for n in (3, 4, 5):  # the row alone, first of the launch
        alone = bench.linear(fmt.region(40, 300), rows, x[n : n + 1], 1)
        assert (bits(alone) == wanted[n : n + 1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("fmt", USUAL, ids=str)
def test_any_rows_and_threads_give_the_same_bits(
    bench: IntegerBench, fmt: Format, threads: int
) -> None:
    """Fault: bits of a row depend on those beside it, or on who computes them."""
    before = bench.device.threads
    bench.device.resize(threads)
    try:
        rows = fmt.random(rng_for(str(fmt), threads), 141, 717)
        assert isinstance(rows, Planes)
        x = random_rows(rng_for("x", threads), MOST, 717)
        wanted = bench.defined(fmt, rows, x)
        for n in (*range(1, 32), 63, 64, 65, 127, 200, MOST):
            got = bits(bench.linear(fmt.region(141, 717), rows, x, n))
            assert (got == wanted[:n]).all(), n
    finally:
        bench.device.resize(before)


@pytest.mark.parametrize("activations", LIMITS)
def test_without_scratch_rows_go_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: Activations
) -> None:
    """Fault: rows are quantised into memory that is not there."""
    path = Path(shutil.copy(toolchain.library(OPS).path, tmp_path / "copy.so"))  # its own workspace
    library = Binary(path, path.read_bytes(), "", was_cached=True)
    monkeypatch.setattr(toolchain, "library", lambda *_, **__: library)
    monkeypatch.setattr(cpu_device, "_workspace_nbytes", lambda *_: 0)
    fmt = USUAL[0]
    rows = fmt.random(rng_for("scratch"), 70, 333)
    assert isinstance(rows, Planes)
    x = random_rows(rng_for("x"), 5, 333)
    bench = IntegerBench(activations)
    got = bench.linear(fmt.region(70, 333), rows, x, 5)
    bench.device.close()
    assert (bits(got) == bench.defined(fmt, rows, x)).all()


def test_other_weights_get_float32(bench: IntegerBench) -> None:
    """Fault: the device sends a matrix of plain numbers, or of float8, to the wrong kernel."""
    exact = Bench()
    x = random_rows(rng_for("x"), 9, 300)
    for fmt in (*VALUES, *(f for f in COMMON if f.dtype not in INTEGER_CODES)):
        rows, region = fmt.random(rng_for(str(fmt)), 45, 300), fmt.region(45, 300)
        for n in (1, 9):
            both = [bits(b.linear(region, rows, x, n)) for b in (bench, exact)]
            assert (both[0] == both[1]).all(), str(fmt)
    exact.device.close()


def test_the_digest_tells_activations_apart() -> None:
    """Fault: a capsule of one arithmetic is taken for one of the other."""
    digests = set()
    for precision in PRECISIONS:
        device = open_backend("cpu", precision)
        device.build(OPS)
        digests.add((CPU_ACTIVATIONS[precision], device.kernel_digest))
        device.close()
    assert len(digests) == 3
    assert len({digest for _, digest in digests}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_any_vector_width_gives_the_same_bits(
    bench: IntegerBench, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Fault: a width adds up, rounds or widens otherwise."""
    if not any("native" in flag for flag in toolchain.CFLAGS):
        pytest.skip("kernels are not built for this machine")
    if target == "x86-64-v4" and "avx512vl" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    narrow = tuple(f.replace("native", target) for f in toolchain.CFLAGS)
    monkeypatch.setattr(toolchain, "CFLAGS", narrow)
    other = Bench(activations=bench.activations)
    x = random_rows(rng_for("x"), 40, 333)
    for fmt in CODES:
        rows, region = fmt.random(rng_for(str(fmt)), 45, 333), fmt.region(45, 333)
        for n in (1, 2, 3, 4, 5, 6, 40):
            wide, slim = (bits(b.linear(region, rows, x, n)) for b in (bench, other))
            assert (wide == slim).all(), (str(fmt), n)
    other.device.close()
    bench.device.build(OPS)  # the pool is the process's


def test_the_device_says_which_way_it_goes() -> None:
    """Fault: `flashrt doctor` and benchmarks do not show the arithmetic."""
    device = CpuDevice(1, activations="int16")
    device.build(OPS)
    assert "int16 activations" in device.description
    CpuDevice().build(OPS)
