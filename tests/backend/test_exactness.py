"""Promise: bits do not depend on how rows are batched, on the bucket, or on the threads.

Nor, on simt, on the order in which threads and blocks run, or on the tiles a device is given.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cuda.device import Precision
from flashrt.backends.simt.device import SimtDevice
from flashrt.core.region import DType
from flashrt.ops.table import OPS
from tests.backend.cases import ODD, WORKSPACE, all_cases, attention, cursor, linear
from tests.backend.conftest import make_backend
from tests.backend.policy_cases import policy_cases
from tests.backend.runner import Case, Runner, rng_for
from tests.backend.test_sample import sample_cases
from tests.backend.vision_cases import vision_cases

BUCKETS = (1, 8, 64)
SPREAD_ROWS = 8  # launches of attention with more rows get one row of partials
_PARAMS = {op.name: op.params for op in OPS}
CASES = all_cases()
FULL = [c for c in CASES if c.operands["cursor"][1] in (7, 33, 64)]  # type: ignore[index]


# Rows of these are about their launch: which it is, or which number in it they have.
OF_LAUNCH = [str(c) for c in FULL if c.attrs.get("seen") or c.attrs.get("placed") == 0]


def has_rows(case: Case, name: str) -> bool:
    return next(p.dims[0] for p in _PARAMS[case.op] if p.name == name) == "T"


def row_counts(rng: np.random.Generator, n: int) -> list[list[int]]:
    """Ways to cut n rows: one by one when few, and at random places."""
    cuts = [sorted(rng.integers(1, n, size).tolist()) for size in (1, 3)]
    ways = [np.diff([0, *c, n]).tolist() for c in cuts]
    return [[m for m in way if m] for way in ways] + ([[1] * n] if n <= 7 else [[1, 1, n - 2]])


def in_pieces(
    runner: Runner, case: Case, pieces: list[int], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """The same rows in several launches, each in a random bucket that holds it."""
    rest = {n: a for n, a in case.operands.items() if n != "cursor" and not has_rows(case, n)}
    rows: dict[str, list[NDArray[Any]]] = {}
    position, start = int(case.operands["cursor"][0]), 0  # type: ignore[arg-type]
    for m in pieces:
        T = int(rng.choice([m, *(b for b in BUCKETS if b > m)]))
        operands = dict(rest, cursor=cursor(position + start, m))
        if "partials" in rest:
            operands["partials"] = (T if T <= SPREAD_ROWS else 1, *_shape(case, "partials")[1:])
        for name in case.operands:
            if name != "cursor" and has_rows(case, name):
                operands[name] = _piece(case, name, start, m, T)
        after = runner.run(case.but(**operands))
        for param in _PARAMS[case.op]:
            if param.name in WORKSPACE:
                continue
            if has_rows(case, param.name) and param.access != "r":
                rows.setdefault(param.name, []).append(after[param.name][:m])
            elif param.access != "r":
                rest[param.name] = after[param.name]
        start += m
    states = {p.name: rest[p.name] for p in _PARAMS[case.op] if p.access != "r" and p.name in rest}
    return {n: np.concatenate(r) for n, r in rows.items()} | {
        n: s for n, s in states.items() if n not in WORKSPACE
    }


def _shape(case: Case, name: str) -> tuple[int, ...]:
    given = case.operands[name]
    return given.shape if isinstance(given, np.ndarray) else given


def _piece(case: Case, name: str, start: int, m: int, T: int) -> NDArray[Any] | tuple[int, ...]:
    given = case.operands[name]
    if not isinstance(given, np.ndarray):
        return (T, *given[1:])
    poison = np.nan if given.dtype == np.float32 else np.iinfo(given.dtype).min
    piece = np.full((T, *given.shape[1:]), poison, given.dtype)
    piece[:m] = given[start : start + m]
    return piece


def assert_same_bits(a: NDArray[Any], b: NDArray[Any], what: str) -> None:
    """Equal bits; any NaN equals any NaN, since poison passes through other dtypes."""
    x, y = (
        np.where(np.isnan(v), np.float32(np.nan), v) if v.dtype == np.float32 else v for v in (a, b)
    )
    assert x.tobytes() == y.tobytes(), (
        f"{what}: {np.count_nonzero(x != y)} of {x.size} elements differ"
    )


@pytest.mark.parametrize("case", [c for c in FULL if str(c) not in OF_LAUNCH], ids=str)
def test_any_split_gives_the_same_bits(runner: Runner, case: Case) -> None:
    n, rng = int(case.operands["cursor"][1]), rng_for("split", str(case))  # type: ignore[arg-type]
    whole = runner.run(case)
    for pieces in row_counts(rng, n):
        for name, array in in_pieces(runner, case, pieces, rng).items():
            at_once = whole[name][:n] if has_rows(case, name) else whole[name]
            assert_same_bits(at_once, array, f"{case} {name} in pieces {pieces}")


@pytest.mark.parametrize("case", FULL, ids=str)
def test_dead_values_do_not_matter(runner: Runner, case: Case) -> None:
    """Rows beyond the valid ones, rows of the caches nobody wrote, workspace: NaN or anything."""
    rng = rng_for("dead", str(case))
    other = {}
    for name, array in case.operands.items():
        if isinstance(array, np.ndarray) and array.dtype == np.float32:
            loud = rng.standard_normal(array.shape).astype(np.float32) * 1e3
            other[name] = np.where(np.isnan(array), loud, array)
    clean, dirty = runner.run(case), runner.run(case.but(**other), poison=0x47)  # 51,015.28
    for param in _PARAMS[case.op]:
        is_unused = param.name.endswith("_scales")  # of codes: no cache of FULL holds these
        if param.access != "r" and param.name not in WORKSPACE and not is_unused:
            array = clean[param.name]
            kept = np.isfinite(array) if array.dtype == np.float32 else array != -1  # as poison
            assert kept.any()
            assert_same_bits(
                clean[param.name][kept], dirty[param.name][kept], f"{case} {param.name}"
            )


def few_and_many() -> list[Case]:
    """Launches of which backends have a kernel for few rows and one for many."""
    linears = [linear(70, 20, K, N) for K, N in ((96, 40), (520, 33), (1030, 16))]
    caches = (((4, 2), 32, 245, "bf16"), ((6, 2), 80, 250, "f32"), ((6, 1), 256, 509, "bf16"))
    attentions = [
        attention(70, 20, heads, D, position, 600, kv) for heads, D, position, kv in caches
    ]
    return [*linears, *attentions]


@pytest.mark.parametrize(
    "case", few_and_many(), ids=lambda c: "-".join(map(str, (c.op, *_shape(c, "y"))))
)
def test_kernels_for_few_and_many_rows_agree(runner: Runner, case: Case) -> None:
    """The same 20 rows in launches of 20 to 70, with and without partials side by side."""
    n = 20
    whole = runner.run(case)["y"][:n]
    for T in (20, 32, 33, 64):
        operands = {
            name: _piece(case, name, 0, n, T) for name in case.operands if has_rows(case, name)
        }
        same = case.but(**operands)
        variants = [same]
        if "partials" in case.operands and n == T and runner.backend.name != "cpu":
            variants.append(same.but(partials=(T, *_shape(case, "partials")[1:])))
        for variant in variants:
            assert_same_bits(whole, runner.run(variant)["y"][:n], f"{case} in {T} rows")


@pytest.fixture(scope="session")
def others(runner: Runner) -> Iterator[list[Runner]]:
    """simt devices whose threads and blocks run in random orders, of several sizes."""
    precision: Precision = "high" if runner.backend.acts.narrow is DType.BF16X2 else "bfloat16"
    devices = [
        SimtDevice(precision, seed=seed, multiprocessors=size)
        for seed, size in ((1, 16), (2, 108), (3, 1), (4, 1000))
    ]
    yield [Runner(device) for device in devices]
    for device in devices:
        device.close()


@pytest.mark.only_on("simt", "simt-high")
@pytest.mark.parametrize("case", [*CASES, *all_cases(ODD), *few_and_many()], ids=str)
def test_any_schedule_gives_the_same_bits(runner: Runner, others: list[Runner], case: Case) -> None:
    """And any size of the device, which chooses tiles."""
    in_order = runner.run(case)
    for other in others:
        after = other.run(case)
        for name in in_order.keys() - WORKSPACE:
            assert_same_bits(in_order[name], after[name], f"{case} {name}")


@pytest.mark.only_on("cpu")
def test_any_number_of_threads_gives_the_same_bits(runner: Runner) -> None:
    cases = [*CASES, *all_cases(ODD), *sample_cases()]
    try:
        results = []
        for threads in (1, 2, 3):
            one = Runner(make_backend("cpu", threads))
            results.append([one.run(case) for case in cases])
    finally:
        runner.backend.build(OPS)  # the pool is the process's: back to what the session had
    for case, *runs in zip(cases, *results, strict=True):
        for name in runs[0].keys() - WORKSPACE:
            for threads, other in zip((2, 3), runs[1:], strict=True):
                assert_same_bits(runs[0][name], other[name], f"{case} {name}, {threads} threads")


@pytest.mark.slow
@pytest.mark.only_on("cpu")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an x86 architecture")
def test_any_vector_width_gives_the_same_bits(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels built for plain x86-64: 4 lanes, no fused instructions, fma from the C library."""
    narrow = tuple(f.replace("native", "x86-64") for f in toolchain.CFLAGS)
    monkeypatch.setattr(toolchain, "CFLAGS", narrow)
    other = Runner(make_backend("cpu", 2))
    for case in [*CASES, *all_cases(ODD), *sample_cases(), *policy_cases(), *vision_cases()]:
        wide, slim = runner.run(case), other.run(case)
        for name in wide.keys() - WORKSPACE:
            assert_same_bits(wide[name], slim[name], f"{case} {name}")
