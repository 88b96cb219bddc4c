"""The SIMT shim finds what it promises to find: planted faults, each caught; real kernels, clean.

IS: faults in tiny kernels (the checks of the shim itself), faults planted into the shipped sources
(would the suite notice?), random schedules, the race detector over every kernel. IS NOT: a check of
results, see test_ops.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cuda.compiler_api import Binary, Compiler, Unit
from flashrt.backends.cuda.device import Capacities, CudaDevice
from flashrt.backends.cuda.driver_api import ArgumentBlock, LaunchConfig
from flashrt.backends.cuda.sources import shipped
from flashrt.backends.simt import kernel as simt_kernel
from flashrt.backends.simt.build import ShimCompiler, kernel_names
from flashrt.backends.simt.device import SimtDevice
from flashrt.backends.simt.driver import SimtDriver
from flashrt.base.errors import BackendError, CompileError
from flashrt.ops import OPS
from tests.backend.cases import HOLDS, all_cases, attention, delta_rule, linear, randn, ssm
from tests.backend.draft_cases import SHIFTED, drafting_cases
from tests.backend.policy_cases import policy_cases
from tests.backend.runner import Case, Runner, rng_for
from tests.backend.test_sample import PENALTIES, params_case, sample_case, sampler
from tests.backend.vision_cases import vision_cases

SEEDS = range(1, 7)  # random schedules; 0 is in order

# ---- tiny kernels: what the shim refuses

HEADER = (
    ("args.h", "#pragma once\n"),
    ("flashrt.cuh", shipped()["flashrt.cuh"]),
)
TINY = """
#include "flashrt.cuh"
struct tiny_args { float *x, *y; };
KERNEL(64) tiny(ARGS tiny_args a) {
  int i = threadIdx.x;
  __shared__ __align__(16) float s[64];
  DYNAMIC_SHARED(float, d);
  %s
}
"""
CLEAN = """
  copy_async4(s + i, a.x + i);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  d[i] = s[63 - i];
  a.y[i] = warp_sum(d[i]);
