"""Promise: with bfloat16 activations, `linear` over weights in bfloat16 has the bits that
linear_bf16.c defines, whatever rows, threads, vectors and tiles do; and other weights do not
notice.

The definition is stated here once more, in numpy: float32 with every fma rounded once, and no
subnormals.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import flashrt
from flashrt.backends.cache import Binary
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu import device as cpu_device
from flashrt.backends.cpu.device import INTEGER_CODES
from flashrt.core.region import DType
from flashrt.ops.table import OPS
from tests.backend.runner import bf16_bits, rng_for
from tests.backend.test_formats_cpu import COMMON, Bench, Format
from tests.backend.test_linear_integers import bits, random_rows

Floats = NDArray[np.float32]
Words = NDArray[np.uint16]
STEP = 32
BF16 = Format(DType.BF16)
SHAPES = ((45, 1030), (32, 256), (70, 45), (33, 1))
COUNTS = (1, 2, 3, 6, 7, 13, 16, 17, 31, 33, 64, 70)
# What a device needs to run one op: so that a test may build it for other processors.
NEEDED = ("copy", "digest", "limits", "linear_bf16", "load", "pack", "pool", "runtime")
TINY = Path(__file__).parents[1] / "golden" / "tiny"
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


def flushed(x: NDArray[np.float64]) -> Floats:
    """float32, what is smaller than 2^-126 once rounded being a zero: of 24 bits, whatever their
    exponent, as processors see it.
    """
    scale = np.where(np.abs(x) < 2.0**-120, 2.0**64, 1.0)
    y = (x * scale).astype(np.float32)  # far from subnormals, so that all of 24 bits are there
    is_tiny = np.abs(y) < np.where(scale > 1, 2.0 ** (64 - 126), 2.0**-126)
    return np.where(is_tiny, np.copysign(np.float32(0), y), (y / scale).astype(np.float32))


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a b + c, rounded once: the product is exact in float64, whose sum is rounded to odd."""
    product, wide = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + wide
    back = total - product
    lost = (product - (total - back)) + (wide - back)
    is_even = (total.view(np.int64) & 1) == 0
    nudged = np.nextafter(total, np.copysign(np.inf, lost))
    is_inexact = (lost != 0) & np.isfinite(lost)
    return flushed(np.where(is_inexact & is_even, nudged, total))


def add(a: Floats, b: Floats) -> Floats:
    """a + b; both in 53 bits, of which a sum of two float32 near 2^-126 needs 24."""
    return flushed(a.astype(np.float64) + b)


def widened(w: Words) -> Floats:
    """Values of bfloat16, subnormals as zeros."""
    w = np.where(w & 0x7F80, w, w & 0x8000).astype(np.uint32) << np.uint32(16)
    return w.view(np.float32)


def rounded(x: Floats) -> Floats:
    """To bfloat16, to nearest, ties to even, subnormals being zeros before that."""
    word = x.view(np.uint32)
    size = word & np.uint32(0x7FFFFFFF)
    nearest = word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))
    word = np.where(np.isnan(x), word | np.uint32(0x400000), nearest)
    word = np.where(size < 0x00800000, x.view(np.uint32) & np.uint32(0x80000000), word)
    return (word & np.uint32(0xFFFF0000)).view(np.float32)


def defined(w: Words, x: Floats) -> NDArray[np.uint32]:
    """Bits of y, as the header of linear_bf16.c says."""
    fill = ((0, 0), (0, -x.shape[1] % STEP))
    wide, of_x = np.pad(widened(w), fill), np.pad(rounded(x), fill)
    y = np.zeros((len(x), len(w)), np.float32)
    with np.errstate(all="ignore"):
        for k0 in range(0, wide.shape[1], STEP):
            halves = []
            for first in (k0, k0 + 1):
                chain = np.zeros_like(y)
                for k in range(first, k0 + STEP, 2):
                    chain = fma(of_x[:, k, None], wide[None, :, k], chain)
                halves.append(chain)
            y = add(y, add(*halves))
    return bits(y)


def random_words(rng: np.random.Generator, n: int, k: int) -> Words:
    """Rows of ordinary values, in bfloat16."""
    return bf16_bits(rng.standard_normal((n, k)).astype(np.float32))


def fast_bench(threads: int = 2) -> Bench:
    """With the device of precision "fast"."""
    return Bench(threads, activations="int8", plain="bfloat16")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = fast_bench()
    yield made
    made.device.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_has_the_bits_of_the_definition(bench: Bench, shape: tuple[int, int]) -> None:
    """Fault: a chain, a step, what fills up K, a tile of rows or of columns is another's."""
    w = random_words(rng_for("bf16", shape), *shape)
    x = random_rows(rng_for("x", shape), max(COUNTS), shape[1])
    wanted = defined(w, x)
    for n in COUNTS:
        got = bits(bench.linear(BF16.region(*shape), w, x, n))
        assert (got == wanted[:n]).all(), (shape, n)


