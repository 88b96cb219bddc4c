"""Stored formats of weights on the simt device: `linear`, `embed` and `draft_input` over each.

IS: kernels held against the values that core.groups defines, in numpy; and promise 1 for every
format: bits do not depend on rows, tiles, warps or schedule. IS NOT: file formats (weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.device import Precision
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import BackendError
from flashrt.core.backend import BoundLaunch, Bytes
from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.op import Op, bind
from flashrt.core.region import DType, Layout, Region, Role, View
from flashrt.ops.draft import DRAFT_INPUT
from flashrt.ops.linear import LINEAR
from flashrt.ops.rows import EMBED
from flashrt.ops.table import OPS
from tests.backend.cases import cursor
from tests.backend.runner import bf16_bits, from_bf16, rng_for

ARENA_BYTES = 16 << 20
F32 = NDArray[np.float32]
Stored = NDArray[np.generic] | Planes
# An x of 1, 2 or 3 parts of bfloat16: dtype of the region, by precision of the device.
ACTS: dict[int, tuple[Precision, DType]] = {
    1: ("bfloat16", DType.ACT), 2: ("high", DType.ACT), 3: ("high", DType.ACT_WIDE),
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How a matrix is stored."""

    dtype: DType
    groups: Groups | None = None

    def __str__(self) -> str:
        if self.groups is None:
            return str(self.dtype)
        outer = f"/{self.groups.outer}" if self.groups.outer else ""
        return f"{self.dtype}-{self.groups.size}{outer}-{self.groups.scales}"


def grouped(dtype: DType, size: int, scales: Scales, outer: int = 0) -> Format:
    return Format(dtype, Groups(size, scales, outer))


FORMATS = (
    grouped(DType.U4, 32, Scales.F16),  # GGUF Q4_0
    grouped(DType.U4, 32, Scales.F16_MIN),  # Q4_1
    grouped(DType.U5, 32, Scales.F16),
    grouped(DType.U5, 32, Scales.F16_MIN),
    grouped(DType.I8, 32, Scales.F16),  # Q8_0
    grouped(DType.U4, 32, Scales.TWO_LEVEL_MIN, 256),  # Q4_K
    grouped(DType.U5, 32, Scales.TWO_LEVEL_MIN, 256),  # Q5_K
    grouped(DType.U6, 16, Scales.TWO_LEVEL, 256),  # Q6_K
    grouped(DType.U4, 128, Scales.F16),  # GPTQ
    grouped(DType.U4, 128, Scales.F32_MIN),  # AWQ
    grouped(DType.E4M3, 128, Scales.F32),  # FP8 in blocks
    grouped(DType.E2M1, 16, Scales.E4M3_TIMES),  # NVFP4, ModelOpt
    grouped(DType.E2M1, 16, Scales.E4M3_OVER),  # NVFP4, compressed-tensors
    grouped(DType.I8, 64, Scales.F32),
    Format(DType.BF16),
    Format(DType.F16),
    Format(DType.F32),
)


# ---- what the values are


def code_values(dtype: DType, codes: NDArray[Any], has_min: bool) -> NDArray[np.float64]:
    """The numbers that codes are, less zero."""
    if dtype is DType.E4M3:
        return np.asarray(codes.view(ml_dtypes.float8_e4m3fn), np.float64)
    if dtype is DType.E2M1:
        values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        return np.asarray(np.where(codes & 8, -1.0, 1.0) * values[codes & 7], np.float64)
    numbers = np.asarray(codes, np.float64)
    return numbers if dtype is DType.I8 or has_min else numbers - (1 << (dtype.bits - 1))


