"""Every op on every backend against the reference, poison in all that is not its to touch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.base.errors import PlanError
from flashrt.core.region import DType
from flashrt.ops.table import OPS
from tests.backend.cases import (
    HOLDS,
    ODD,
    WORKSPACE,
    advance,
    all_cases,
    attention,
    cursor,
    embed,
    randn,
)
from tests.backend.draft_cases import drafting_cases
from tests.backend.policy_cases import policy_cases
from tests.backend.runner import Case, Runner, rng_for
from tests.backend.test_sample import sample_case, sampler
from tests.backend.vision_cases import vision_cases
from tests.policy_reference import POLICY_REFERENCE
from tests.reference import REFERENCE, Operands
from tests.tolerances import tolerance
from tests.vision_reference import VISION_REFERENCE

CASES = [*all_cases(), advance(30, 3), *HOLDS]
ODD_CASES = all_cases(ODD)
_REFERENCE = REFERENCE | POLICY_REFERENCE | VISION_REFERENCE
_PARAMS = {op.name: {p.name: p for p in op.params} for op in OPS}


def bits(x: NDArray[Any]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


def expected(case: Case, before: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """The reference's results for operands as the kernel met them."""
    arrays = {
        name: array.astype(np.float64) if array.dtype == np.float32 else array
        for name, array in before.items()
    }
    with np.errstate(all="ignore"):
        return _REFERENCE[case.op](Operands(arrays, case.attrs))


def relative_error(got: NDArray[Any], want: NDArray[Any]) -> float:
    """rms of the difference over rms of what is wanted."""
    if not want.size:
        return 0.0
    difference = got.astype(np.float64) - want
    scale = max(float(np.sqrt(np.mean(want.astype(np.float64) ** 2))), 1e-30)
    return float(np.sqrt(np.mean(difference**2))) / scale


def allowed(runner: Runner, case: Case, name: str) -> float:
    backend = runner.backend
    return tolerance(
        case.op, backend.acts.narrow, runner.dtype(case, name), is_gpu=backend.name == "cuda"
    )


def check(runner: Runner, case: Case, after: dict[str, NDArray[Any]]) -> None:
    """Outputs near the reference where it has values, and bits untouched everywhere else."""
    before = runner.poison(case) | runner.stored(case)
    wanted = expected(case, before)
    for name, param in _PARAMS[case.op].items():
        if name in WORKSPACE:
            continue
        got, want = after[name], wanted.get(name, np.full(after[name].shape, np.nan))
        if param.access == "r":
            assert np.array_equal(got, before[name], equal_nan=True), f"{name} is an input"
            continue
        is_set = ~np.isnan(want)
        assert np.array_equal(bits(got)[~is_set], bits(before[name])[~is_set]), (
            f"{name}: not its to write"
        )
        error = relative_error(got[is_set], want[is_set])
        assert error <= allowed(runner, case, name), f"{case} {name}: error {error:.2e}"


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        attention(8, 7, (4, 2), 32, 250, 700, "bf16"),  # blocks of keys side by side
        attention(64, 33, (4, 2), 64, 240, 600, "bf16"),  # one after the other
        attention(64, 33, (7, 1), 40, 300, 600, "f32"),
        attention(8, 5, (2, 2), 32, 3, 300, "f32", shift=1),
        attention(8, 5, (24, 1), 32, 40, 300, "bf16"),  # a block has one row
    ],
    ids=["few", "many", "many-f32", "few-f32", "one"],
)
def test_a_value_that_is_not_finite_stays_with_rows_that_see_it(
    runner: Runner, case: Case, odd: float
) -> None:
    """Rows before it: to the bit as if it were not there. Red where hidden values are multiplied by
    a weight of 0 (which makes NaN of them), or a neighbour of such a value is taken with it.
    """
    values = np.array(case.operands["values"])
    q, (position, n) = np.shape(case.operands["q"]), np.array(case.operands["cursor"])[:2]
    group, bad = q[1] // values.shape[0], int(n) // 2
    dims = [0, 9, q[2] - 2]
    clean = runner.run(case)["y"].reshape(q)[:n]
    values[0, position + bad, dims] = odd
    values[0, position + n - 1, 5] = odd  # the last row's: one row sees it
    got = runner.run(case.but(values=values))["y"].reshape(q)[:n]
    sees = np.zeros(got.shape, bool)
    sees[bad:, :group, dims] = True
    sees[n - 1 :, :group, 5] = True
    assert not np.isfinite(got[sees]).any()
    assert np.array_equal(bits(got)[~sees], bits(clean)[~sees])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_equals_reference(runner: Runner, case: Case) -> None:
    check(runner, case, runner.run(case))


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_op_equals_reference_at_odd_sizes(runner: Runner, case: Case) -> None:
    check(runner, case, runner.run(case))


