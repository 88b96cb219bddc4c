"""Ops on images and rows of features against the reference; company and threads change no bit."""

from __future__ import annotations

import numpy as np
import pytest

from tests.backend.runner import Case, Runner
from tests.backend.test_exactness import assert_same_bits
from tests.backend.test_ops import check
from tests.backend.test_policy_ops import assert_no_bit_changes, others
from tests.backend.vision_cases import (
    CONVOLUTIONS,
    added,
    attend,
    conv2d,
    layer_norm,
    max_pool,
    rows,
    vision_cases,
)

CASES = vision_cases()
pytestmark = pytest.mark.only_on("cpu", "simt", "cuda")  # precision is of matrix units
__all__ = ["others"]  # a fixture


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_on_images_equals_reference(runner: Runner, case: Case) -> None:
    check(runner, case, runner.run(case))


def test_replay_equals_eager(runner: Runner) -> None:
    for case in {c.op: c for c in CASES}.values():
        eager, replayed = runner.run(case), runner.run(case, is_captured=True)
        for name in eager:
            assert_same_bits(eager[name], replayed[name], f"{case} {name}")


@pytest.mark.parametrize("case", [conv2d(*c) for c in CONVOLUTIONS if c[0][0] > 1], ids=str)
def test_an_image_knows_nothing_of_the_others(runner: Runner, case: Case) -> None:
    """Fault: a tile that spans two images reads across the border, or sums in another order."""
    for together in (case, added(case), max_pool(3, 9, 7, 6)):
        whole = runner.run(together)["y"]
        for b in range(len(whole)):
            one = {
                name: array[b : b + 1] if isinstance(array, np.ndarray) else (1, *array[1:])
                for name, array in together.operands.items()
                if name in ("x", "y")
            }
            alone = runner.run(together.but(**one))["y"]
            assert_same_bits(whole[b : b + 1], alone, f"{together} {b}")


def test_a_row_knows_nothing_of_the_others(runner: Runner) -> None:
    """Fault: rows of a rest (13 = 12 + 1, or a narrower tile) sum in another order than a tile."""
    for case, axis in ((rows(29, 64, 96), 1), (layer_norm(12, 64), 0), (attend(17, 300, 3, 40), 0)):
        names = ("x", "y") if "x" in case.operands else ("q", "y")
        whole = runner.run(case)["y"]
        count = whole.shape[axis]
        for first, stop in ((0, 1), (3, 11), (count - 1, count)):
            at = (slice(None),) * axis + (slice(first, stop),)
            some = {
                name: array[at]
                if isinstance(array, np.ndarray)
                else (*array[:axis], stop - first, *array[axis + 1 :])
                for name, array in case.operands.items()
                if name in names
            }
            assert_same_bits(whole[at], runner.run(case.but(**some))["y"], f"{case} {first}")


def test_nan_is_not_pooled_or_rectified_away(runner: Runner) -> None:
    """An overflow must reach the action, where the host sees it."""
    for case in (max_pool(1, 6, 6, 4), rows(13, 7, 5, activation=2)):
        x = np.array(case.operands["x"])
        x[0, 3, 0, 2] = np.nan
        assert np.isnan(runner.run(case.but(x=x))["y"]).any()


@pytest.mark.only_on("cpu", "simt")
def test_threads_and_schedules_change_no_bit(runner: Runner, others: list[Runner]) -> None:
    assert_no_bit_changes(runner, others, CASES)