def values_of(form: Format, stored: Stored) -> NDArray[np.float64]:
    """Every value of a matrix, rounded to float32 once, as core.groups defines it."""
    if not isinstance(stored, Planes):
        return from_bf16(stored).astype(float) if form.dtype is DType.BF16 else stored.astype(float)
    groups = form.groups
    assert groups is not None
    q = code_values(form.dtype, stored.codes, groups.scales.has_min)
    k = q.shape[1]
    wide = []
    for plane, kept in zip(groups.planes, stored.scales, strict=True):
        numbers = kept
        if plane.dtype == np.uint8 and groups.scales in (Scales.E4M3_TIMES, Scales.E4M3_OVER):
            numbers = kept.view(ml_dtypes.float8_e4m3fn)
        size = plane.size or k
        wide.append(np.repeat(numbers.astype(np.float32), size, axis=1)[:, :k])
    m: NDArray[np.generic] | float = 0.0
    match groups.scales:
        case Scales.F16 | Scales.F32:
            s = wide[0]
        case Scales.F16_MIN | Scales.F32_MIN:
            s, m = wide
        case Scales.TWO_LEVEL:
            s = wide[0] * wide[1]
        case Scales.TWO_LEVEL_MIN:
            s, m = wide[0] * wide[2], -(wide[1] * wide[3])
        case Scales.E4M3_TIMES:
            s = wide[0] * wide[1]
        case Scales.E4M3_OVER:
            s = wide[0] / wide[1]
    exact = q * s.astype(np.float64) + np.asarray(m, np.float64)  # 53 bits hold both terms
    return exact.astype(np.float32).astype(np.float64)