@pytest.mark.only_on("simt", "simt-high", "cuda", "cuda-high")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_equals_the_cpu(runner: Runner, cpu: Runner, case: Case) -> None:
    """From the same inputs, as far as the two tolerances go."""
    case = case.but(**runner.stored(case))
    ours, theirs = runner.run(case), cpu.run(case)
    for name, param in _PARAMS[case.op].items():
        if param.access == "r" or name in WORKSPACE:
            continue
        is_set = ~np.isnan(theirs[name])
        assert np.array_equal(is_set, ~np.isnan(ours[name])), f"{case} {name}: other elements"
        error = relative_error(ours[name][is_set], theirs[name][is_set])
        most = allowed(runner, case, name) + allowed(cpu, case, name)
        assert error <= most, f"{case} {name}: {error:.2e} from the cpu"


@pytest.mark.only_on("simt", "simt-high", "cuda", "cuda-high")  # the cpu takes all sizes
@pytest.mark.parametrize(
    ("case", "what"),
    [
        (attention(7, 7, (2, 1), 36, 5, 77, "bf16"), "head size 36 must be a multiple of 8"),
        (attention(64, 7, (2, 1), 264, 5, 77, "f32"), "head size 264 .* up to 256"),
        (attention(7, 7, (33, 1), 32, 5, 77, "bf16"), "33 query heads per key head at most 32"),
        (sample_case(np.zeros(7, np.float32), sampler(0)), "at least 8 logits, got 7"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.op,
)
def test_sizes_without_a_kernel_are_refused(runner: Runner, case: Case, what: str) -> None:
    with pytest.raises(PlanError, match=what):
        runner.run(case)


def test_every_op_has_a_reference_and_cases() -> None:
    names = {op.name for op in OPS}
    assert set(_REFERENCE) == names
    cases = (*CASES, *drafting_cases(), *policy_cases(), *vision_cases())
    assert {c.op for c in cases} | {"sample"} == names  # sample: see test_sample


def test_replay_equals_eager(runner: Runner) -> None:
    first = {c.op: c for c in reversed(CASES)}
    for case in first.values():
        eager, replayed = runner.run(case), runner.run(case, is_captured=True)
        for name in eager.keys() - WORKSPACE:
            assert np.array_equal(bits(eager[name]), bits(replayed[name])), f"{case} {name}"


def test_a_launch_for_no_row_writes_nothing(runner: Runner) -> None:
    """What `hold` relies on: red where a kernel keeps a window or a state that no row changed."""
    for case in {c.op: c for c in reversed(CASES) if c.op not in ("last_cursor", "hold")}.values():
        idle = case.but(cursor=cursor(5, 0))
        before, after = runner.poison(idle) | runner.stored(idle), runner.run(idle)
        for name in after.keys() - WORKSPACE:
            assert np.array_equal(bits(after[name]), bits(before[name])), f"{case} {name}"


@pytest.mark.only_on("cpu")
def test_unknown_token_gives_nan(runner: Runner) -> None:
    """The host refuses unknown ids on every device; the cpu kernel guards its table besides."""
    case = embed(3, 3, V=40, H=64, position=0, S=32)
    x = runner.run(case.but(tokens=np.array([39, 40, -1], np.int32)))["x"]
    assert np.isfinite(x[0]).all() and np.isnan(x[1:]).all()


def test_rope_is_accurate_at_large_positions(runner: Runner) -> None:
    """The angle's float32 is the model's; sine and cosine of it are exact to an ulp."""
    D, S, position = 32, 300_032, 300_000
    rng = rng_for("far")
    operands = {
        "u": randn(rng, 1, 4 * D), "q_norm": np.ones(D, np.float32),
        "k_norm": np.ones(D, np.float32), "inv_freq": (0.8 ** np.arange(16)).astype(np.float32),
        "cursor": cursor(position, 1), "q": (1, 1, D), "keys": (1, S, D), "values": (1, S, D),
        "key_scales": (1, S, 1), "value_scales": (1, S, 1),
    }  # fmt: skip
    dtypes = {"keys": DType.BF16, "values": DType.BF16}
    attrs = {"eps": 1e-6, "shift": 0, "gated": 1, "normed": 1, "magnitude": 1.0}
    case = Case("rope_append", operands, attrs, dtypes)
    check(runner, case, runner.run(case))
