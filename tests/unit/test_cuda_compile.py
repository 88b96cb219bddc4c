"""Every CUDA kernel compiles for every supported architecture, without a GPU, and spills nothing.

IS: NVRTC over the variants that real model sizes lead to, and the report of ptxas. IS NOT: running
them, nor the cache (test_nvrtc_cache). The quick suite takes one variant of each kernel, for the
two sides of the sources' only question about the architecture.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from flashrt.backends.cuda import kernels
from flashrt.backends.cuda.compiler_api import Unit
from flashrt.backends.cuda.fused_ops import FUSED_OPS
from flashrt.backends.cuda.kernels import KernelLaunch, Shape
from flashrt.backends.cuda.nvrtc import Nvrtc, resources
from flashrt.backends.cuda.occupancy import LEAST, RESERVED_BYTES, Multiprocessor, multiprocessor
from flashrt.backends.cuda.sources import Sources, shipped
from flashrt.backends.simt.build import kernel_names
from flashrt.core.region import DType
from flashrt.ops import OPS
from flashrt.ops.attention import Seen

ARCHS = (
    "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121",
)  # fmt: skip
# All variants, and the usual ones in the quick suite: sm_90 is as sm_80 but in one place.
MAIN_ARCHS = ("sm_80", "sm_120")
FUSED = tuple(op.name for op in FUSED_OPS)
BESIDE_THE_OPS = ("limits.cu", "random_fill.cu")  # for benchmarks: no expansion, no defines

# hidden, heads and state of the model sizes from 0.8B to 27B
SIZES = {
    "H": 2560, "V": 248_320, "S": 4096, "B": 16, "I": 9216, "D": 256, "Nq": 16, "Nk": 4, "R2": 32,
    "Hv": 32, "dk": 128, "dv": 128, "C": 8192, "W": 3, "W1": 4, "K": 2560, "N": 9216, "M": 256,
    "Y": 60, "X": 80, "R": 18,
    "E": 256, "P": 8,
    "N0": 64, "N1": 9216, "N2": 1024,
}  # fmt: skip
ATTRS = {
    "key_heads": 16, "key_dim": 128, "eps": 1e-6, "shift": 0, "gated": 1, "normed": 1,
    "magnitude": 1.0, "parts": 2, "biased": 1, "groups": 1, "taps_y": 3, "taps_x": 3, "stride": 1,
    "padding": 1, "heads": 64, "tanh": 1, "given": 1,
    "by_rows": 11, "by_columns": 10,
    "scoring": 0,
}  # fmt: skip
DENSE_ATTRS = {"gated": 0, "normed": 0}  # a llama's, in place of those


def shape(
    op: str,
    rows: int,
    act: DType,
    cache: DType,
    n_sms: int,
    sm: Multiprocessor = LEAST,
    **dims: int,
) -> Shape:
    sizes = {**SIZES, "T": rows, "TP": rows if rows <= 8 else 1, **dims}
    if op == "gated_rmsnorm":
        sizes["C"] = sizes["Hv"] * sizes["dv"]
    return Shape(op, sizes, {"keys": cache, "values": cache}, ATTRS, act, n_sms, sm=sm)


def many_linears(s: Shape) -> Iterator[KernelLaunch]:
    """`linear_many` of every tile and number of stages: devices of several sizes ask for them."""
    for arch in ("sm_86", "sm_90"):
        for tile in kernels.many_tiles(s):
            yield kernels.linear_many(replace(s, sm=multiprocessor(arch)), tile)


def fused(rows: Sequence[int]) -> Iterator[KernelLaunch]:
    """Launches that stand for several, of the rows that they are for; x and y of an MLP in pairs or
    three parts, others in one part too.
    """
    for op in FUSED:
        for parts, act in ((1, DType.BF16), (2, DType.BF16X2), (3, DType.F32)):
            for n in rows if len(rows) > 1 or parts == 2 else ():
                for k in (2560, 256):
                    s = shape(op, n, act, DType.BF16, 132, K=k)
                    s = replace(s, attrs=ATTRS | {"parts": parts})
                    if op.startswith("norm_") and not kernels.holds_normed_rows(s):
                        continue
                    if n <= (kernels.DELTA_FEW_ROWS if op == "delta_few" else kernels.FEW_TOKENS):
                        yield from kernels.EXPANSIONS[op](s)


def many_attentions(arch: str, *, is_full: bool) -> Iterator[KernelLaunch]:
    """`attention_rows` in the widest blocks that an architecture has room for; or in all."""
    heads = (256, 128, 64) if is_full else (256,)
    acts = (DType.BF16, DType.BF16X2) if is_full else (DType.BF16,)
    caches = (DType.BF16, DType.F32, DType.I8, DType.E4M3) if is_full else (DType.BF16,)
    for act in acts:
        for cache in caches:
            for d in heads:
                s = shape("attention", 512, act, cache, 132, multiprocessor(arch), D=d, Nq=24)
                widths = kernels.attention_widths(s)
                for tiles in widths if is_full and d == heads[0] else widths[:1]:
                    yield kernels.attention_many(s, tiles)


def variants(arch: str, *, is_full: bool) -> Iterator[KernelLaunch]:
    """Launches of all ops: one variant of each kernel, or all that these sizes lead to."""
    yield from many_attentions(arch, is_full=is_full)
    yield kernels.copy_launch(1 << 20, 132)
    yield kernels.digest_launch(4, 132)
    for name in BESIDE_THE_OPS:
        for kernel in kernel_names(shipped()[name]):
            yield KernelLaunch(name, kernel, (), (1, 1, 1), (256, 1, 1))
    acts = (DType.BF16, DType.BF16X2) if is_full else (DType.BF16,)
    caches = (DType.BF16, DType.F32, DType.I8, DType.E4M3) if is_full else (DType.BF16, DType.E4M3)
    rows = (1, 4, 8, 16, 32, 512) if is_full else (1, 512)
    for op, expansion in kernels.EXPANSIONS.items():
        if op in FUSED:
            continue
        for act in acts:
            for cache in caches:
                for n in rows:
                    yield from expansion(shape(op, n, act, cache, 132))
    for op in ("experts_in", "experts_out"):  # of 35B-A3B; of a few rows, of many, of long sums
        for n in (8, 64, 2048) if is_full else (8,):
            yield from kernels.EXPANSIONS[op](
                shape(op, n, acts[-1], DType.BF16, 132, H=2048, I=512)
            )
    yield from fused(rows if is_full else rows[:1])
    whole = shape("conv2d", 1, acts[0], caches[0], 132, B=1)
    pointwise = replace(whole, attrs=ATTRS | {"taps_y": 1, "taps_x": 1, "padding": 0})
    for s in (whole, pointwise):
        for n_sms in (1, 1 << 20):  # both tiles
            yield from kernels.EXPANSIONS["conv2d"](replace(s, n_sms=n_sms))
    for act in acts:
        for cache in caches:  # a draft's: one row, its keys shifted against positions
            for heads in (16, 24):  # 24: of 27B, in groups of 6
                draft = shape("attention", 1, act, cache, 132, Nq=heads)
                shifted = replace(draft, attrs=ATTRS | {"shift": 1})
                yield from kernels.EXPANSIONS["attention"](shifted)
        for seen in (Seen.LAUNCH, Seen.BEFORE):  # SmolVLA's, in float32
            for n in (8, 50):
                sm, sizes = multiprocessor(arch), {"D": 64, "Nq": 15, "Nk": 5}
                own = shape("attention", n, act, DType.F32, 132, sm, **sizes)
                if n <= 8 or kernels.attention_widths(own):  # no pairs on the smallest
                    asked = ATTRS | DENSE_ATTRS | {"seen": int(seen)}
                    yield from kernels.EXPANSIONS["attention"](replace(own, attrs=asked))
        for cache in caches:
            for op in ("attention", "rope_append"):
                for n in rows:
                    plain = shape(op, n, act, cache, 132, D=128)
                    yield from kernels.EXPANSIONS[op](replace(plain, attrs=ATTRS | DENSE_ATTRS))
    if is_full:
        for act in (*acts, DType.F32):  # float32: in three parts
            for k, n_sms in ((256, 16), (1024, 132), (9216, 132)):
                for n in rows[:-1]:
                    yield from kernels.EXPANSIONS["linear"](
                        shape("linear", n, act, DType.BF16, n_sms, K=k)
                    )
            for k in (9216, 9217):
                yield from many_linears(shape("linear", rows[-1], act, DType.BF16, 132, K=k))
        for op in (
            "rmsnorm",
            "add_rmsnorm",
            "gated_rmsnorm",
            "silu_mul",
            "silu_rmsnorm",
            "relu_squared",
        ):  # what gives them
            yield from kernels.EXPANSIONS[op](shape(op, 1, DType.F32, DType.BF16, 132))
        for act in acts:
            for group in (3, 6):
                sizes = {"Nq": 4 * group, "Nk": 4}
                for n in rows:
                    yield from kernels.EXPANSIONS["attention"](
                        shape("attention", n, act, DType.BF16, 16, **sizes)
                    )


def compile_all(arch: str, launches: Iterator[KernelLaunch]) -> dict[str, int]:
    """Spilled bytes by kernel and defines; only kernels that are launched count."""
    nvrtc = Nvrtc(arch)
    sources = Sources()
    sources.set_ops(OPS)
    by_unit: dict[Unit, set[KernelLaunch]] = {}  # a unit is compiled once for all its kernels
    for launch in launches:
        by_unit.setdefault(sources.unit(launch), set()).add(launch)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC leaves Python to others meanwhile
        binaries = list(pool.map(nvrtc.compile, by_unit))
    spills: dict[str, int] = {}
    for (unit, wanted), binary in zip(by_unit.items(), binaries, strict=True):
        report = {found.kernel: found for found in resources(binary.log)}
        for launch in wanted:
            taken = report[launch.kernel]
            shared_bytes = launch.shared_bytes + taken.shared_bytes + RESERVED_BYTES
            assert shared_bytes <= multiprocessor(arch).shared_bytes, unit.title
            spills[f"{launch.kernel}: {unit.title}"] = taken.spill_bytes
    return {title: n for title, n in spills.items() if n}


@pytest.fixture(scope="module", autouse=True)
def needs_nvrtc() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs NVRTC: pip install flashrt[cuda]")


@pytest.mark.parametrize(
    "arch",
    [a if a in MAIN_ARCHS else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS],
)
def test_every_kernel_compiles_without_spills(arch: str) -> None:
    assert compile_all(arch, variants(arch, is_full=False)) == {}


def pairwise(units: Iterable[Unit], usual: set[Unit], arch: str) -> set[Unit]:
    """Units in which each two values of a source's defines that go together are together once,
    unless they are so in a usual unit: a third of all. Those that do as well as others are taken in
    another order for each architecture.
    """
    by_name: dict[str, list[Unit]] = {}
    for unit in sorted(units, key=lambda u: zlib.crc32(f"{arch} {u.title}".encode())):
        by_name.setdefault(unit.name, []).append(unit)
    kept: set[Unit] = set()
    for same in by_name.values():
        pairs = {u: {*itertools.combinations(sorted(u.defines), 2), *u.defines} for u in same}
        left = set().union(*pairs.values())
        left = left.difference(*(pairs[u] for u in same if u in usual))
        while left:
            best = max(same, key=lambda u: len(pairs[u] & left))
            kept.add(best)
            left -= pairs[best]
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_every_pair_of_defines_compiles_without_spills(
    arch: str, pytestconfig: pytest.Config
) -> None:
    """What the test above leaves; all variants with --all-formats."""
    sources = Sources()
    sources.set_ops(OPS)
    usual = {sources.unit(v) for v in variants(arch, is_full=False)}
    more: dict[Unit, list[KernelLaunch]] = {}
    for v in variants(arch, is_full=True):
        more.setdefault(sources.unit(v), []).append(v)
    if not pytestconfig.getoption("--all-formats"):
        taken = pairwise(more, usual, arch)
        more = {unit: launches for unit, launches in more.items() if unit in taken}
    launched = (v for unit, launches in more.items() if unit not in usual for v in launches)
    assert compile_all(arch, launched) == {}


def test_every_kernel_is_reached() -> None:
    launched = {(v.source, v.kernel) for v in variants("sm_90", is_full=False)}
    for name, text in shipped().items():
        if Path(name).suffix == ".cu":
            assert {(name, kernel) for kernel in kernel_names(text)} <= launched