"""
REFUSED = {
    "exit before a barrier": (
        "if (i >= 48) return; __syncthreads(); a.y[i] = 1;",
        r"deadlock: 16 of 64 threads exited; 48 wait at barrier tiny.cu:\d+",
    ),
    "divergent barriers": (
        "if (i < 32) __syncthreads();\n else __syncthreads();\n a.y[i] = 1;",
        r"divergent barrier 0: thread \d+ at tiny.cu:\d+, thread \d+ at tiny.cu:\d+",
    ),
    "part of a warp in a shuffle": (
        "if (i & 1) a.y[i] = __shfl_xor_sync(FULL_WARP, 1.0f, 1);",
        "absent lanes 55555555",
    ),
    "a lane outside the mask": (
        "if (i & 1) a.y[i] = __shfl_xor_sync(0xaaaaaaaau, 1.0f, 1);",
        "shuffle reads lane .* outside mask aaaaaaaa",
    ),
    "warps that disagree": (
        "a.y[i] = i & 1 ? __shfl_sync(FULL_WARP, 1.0f, 0)\n : __shfl_sync(FULL_WARP, 1.0f, 1);",
        "warp . disagrees",
    ),
    "a copy never waited for": (
        "copy_async4(s + i, a.x + i); copy_async_commit(); a.y[i] = 1;",
        "ended with 1 cp.async never waited for",
    ),
    "a misaligned copy": (
        "copy_async16(s, a.x + 1); copy_async_commit(); copy_async_wait<0>();",
        "misaligned address",
    ),
    "past the end of dynamic shared memory": (
        "d[i + 1] = 0; a.y[i] = d[i];",
        "dynamic shared memory written past its end",
    ),
    "too much stack": (
        "volatile float big[17000]; for (int k = 0; k < 17000; k++) big[k] = i; a.y[i] = big[5];",
        "needs more than 65536 bytes of stack",
    ),
    "a trap": ("if (i == 7) __trap();", r"tiny.cu:\d+: __trap in thread 7"),
}


def run_tiny(
    body: str, folder: Path, seed: int = 0, *, is_watched: bool = False
) -> NDArray[np.float32]:
    compiler = ShimCompiler(folder, is_watched=is_watched)
    binary = compiler.compile(Unit("tiny.cu", TINY % body, headers=HEADER))
    kernel = simt_kernel.find(binary.path, ctypes.CDLL(str(binary.path)), "tiny")
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    block = ArgumentBlock(np.array([x.ctypes.data, y.ctypes.data], np.uint64).tobytes())
    kernel.run(LaunchConfig((2, 1, 1), (64, 1, 1), 256), block, seed)
    return y


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("is_watched", [False, True])
def test_a_clean_kernel_runs(tmp_path: Path, seed: int, is_watched: bool) -> None:
    y = run_tiny(CLEAN, tmp_path, seed, is_watched=is_watched)
    assert y.tolist() == [float(sum(range(32, 64)))] * 32 + [float(sum(range(32)))] * 32


@pytest.mark.parametrize("fault", REFUSED)
def test_the_shim_refuses(fault: str, tmp_path: Path) -> None:
    body, message = REFUSED[fault]
    with pytest.raises(BackendError, match=message):
        run_tiny(body, tmp_path)


def test_a_launch_that_failed_leaves_nothing_to_other_libraries(tmp_path: Path) -> None:
    """All libraries have their stacks in one place. Fault: what one overwrote fails the next."""
    with pytest.raises(BackendError, match="bytes of stack"):
        run_tiny(REFUSED["too much stack"][0], tmp_path)
    assert run_tiny(CLEAN, tmp_path)[0] == sum(range(32, 64))


def test_functions_of_floats_are_in_float(tmp_path: Path) -> None:
    """As CUDA has them. Fault: C's own, in double, take a kernel's floats."""
    names = (
        "fabs", "sqrt", "exp", "exp2", "log", "log2", "sin", "cos", "tanh", "floor", "ceil", "rint",
        "round", "trunc",
    )  # fmt: skip
    calls = [f"{name}(a.x[i])" for name in names]
    calls += ["pow(a.x[i], 2.f)", "fmin(a.x[i], 2.f)", "fmax(a.x[i], 2.f)", "fma(a.x[i], 2.f, 1.f)"]
    body = " ".join(f"static_assert(sizeof({call}) == sizeof(float));" for call in calls)
    assert run_tiny(f"{body} a.y[i] = sqrt(a.x[i]);", tmp_path)[4] == 2


def test_a_copy_read_too_early_is_poison(tmp_path: Path) -> None:
    y = run_tiny(CLEAN.replace("copy_async_wait<0>();", "") + "copy_async_wait<0>();", tmp_path)
    assert np.isnan(y).all()


def test_shared_memory_starts_as_poison(tmp_path: Path) -> None:
    assert np.isnan(run_tiny("a.y[i] = s[i] + d[i];", tmp_path)).all()


def test_the_race_detector_sees_a_lost_update_that_no_schedule_shows(tmp_path: Path) -> None:
    body = "if (i == 0) s[0] = 0; __syncthreads(); s[0] += 1; __syncthreads(); a.y[i] = s[0];"
    assert run_tiny(body, tmp_path).tolist() == [64.0] * 64
    with pytest.raises(BackendError, match=r"race: thread \d+ .* at .*tiny\.cu:\d+"):
        run_tiny(body, tmp_path, is_watched=True)


def test_the_race_detector_sees_copies(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="race: thread 32 "):
        run_tiny(CLEAN.replace("__syncthreads();", ""), tmp_path, is_watched=True)


def test_a_kernel_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="no_such_thing"):
        run_tiny("no_such_thing();", tmp_path)


def test_kernel_names() -> None:
    text = 'extern "C" __global__ void __launch_bounds__(128)\na(int x) {}\nKERNEL(32) b(ARGS c d)'
    assert kernel_names(text) == ["a", "b"]
    assert all(kernel_names(source) for name, source in shipped().items() if name.endswith(".cu"))


# ---- faults planted into the shipped kernels


@dataclass(frozen=True, slots=True)
class Plant:
    """A fault: `old` in a source becomes `new`, and the case on which it shows."""

    source: str
    old: str
    new: str
    case: Case


@dataclass(frozen=True, slots=True)
class PlantingCompiler:
    """A compiler that changes one source on the way."""

    inner: Compiler
    plant: Plant

    @property
    def identity(self) -> str:
        return self.inner.identity

    @property
    def title(self) -> str:
        return self.inner.title

    def is_cached(self, unit: Unit) -> bool:
        return self.inner.is_cached(self.changed(unit))

    def compile(self, unit: Unit) -> Binary:
        return self.inner.compile(self.changed(unit))

    def changed(self, unit: Unit) -> Unit:
        name, old, new = self.plant.source, self.plant.old, self.plant.new
        texts = dict(unit.headers) | {unit.name: unit.text}
        if name not in texts:
            return unit
        assert texts[name].count(old) == 1, f"{old!r} is not in the source"
        headers = tuple((n, t.replace(old, new) if n == name else t) for n, t in unit.headers)
        text = unit.text.replace(old, new) if name == unit.name else unit.text
        return replace(unit, text=text, headers=headers)


PLANTS = {
    "few tokens: no barrier before the fold": Plant(
        "linear_few.cuh",
        "next barrier\n    __syncthreads();",
        "next barrier",
        linear(3, 3, 1024, 16),
    ),
    "few tokens: no barrier between folds, for parts take no turns": Plant(
        "linear_few.cuh", "turn = s0 / WARPS & 1", "turn = 0", linear(3, 3, 4352, 16)
    ),
    "many tokens: no barrier before a stage is filled again": Plant(
        "linear_many.cuh", "__syncthreads();  // this", "// this", linear(64, 33, 288, 32)
    ),
    "many tokens: a stage read before its copies are waited for": Plant(
        "linear_many.cuh", "wait<STAGES - 2>", "wait<STAGES - 1>", linear(64, 33, 288, 32)
    ),
    "many tokens: sums are added up when a part of K is missing": Plant(
        "linear_many.cu",
        "1u) == split.parts - 1u",
        "1u) == split.parts - 2u",
        linear(64, 33, 4400, 160),
    ),
    "delta rule: a tile read before its copies are waited for": Plant(
        "delta_rule.cu",
        "copy_async_wait<0>();\n    __syncthreads();",
        "__syncthreads();",
        delta_rule(7, 7, (1, 2), (32, 16)),
    ),
    "delta rule: sums over the wrong lanes": Plant(
        "delta.cuh", "o = 4; o < 32", "o = 2; o < 16", delta_rule(7, 7, (1, 2), (32, 16))
    ),
    "ssm: a tile read before its copies are waited for": Plant(
        "ssm.cu",
        "copy_async_wait<0>();\n    __syncthreads();",
        "__syncthreads();",
        ssm(7, 7, (1, 2), (32, 16), (0, 0)),
    ),
    "attention: no barrier before the values that other warps have copied": Plant(
        "attention_many.cu",
        "    if (SHARERS > 1) __syncthreads();\n    else __syncwarp();\n#pragma",
        "#pragma",
        attention(64, 33, (4, 2), 64, 500, 600, "bf16"),
    ),
    "attention: keys read before their copies are waited for": Plant(
        "attention_many.cu",
        "copy_async_wait<STAGES - 1>();\n    __syncwarp();",
        "copy_async_wait<STAGES>();\n    __syncwarp();",
        attention(64, 33, (4, 2), 64, 240, 600, "bf16"),
    ),
    "attention: no barrier before the weights are read": Plant(
        "attention_few.cu",
        "Scales(launch, key_head));\n  __syncthreads();",
        "Scales(launch, key_head));",
        attention(3, 3, (4, 2), 32, 200, 300, "bf16"),
    ),
}


def planted(names: Iterable[str]) -> list[object]:
    """Cases by name; each compiles kernels, so the quick suite takes the first alone."""
    first, *others = names
    return [pytest.param(first), *(pytest.param(n, marks=pytest.mark.slow) for n in others)]


def run_planted(
    plant: Plant, compiler: Compiler, seed: int, *, is_planted: bool
) -> NDArray[np.generic]:
    """The op's outputs as one array."""
    if is_planted:
        compiler = PlantingCompiler(compiler, plant)
    device = CudaDevice(
        SimtDriver(seed, 16 << 30, 16), compiler, name="simt", is_host=True,
        capacities=Capacities(staging_bytes=1 << 20),
    )  # fmt: skip
    after = Runner(device).run(plant.case)
    device.close()
    outputs = [name for name, given in plant.case.operands.items() if isinstance(given, tuple)]
    unread = ("partials", "key_scales", "value_scales")  # scales: no cache here holds codes
    return np.concatenate([after[n].reshape(-1) for n in outputs if n not in unread])