@pytest.mark.parametrize("kind", ["small", "any", "large"])
def test_subnormals_infinities_and_nan_are_as_defined(bench: Bench, kind: str) -> None:
    """Fault: somewhere a subnormal is kept, or a zero has another sign; an infinity is a number."""
    rng = rng_for("edges", kind)
    exponents = {"small": (58, 68), "any": (0, 256), "large": (187, 190)}[kind]
    w = rng.integers(*exponents, (40, 99)).astype(np.uint16) << np.uint16(7)
    w |= rng.integers(0, 1 << 16, w.shape).astype(np.uint16) & np.uint16(0x807F)
    x = rng.integers(*exponents, (20, 99)).astype(np.uint32) << np.uint32(23)
    x |= rng.integers(0, 1 << 32, x.shape, np.uint32) & np.uint32(0x807FFFFF)
    if kind == "small":
        x[0] = 1
    wanted = defined(w, x.view(np.float32))
    values = wanted.view(np.float32)
    assert {
        "small": (values[0] == 0).all() and (values[1:] != 0).any(),
        "any": np.isnan(values).any(),
        "large": np.isinf(values).any() and np.isfinite(values).any(),
    }[kind]
    for n in (1, 2, 20):
        got = bits(bench.linear(BF16.region(40, 99), w, x.view(np.float32), n))
        assert (got == wanted[:n]).all(), n


