"""Ops of robot policies against the reference; rows, threads and schedules change no bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.simt.device import SimtDevice
from tests.backend.conftest import make_backend
from tests.backend.policy_cases import DENSE_SIZES, dense, dense_add, flow_begin, policy_cases
from tests.backend.runner import Case, Runner
from tests.backend.test_exactness import assert_same_bits
from tests.backend.test_ops import check

CASES = policy_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_of_policies_equals_reference(runner: Runner, case: Case) -> None:
    check(runner, case, runner.run(case))


def test_replay_equals_eager(runner: Runner) -> None:
    for case in {c.op: c for c in CASES}.values():
        eager, replayed = runner.run(case), runner.run(case, is_captured=True)
        for name in eager:
            assert_same_bits(eager[name], replayed[name], f"{case} {name}")


@pytest.mark.parametrize("size", [s for s in DENSE_SIZES if s[0] > 1], ids=str)
def test_a_row_knows_nothing_of_the_others(runner: Runner, size: tuple[int, int, int]) -> None:
    for case in (dense(*size, activation=1), dense_add(*size)):
        whole = runner.run(case)["y"]
        for t in range(size[0]):
            rows = {
                name: array[t : t + 1] if isinstance(array, np.ndarray) else (1, size[2])
                for name, array in case.operands.items()
                if name in ("x", "y")
            }
            assert_same_bits(whole[t : t + 1], runner.run(case.but(**rows))["y"], f"{case} {t}")


def test_an_output_depends_on_its_own_row_of_weights(runner: Runner) -> None:
    whole = dense(1, 136, 40, activation=0)
    w, b = whole.operands["w"], whole.operands["b"]
    assert isinstance(w, np.ndarray) and isinstance(b, np.ndarray)
    y = runner.run(whole)["y"]
    for first, stop in ((0, 1), (7, 40), (33, 34)):
        part = whole.but(w=w[first:stop], b=b[first:stop], y=(1, stop - first))
        assert_same_bits(y[:, first:stop], runner.run(part)["y"], f"outputs [{first}, {stop})")


def test_noise_depends_on_seed_and_tick_alone(runner: Runner) -> None:
    def noise(H: int, committed: int, **cursor: int) -> NDArray[Any]:
        case = flow_begin(H, 3, committed, stop=100, **cursor)
        flow = runner.run(case)["flow"]
        return np.asarray(flow[: 3 * H].reshape(H, 3)[committed:])

    base = noise(40, 0, tick=6, observed=6)
    assert_same_bits(base[:9], noise(9, 0, tick=6, observed=6), "a shorter chunk")
    assert_same_bits(base[4:9], noise(9, 4, tick=7, observed=6), "committed rows")
    other = noise(40, 0, tick=7, observed=7)
    assert not np.isclose(base, other).any()
    both = np.concatenate([base, other]).reshape(-1)
    assert abs(both.mean()) < 0.25 and 0.8 < both.std() < 1.2


def test_nan_reaches_the_action(runner: Runner) -> None:
    """An overflow must be seen by the host, not clipped away."""
    case = next(c for c in CASES if c.op == "flow_end" and c.operands["queue"] == (16, 7))
    x = np.array(case.operands["x"])
    x[5] = np.nan
    queue = runner.run(case.but(x=x))["queue"].reshape(-1)
    assert np.isnan(queue[5]) and np.isfinite(np.delete(queue, 5)).all()


@pytest.fixture(scope="module")
def others(runner: Runner) -> Iterator[list[Runner]]:
    """The cpu with other numbers of threads; simt with other orders of threads and blocks."""
    if runner.backend.name == "cpu":
        yield [Runner(make_backend("cpu", threads)) for threads in (1, 3)]
        runner.backend.resize(2)  # type: ignore[attr-defined]
        return
    devices = [SimtDevice(seed=seed, multiprocessors=n) for seed, n in ((1, 16), (2, 1), (3, 1000))]
    yield [Runner(device) for device in devices]
    for device in devices:
        device.close()


@pytest.mark.only_on("cpu", "simt", "simt-high")
def test_threads_and_schedules_change_no_bit(runner: Runner, others: list[Runner]) -> None:
    assert_no_bit_changes(runner, others, CASES)


def assert_no_bit_changes(runner: Runner, others: list[Runner], cases: list[Case]) -> None:
    """On other numbers of threads, or in other orders of them."""
    for case in cases:
        first = runner.run(case)
        for threads, other in zip((1, 3, 2), others, strict=False):
            if runner.backend.name == "cpu":  # the pool is the process's
                other.backend.resize(threads)  # type: ignore[attr-defined]
            after = other.run(case)
            for name in first:
                assert_same_bits(first[name], after[name], f"{case} {name}")