@pytest.mark.parametrize("name", planted(PLANTS))
def test_a_planted_fault_shows_in_some_schedule(name: str, tmp_path: Path) -> None:
    plant, compiler = PLANTS[name], ShimCompiler(tmp_path)
    right = run_planted(plant, compiler, 0, is_planted=False)
    assert np.isfinite(right[: right.size // 4]).all()
    for seed in SEEDS:
        again = run_planted(plant, compiler, seed, is_planted=False)
        assert np.array_equal(again, right, equal_nan=True)
    found = []
    for seed in (0, *SEEDS):
        try:
            wrong = run_planted(plant, compiler, seed, is_planted=True)
        except BackendError:
            found.append(seed)
        else:
            found += [seed] * (not np.array_equal(wrong, right, equal_nan=True))
    assert found, f"{name}: no schedule shows it"


@pytest.mark.parametrize("name", planted(name for name in PLANTS if "no barrier" in name))
def test_the_race_detector_names_a_missing_barrier(name: str, tmp_path: Path) -> None:
    compiler = ShimCompiler(tmp_path, is_watched=True)
    with pytest.raises(BackendError, match=r"race: thread \d+ .*\.cuh?:\d+"):
        run_planted(PLANTS[name], compiler, 0, is_planted=True)


# ---- the race detector over every kernel


@pytest.fixture(scope="module", params=["bfloat16", "high"])
def watched(request: pytest.FixtureRequest) -> Runner:
    return Runner(SimtDevice(request.param, is_watched=True, seed=5))


def few_and_many(op: str) -> list[Case]:
    """A case of few rows and the one of most; those of policies as they come."""
    if of_policies := [case for case in (*policy_cases(), *vision_cases()) if case.op == op]:
        return of_policies
    every = [*all_cases(), *all_cases(SHIFTED), *drafting_cases(), *HOLDS]
    cases = [case for case in every if case.op == op]
    cases.sort(key=lambda c: np.asarray(c.operands["cursor"])[1])
    return [cases[len(cases) // 3], cases[-1]]


@pytest.mark.parametrize("op", [op.name for op in OPS if op.name not in ("advance", "sample")])
def test_every_kernel_is_free_of_races(watched: Runner, op: str) -> None:
    for case in few_and_many(op):
        watched.run(case)


@pytest.mark.parametrize("words", [sampler(0.0), sampler(0.8), sampler(0.8, 20, 0.9, 0.01)])
def test_sampling_is_free_of_races(watched: Runner, words: NDArray[np.uint32]) -> None:
    logits = randn(rng_for("races"), 3000, scale=3)
    assert 0 <= watched.run(sample_case(logits, words))["cursor"][2] < logits.size


def test_penalties_are_free_of_races(watched: Runner) -> None:
    logits = randn(rng_for("races"), 3000, scale=3)
    case = params_case(logits, PENALTIES[-1], [1, 2, 2, 2999, 1] * 70)
    assert 0 <= watched.run(case)["cursor"][2] < logits.size