def test_what_rounds_up_to_the_smallest_normal_number_stays(bench: Bench) -> None:
    """Fault: a subnormal is found before it is rounded: 2^-126 - 2^-152 is 2^-126 in 24 bits, and
    2^-126 - 2^-149 is not.
    """
    w = np.zeros((32, 32), np.uint16)
    x = np.zeros((3, 32), np.float32)
    for k, power in ((0, -63), (2, -76), (1, -63), (3, -74)):
        w[k // 2 % 2 : 32, k] = (127 + power) << 7 if k < 2 else 0x8000 | (127 + power) << 7
        x[:, k] = 2.0**power
    x[1, [1, 3]], x[2, [0, 2]] = 0, 0
    x[2, 3] = 2.0**-75
    wanted = defined(w, x)
    assert set(wanted[1:].reshape(-1).tolist()) == {0x00800000, 0}
    for n in (1, 3):
        assert (bits(bench.linear(BF16.region(32, 32), w, x, n)) == wanted[:n]).all()


def test_a_row_has_the_same_bits_alone(bench: Bench) -> None:
    """Fault: a row's bits depend on its neighbours, which may be NaN."""
    w = random_words(rng_for("alone"), 70, 300)
    x = random_rows(rng_for("x alone"), 40, 300)
    whole = bits(bench.linear(BF16.region(70, 300), w, x, 40))
    x[::2] = np.nan
    odd = bits(bench.linear(BF16.region(70, 300), w, x, 40))
    assert (odd[1::2] == whole[1::2]).all() and (odd[::2] == 0x7FC00000).all()
    for row in (1, 17, 39):
        alone = bits(bench.linear(BF16.region(70, 300), w, x[row : row + 1], 1))
        assert (alone == whole[row]).all()


def test_blocks_of_rows_and_claims_of_panels_change_no_bit(bench: Bench) -> None:
    """Fault: rows of the second block, or panels of another claim, are taken twice or never."""
    for (n, k), rows in (((300, 70), (256, 257, 300)), ((4200, 260), (1, 5, 33))):
        w = random_words(rng_for("claims", n), n, k)
        x = random_rows(rng_for("x claims", n), max(rows), k)
        wanted = defined(w, x)
        for threads in (1, 3):
            bench.device.resize(threads)
            for count in rows:
                got = bits(bench.linear(BF16.region(n, k), w, x, count))
                assert (got == wanted[:count]).all(), (n, count, threads)
    bench.device.resize(2)


def test_without_scratch_rows_go_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: rows are rounded into memory that is not there."""
    path = Path(shutil.copy(toolchain.library(OPS).path, tmp_path / "copy.so"))  # its own workspace
    library = Binary(path, path.read_bytes(), "", was_cached=True)
    monkeypatch.setattr(toolchain, "library", lambda *_, **__: library)
    monkeypatch.setattr(cpu_device, "_workspace_nbytes", lambda *_: 0)
    w = random_words(rng_for("scratch"), 70, 333)
    x = random_rows(rng_for("x"), 5, 333)
    other = fast_bench()
    got = other.linear(BF16.region(70, 333), w, x, 5)
    other.device.close()
    assert (bits(got) == defined(w, x)).all()


def test_other_weights_get_what_they_got(bench: Bench) -> None:
    """Fault: the device sends a matrix of other numbers, or of codes, to this kernel."""
    x = random_rows(rng_for("x"), 9, 300)
    exact, integers = Bench(), Bench(activations="int8")
    for fmt in (Format(DType.F16), Format(DType.F32), *COMMON):
        rows, region = fmt.random(rng_for(str(fmt)), 45, 300), fmt.region(45, 300)
        same = integers if fmt.dtype in INTEGER_CODES else exact
        for n in (1, 9):
            both = [bits(b.linear(region, rows, x, n)) for b in (bench, same)]
            assert (both[0] == both[1]).all(), str(fmt)
    exact.device.close()
    integers.device.close()


OTHERS = [
    "native",
    "x86-64-v3",
    pytest.param("x86-64", marks=pytest.mark.slow),
    pytest.param("x86-64-v4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("target", OTHERS)
def test_other_processors_give_the_same_bits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """This one without AMX, and narrower ones. Fault: chains of vectors are not those of tiles, or
    those of one width not those of another; the digest tells apart what has the same bits.
    """
    if not any("native" in flag for flag in toolchain.CFLAGS) or "avx2" not in CPU_FLAGS:
        pytest.skip("kernels are not built for this machine, or it is no x86-64-v3")
    if target == "x86-64-v4" and "avx512vl" not in CPU_FLAGS:
        pytest.skip("this processor has no AVX-512")
    digest = bench.device.kernel_digest
    flags = tuple(f.replace("native", target) for f in toolchain.CFLAGS)
    no_tiles = ("-mno-amx-bf16", "-mno-amx-tile") if "amx_bf16" in CPU_FLAGS else ()
    monkeypatch.setattr(toolchain, "CFLAGS", (*flags, *no_tiles))
    every = toolchain.sources()
    needed = [p for p in every if p.suffix == ".h" or p.stem in NEEDED]
    library = toolchain.library
    with monkeypatch.context() as fewer:
        fewer.setattr(toolchain, "sources", lambda: needed)
        built = library(OPS)
    monkeypatch.setattr(toolchain, "library", lambda *_, **__: built)
    other = fast_bench()
    assert other.device.kernel_digest == digest
    small = rng_for("small").standard_normal((70, 333)).astype(np.float32) * np.float32(2.0**-63)
    for fmt_rows, x in (
        (random_words(rng_for("width"), 70, 333), random_rows(rng_for("x"), 70, 333)),
        (bf16_bits(small), small),
        (bf16_bits(small), small[:, ::-1].copy()),
    ):
        for n in (*range(1, 15), 24, 25, 33, 49, 70):
            wide, slim = (
                bits(b.linear(BF16.region(70, 333), fmt_rows, x, n)) for b in (bench, other)
            )
            assert (wide == slim).all(), n
    other.device.close()


SMALL_STACK = """
import ctypes, mmap
class Stack(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("nbytes", ctypes.c_size_t)]
room = mmap.mmap(-1, 8192)
at = ctypes.addressof(ctypes.c_char.from_buffer(room))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.sigaltstack(ctypes.byref(Stack(at, 0, 8192)), None) == 0
assert libc.syscall(158, 0x1023, 18) == -1  # arch_prctl: no leave
"""
REFUSED = """
import numpy as np
from tests.backend.runner import rng_for
from tests.backend.test_linear_bfloat16 import (
    BF16, bits, fast_bench, random_rows, random_words
)
w, x = random_words(rng_for("refused"), 70, 333), random_rows(rng_for("x"), 40, 333)
print(hash(bits(fast_bench().linear(BF16.region(70, 333), w, x, 40)).tobytes()))
"""


@pytest.mark.skipif("amx_bf16" not in CPU_FLAGS, reason="this processor has no AMX")
def test_where_the_system_refuses_tiles_vectors_do_it() -> None:
    """Fault: tiles are used without leave, which ends the process. Linux refuses them to a process
    whose stack for signals is too small.
    """
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        ).stdout
        for code in (REFUSED, SMALL_STACK + REFUSED)
    ]
    assert both[0] and both[0] == both[1]


def test_a_model_has_one_answer_however_its_tokens_come() -> None:
    """Fault: one row, few rows and many have not the same bits somewhere in a model; or `fast`
    does not get there.
    """
    prompt = [7 * i % 500 for i in range(45)]
    digests = set()
    with flashrt.load(TINY, device="cpu", max_positions=64, precision="fast") as engine:
        for pieces in ((45,), (1,) * 45, (33, 2, 10)):
            with engine.session() as session:
                for piece in pieces:
                    session.prefill(prompt[session.position : session.position + piece])
                digests.add((session.digest(), session.logits().tobytes()))
    assert len(digests) == 1
    with (
        flashrt.load(TINY, device="cpu", max_positions=64) as usual,
        usual.session() as session,
    ):
        session.prefill(prompt)
        logits = session.logits()
    fast = np.frombuffer(digests.pop()[1], np.float32)
    off = np.sqrt(np.square(fast - logits).mean() / np.square(logits).mean())
    assert 1e-4 < off < 0.12  # docs/exactness.md: 11 % at the worst position