def random_matrix(form: Format, n: int, k: int, *words: object) -> Stored:
    """Codes and scales of every kind, values about 1; zeros and both signs among the scales."""
    rng = rng_for("matrix", str(form), n, k, *words)
    if form.groups is None:
        w = rng.standard_normal((n, k)).astype(np.float32)
        if form.dtype is DType.BF16:
            return bf16_bits(w)
        return w.astype(np.float16) if form.dtype is DType.F16 else w
    dtype = form.dtype
    codes = rng.integers(0, 1 << dtype.bits, (n, k)).astype(np.uint8)
    if dtype is DType.E4M3:
        codes[codes & 0x7F == 0x7F] = 0x36  # NaN is for a test of its own
    if dtype is DType.I8:
        codes = codes.view(np.int8)
    typical = {DType.I8: 64.0, DType.E4M3: 64.0, DType.E2M1: 2.0}.get(
        dtype, 2.0 ** (dtype.bits - 2)
    )
    scales = []
    for plane in form.groups.planes:
        shape = (n, -(-k // plane.size) if plane.size else 1)
        if plane.dtype == np.uint8 and form.groups.scales.has_min:
            scales.append(rng.integers(0, 64, shape).astype(np.uint8))  # j, k of two levels
        elif plane.dtype == np.uint8:
            f = rng.uniform(0.01, 2, shape).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            f[rng.random(shape) < 0.1] = 0x01  # the smallest
            scales.append(f)
        elif plane.dtype == np.int8:
            scales.append(rng.integers(-128, 128, shape).astype(np.int8))
        else:
            inner = 32.0 if form.groups.outer else 1.0
            drawn = rng.standard_normal(shape) / (typical * inner)
            drawn[rng.random(shape) < 0.05] = 0 if plane.size else 0.5
            scales.append(drawn.astype(plane.dtype))
    return Planes(codes, tuple(scales))


# ---- launches


class Bench:
    """A device and an arena; runs launches of few operands."""

    def __init__(
        self, precision: Precision, seed: int = 0, size: int = 16, *, is_watched: bool = False
    ) -> None:
        self.device = SimtDevice(precision, seed=seed, multiprocessors=size, is_watched=is_watched)
        self.device.build(OPS)
        self.base = self.device.allocate("arena", ARENA_BYTES).address

    def run(
        self,
        op: Op,
        views: dict[str, View],
        inputs: dict[str, Stored],
        attrs: dict[str, int | float] | None = None,
        leads: dict[str, int] | None = None,
    ) -> dict[str, Bytes]:
        """Bytes of every region after the launch; what is not an input is all ones."""
        at, addresses = 0, {}
        for name, view in views.items():
            nbytes = self.device.storage(view.region).nbytes
            raw = np.full(nbytes, 0xFF, np.uint8)
            if name in inputs:
                self.device.pack(view.region, inputs[name], raw)
            addresses[name] = self.base + at
            self.device.write(addresses[name], raw)
            at += -(-nbytes // 256) * 256 + 256
        assert at <= ARENA_BYTES
        launch = bind(op, views, attrs or {})
        bound = tuple(
            addresses[p.name]
            + (leads or {}).get(p.name, 0) * self.device.storage(views[p.name].region).lead_nbytes
            + 4 * views[p.name].col
            for p in op.params
        )
        self.device.eager([BoundLaunch(launch, bound)])
        found = {}
        for name, view in views.items():
            found[name] = np.empty(self.device.storage(view.region).nbytes, np.uint8)
            self.device.read(addresses[name], found[name])
        return found


@pytest.fixture(scope="module")
def benches() -> Iterator[dict[Precision, Bench]]:
    made: dict[Precision, Bench] = {"bfloat16": Bench("bfloat16"), "high": Bench("high")}
    yield made
    for bench in made.values():
        bench.device.close()


def matrix(form: Format, n: int, k: int) -> Region:
    return Region("w", (n, k), form.dtype, Role.WEIGHT, Layout.MATRIX, groups=form.groups)


def linear(
    bench: Bench,
    act: DType,
    form: Format,
    stored: Stored,
    x: F32,
    rows: int | None = None,
    part: tuple[int, int] | None = None,
) -> F32:
    """y of a launch of len(x) rows, of which `rows` are valid; of rows `part` of the matrix."""
    (t, k), n_all = x.shape, stored.shape[0]
    first, n = part or (0, n_all)
    w = matrix(form, n_all, k)
    views = {
        "x": Region("x", (t, k), act, Role.IO).view(),
        "w": w.span(first, n),
        "cursor": Region("cursor", cursor(0, 1).shape, DType.I32, Role.IO).view(),
        "y": Region("y", (t, n + 5), DType.F32, Role.IO).view().cols(2, n + 2),
    }
    is_rounded = act is DType.ACT and bench.device.acts.narrow is DType.BF16
    inputs: dict[str, Stored] = {
        "x": bf16_bits(x) if is_rounded else x,
        "w": stored, "cursor": cursor(0, t if rows is None else rows),
    }  # fmt: skip
    found = bench.run(LINEAR, views, inputs, leads={"w": first})
    y = found["y"].view(np.float32).reshape(t, n + 5)
    beside = np.delete(y.view(np.uint32), np.s_[2 : n + 2], axis=1)
    assert (beside == 0xFFFFFFFF).all(), "columns beside the window were written"
    return y[:, 2 : n + 2]


def rounded(x: F32, parts: int) -> NDArray[np.float64]:
    """x as the sum of so many bfloat16."""
    left, total = x.copy(), np.zeros(x.shape)
    for _ in range(parts):
        part = left.astype(ml_dtypes.bfloat16).astype(np.float32)
        total, left = total + part, left - part
    return total


def check(parts: int, form: Format, stored: Stored, x: F32, y: F32) -> None:
    """Against the sum over exact values, in float64.

    A term of the sum is rounded in float32 by: its value (not by the kernel), 16 products of an
    mma and up to 16 x 9 accumulations of a slice in parts, 32 folds of scales and minima, the
    slices and the scale of a row. Each is off by 2^-24 of at most the sum of magnitudes, those of
    code and minimum apart, for they may cancel in a value.
    """
    held, values = rounded(x, parts), values_of(form, stored)
    magnitude = np.abs(values)
    if isinstance(stored, Planes) and form.groups is not None and form.groups.scales.has_min:
        zeros = Planes(np.zeros_like(stored.codes), stored.scales)
        magnitude = magnitude + 2 * np.abs(values_of(form, zeros))
    n_roundings = 1 + 16 + 16 * 9 + 32 + x.shape[1] // 256 + 2
    allowed = n_roundings * 2.0**-24 * (np.abs(held) @ magnitude.T)
    error = np.abs(y - held @ values.T)
    assert (error <= allowed).all(), f"{form}: {error.max():.2e}"
    assert np.abs(y).max() > 0.1


def normal(*shape: int) -> F32:
    return rng_for("x", shape).standard_normal(shape).astype(np.float32)


# What a language model multiplies with most, over every way to store and to scale.
QUICK = (
    grouped(DType.U4, 32, Scales.F16_MIN),
    grouped(DType.U5, 32, Scales.TWO_LEVEL_MIN, 256),
    grouped(DType.U6, 16, Scales.TWO_LEVEL, 256),
    grouped(DType.I8, 32, Scales.F16),
    grouped(DType.E4M3, 128, Scales.F32),
    grouped(DType.E2M1, 16, Scales.E4M3_OVER),
    Format(DType.F16),
    Format(DType.F32),
)
ONE_OF_EACH = (QUICK[0], QUICK[2], QUICK[5])  # folds by chunk, by step, and none
# N, K. Several slices; ragged; less than a chunk; whole; whole, with warps that have no slice.
SHAPES = ((33, 520), (19, 301), (16, 33), (32, 256), (16, 1280))
slow = pytest.mark.slow


def every() -> list[object]:
    """(parts, format, shape): all shapes with an x of two parts, as most launches have it; an
    aligned one with one part, a ragged one with three.
    """
    made: list[object] = []
    for form in FORMATS:
        for parts in ACTS:
            for shape in SHAPES if parts == 2 else SHAPES[parts // 2 : parts // 2 + 1]:
                quick = QUICK if shape == SHAPES[0] else ONE_OF_EACH if shape == SHAPES[-1] else ()
                is_quick = form in quick and parts == 2
                label = f"{parts}-{form}-{shape[0]}x{shape[1]}"
                marks = () if is_quick else slow
                made.append(pytest.param(parts, form, shape, id=label, marks=marks))
    return made


@pytest.mark.parametrize(("parts", "form", "shape"), every())
def test_linear_is_the_product_with_the_values(
    benches: dict[Precision, Bench], parts: int, form: Format, shape: tuple[int, int]
) -> None:
    """Red: a nibble, a bit plane or a scale from the wrong place; few and many rows that differ."""
    (n, k), (precision, act) = shape, ACTS[parts]
    stored, x = random_matrix(form, n, k), normal(40, k)
    many = linear(benches[precision], act, form, stored, x)
    check(parts, form, stored, x, many)
    few = linear(benches[precision], act, form, stored, x[:3])
    assert few.tobytes() == many[:3].tobytes()


# Aligned and not, more chunks than stages; scales in one plane, two planes and none, C order.
TILED = (
    (Format(DType.BF16), 296),
    (QUICK[2], 296),
    pytest.param(Format(DType.BF16), 301, marks=slow),
    pytest.param(QUICK[0], 296, marks=slow),
    pytest.param(QUICK[5], 301, marks=slow),
    pytest.param(Format(DType.F32), 301, marks=slow),
    pytest.param(QUICK[1], 1100, marks=slow),
)


@slow
@pytest.mark.parametrize("form", [*QUICK, grouped(DType.U4, 128, Scales.F32_MIN)], ids=str)
def test_bits_do_not_depend_on_rows(
    monkeypatch: pytest.MonkeyPatch, benches: dict[Precision, Bench], form: Format
) -> None:
    """Red: an order of folds that depends on tokens of a block, or rows that are not valid."""
    monkeypatch.setattr(kernels, "few_cost", lambda s: np.inf)
    n, k = 37, 1100  # five slices: more than a turn of four warps
    stored, x = random_matrix(form, n, k), normal(300, k)
    whole = linear(benches["high"], DType.ACT_WIDE, form, stored, x)
    for t, rows in ((1, 1), (8, 8), (9, 9), (32, 17), (33, 33), (64, 40), (150, 129)):
        part = x[:t].copy()
        part[rows:] = np.nan
        y = linear(benches["high"], DType.ACT_WIDE, form, stored, part, rows)
        assert y[:rows].tobytes() == whole[:rows].tobytes(), (t, rows)
        assert (np.ascontiguousarray(y[rows:]).view(np.uint32) == 0xFFFFFFFF).all()


@slow
@pytest.mark.parametrize("form", ONE_OF_EACH, ids=str)
@pytest.mark.parametrize(("seed", "size"), [(1, 1), (2, 108), (3, 1000)])
def test_bits_do_not_depend_on_schedule_and_tiles(form: Format, seed: int, size: int) -> None:
    """Red: a race, or a variant for another size of device with another order."""
    stored, x = random_matrix(form, 100, 1100), normal(70, 1100)
    found = []
    for bench in (Bench("bfloat16"), Bench("bfloat16", seed, size)):
        for t in (2, 20, 70):
            found.append(linear(bench, DType.ACT_WIDE, form, stored, x[:t])[:2].tobytes())
        bench.device.close()
    assert len(set(found)) == 1


@slow
@pytest.mark.parametrize("form", [*ONE_OF_EACH, Format(DType.BF16), Format(DType.F32)], ids=str)
def test_no_race_between_threads(monkeypatch: pytest.MonkeyPatch, form: Format) -> None:
    """Red: a stage that is read before, or filled again while, others use it."""
    monkeypatch.setattr(kernels, "few_cost", lambda s: np.inf)
    bench = Bench("bfloat16", seed=5, is_watched=True)
    stored, x = random_matrix(form, 33, 1100), normal(40, 1100)
    for t in (3, 40):
        check(1, form, stored, x[:t], linear(bench, DType.ACT, form, stored, x[:t]))
    monkeypatch.setattr(kernels, "many_choice", lambda s: (kernels.many_tiles(s)[1], 1))
    stored, x = random_matrix(form, 33, 1104), normal(40, 1104)  # aligned: x by cp.async too
    check(1, form, stored, x, linear(bench, DType.ACT, form, stored, x))
    bench.device.close()


@pytest.mark.parametrize(("form", "k"), TILED, ids=str)
def test_bits_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch, form: Format, k: int) -> None:
    """Red: addresses that advance by the wrong constant, in rounds that a smaller tile has not;
    rows of W or of x beyond the last that reach another's sum.
    """
    stored, x = random_matrix(form, 150, k), normal(140, k)
    x[139:] = np.nan
    bench = Bench("high", seed=3)
    few = np.concatenate(
        [
            linear(bench, DType.ACT, form, stored, x[i : i + 32], min(32, 139 - i))
            for i in range(0, 139, 32)
        ]
    )[:139]
    dims = {"T": 140, "N": 150, "K": k}
    groups = {} if form.groups is None else {"w": form.groups}
    shape = kernels.Shape("linear", dims, {"w": form.dtype}, {}, DType.BF16X2, 16, groups)
    monkeypatch.setattr(kernels, "few_cost", lambda s: np.inf)
    for tile in kernels.many_tiles(shape):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "many_choice", lambda s, tile=tile: (tile, 1))
            y = linear(bench, DType.ACT, form, stored, x, 139)
        assert y[:139].tobytes() == few.tobytes(), tile
        assert (np.ascontiguousarray(y[139:]).view(np.uint32) == 0xFFFFFFFF).all()
    bench.device.close()


@pytest.mark.parametrize("form", [QUICK[0], Format(DType.F32)], ids=str)
def test_rows_of_a_matrix_are_a_matrix(benches: dict[Precision, Bench], form: Format) -> None:
    """Red: a size of a row tile that leaves out its scales."""
    stored, x = random_matrix(form, 70, 520), normal(3, 520)
    whole = linear(benches["high"], DType.ACT_WIDE, form, stored, x)
    part = linear(benches["high"], DType.ACT_WIDE, form, stored, x, part=(32, 21))
    assert part.tobytes() == np.ascontiguousarray(whole[:, 32:53]).tobytes()


# ---- tables


def embed(bench: Bench, form: Format, stored: Stored, tokens: NDArray[np.int32]) -> F32:
    t, h = len(tokens), stored.shape[1]
    views = {
        "tokens": Region("tokens", (t,), DType.I32, Role.IO).view(),
        "table": matrix(form, *stored.shape).view(),
        "cursor": Region("cursor", cursor(0, 1).shape, DType.I32, Role.IO).view(),
        "journal": Region("journal", (1, 64, 1), DType.I32, Role.ROWS).view(),
        "x": Region("x", (t, h), DType.F32, Role.IO).view(),
    }
    inputs: dict[str, Stored] = {"tokens": tokens, "table": stored, "cursor": cursor(0, t)}
    return bench.run(EMBED, views, inputs)["x"].view(np.float32).reshape(t, h)


@pytest.mark.parametrize(
    "form", [f if f in QUICK else pytest.param(f, marks=slow) for f in FORMATS], ids=str
)
def test_embed_is_exact(benches: dict[Precision, Bench], form: Format) -> None:
    """Red: any value that is not the one of core.groups to the bit."""
    for h in (301, 40):
        stored = random_matrix(form, 50, h)
        tokens = np.arange(49, -1, -1, dtype=np.int32)
        x = embed(benches["bfloat16"], form, stored, tokens)
        expected = values_of(form, stored)[tokens].astype(np.float32)
        assert np.array_equal(x, expected)


@pytest.mark.parametrize("form", [QUICK[1], pytest.param(QUICK[5], marks=slow)], ids=str)
@pytest.mark.parametrize("h", [40, 33])
def test_draft_input_reads_the_same_table(
    benches: dict[Precision, Bench], form: Format, h: int
) -> None:
    """Red: a table in codes that draft_input takes for another."""
    stored, t = random_matrix(form, 30, h), 7
    bench, tokens = benches["high"], np.arange(7, dtype=np.int32) * 4
    ones = np.ones(h, np.float32)
    act = Region("act", (t, h), DType.ACT_WIDE, Role.IO)
    flat = {"w_token": ones, "w_hidden": ones}
    views = {
        "tokens": Region("tokens", (t,), DType.I32, Role.IO).view(),
        "table": matrix(form, 30, h).view(), "hidden": act.view(),
        "last": Region("last", (1, h), DType.ACT_WIDE, Role.IO).view(),
        **{name: Region(name, (h,), DType.F32, Role.IO).view() for name in flat},
        "cursor": Region("cursor", cursor(0, 1).shape, DType.I32, Role.IO).view(),
        "y": Region("y", (t, 2 * h), DType.ACT_WIDE, Role.IO).view(),
    }  # fmt: skip
    inputs: dict[str, Stored] = {
        "tokens": tokens, "table": stored, "hidden": normal(t, h), "last": normal(1, h), **flat,
        "cursor": cursor(0, t),
    }  # fmt: skip
    found = bench.run(DRAFT_INPUT, views, inputs, {"eps": 1e-6})["y"].view(np.float32)
    values = values_of(form, stored)[tokens]
    expected = values / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6)
    assert np.allclose(found.reshape(t, 2 * h)[:, :h], expected, rtol=1e-5, atol=1e-6)


# ---- storage


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_matrix_may_be_packed_in_pieces(benches: dict[Precision, Bench], form: Format) -> None:
    """The loader packs 32 rows or a multiple at a time. Red: a plane that is not in its tile."""
    device = benches["high"].device
    n, k = 77, 301
    stored, region = random_matrix(form, n, k), matrix(form, n, k)
    storage = device.storage(region)
    whole = np.zeros(storage.nbytes, np.uint8)
    device.pack(region, stored, whole)
    for start, stop in ((0, 32), (32, 64), (64, 77)):
        rows = stored.rows(start, stop) if isinstance(stored, Planes) else stored[start:stop]
        part = matrix(form, stop - start, k)
        raw = np.zeros(device.storage(part).nbytes, np.uint8)
        device.pack(part, rows, raw)
        at = start * storage.lead_nbytes
        assert raw.tobytes() == whole[at : at + raw.size].tobytes()
    if form.groups is not None:  # as few bits as the format has
        planes = form.groups.planes
        scales = sum(
            -(-320 // p.size) if p.size else 1 for p in planes for _ in range(p.dtype.itemsize)
        )
        assert storage.nbytes == 80 * (320 * form.dtype.bits // 8 + scales)


def test_a_nan_among_codes_is_a_nan_in_the_sum(benches: dict[Precision, Bench]) -> None:
    """float8 has one NaN; kernels take codes for numbers. Red: it counts as 480."""
    form = QUICK[4]
    stored = random_matrix(form, 33, 520)
    assert isinstance(stored, Planes)
    stored.codes[17, 200] = 0xFF
    y = linear(benches["high"], DType.ACT_WIDE, form, stored, normal(2, 520))
    assert np.isnan(y[:, 17]).all()
    assert not np.isnan(np.delete(y, 17, axis=1)).any()


def test_what_does_not_fit_is_refused(benches: dict[Precision, Bench]) -> None:
    """Red: codes packed without scales, or planes of another matrix."""
    device, form = benches["high"].device, QUICK[0]
    region, stored = matrix(form, 33, 64), random_matrix(form, 33, 64)
    assert isinstance(stored, Planes)
    raw = np.zeros(device.storage(region).nbytes, np.uint8)
    with pytest.raises(BackendError, match=r"'w'.*Planes"):
        device.pack(region, stored.codes, raw)
    with pytest.raises(BackendError, match=r"'w'.*planes"):
        device.pack(region, stored.rows(0, 32), raw)
    with pytest.raises(BackendError, match="no way back"):
        device.unpack(region, raw)


# ---- any groups


@st.composite
def forms(draw: st.DrawFn) -> Format:
    """Any codes with any scales, in groups of any size."""
    dtype = draw(st.sampled_from((DType.U4, DType.U5, DType.U6, DType.I8, DType.E4M3, DType.E2M1)))
    scales = draw(st.sampled_from(list(Scales)))
    size = draw(st.sampled_from((16, 32, 64, 128, 256)))
    if scales in (Scales.TWO_LEVEL, Scales.TWO_LEVEL_MIN):
        outer = draw(st.sampled_from([n for n in (16, 32, 64, 128, 256) if n >= size]))
        return grouped(dtype, size, scales, outer)
    return grouped(dtype, size, scales)


@slow
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(form=forms(), n=st.integers(1, 40), k=st.integers(8, 600), t=st.integers(33, 50))
def test_any_groups(benches: dict[Precision, Bench], form: Format, n: int, k: int, t: int) -> None:
    """Red: a size, or a pair of codes and scales, that the kernels place otherwise than packing."""
    stored, x = random_matrix(form, n, k), normal(t, k)
    x[:, 0] = 8.0  # so that a sum is seen
    bench = benches["bfloat16"]
    many = linear(bench, DType.ACT, form, stored, x)
    held = rounded(x, 1)
    if np.abs(held @ values_of(form, stored).T).max() > 0.1:
        check(1, form, stored, x, many)
    assert linear(bench, DType.ACT, form, stored, x[:5]).tobytes() == many[:5].tobytes()
    expected = values_of(form, stored).astype(np.float32)
    assert np.array_equal(embed(bench, form, stored, np.arange(n, dtype=np.int32)), expected)
