"""Ops of drafting against the reference; verify forms against the ops that commit, to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.backend.cases import all_cases
from tests.backend.conftest import make_backend
from tests.backend.draft_cases import SHIFTED, drafting_cases
from tests.backend.runner import Case, Runner, rng_for
from tests.backend.test_exactness import assert_same_bits, has_rows, in_pieces, row_counts
from tests.backend.test_ops import bits, check

SHIFTED_CASES = all_cases(SHIFTED)
CASES = [*SHIFTED_CASES, *drafting_cases()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_of_drafting_equals_reference(runner: Runner, case: Case) -> None:
    check(runner, case, runner.run(case))


@pytest.mark.parametrize("op", ["conv", "delta"])
def test_verify_gives_the_bits_of_the_op_that_commits(runner: Runner, op: str) -> None:
    commits = {"conv_verify": "conv_window", "delta_verify": "delta_rule"}
    for case in [c for c in drafting_cases() if c.op == f"{op}_verify"]:
        out = {"conv": "y", "delta": "o"}[op]
        verified, committed = runner.run(case), runner.run(replace(case, op=commits[case.op]))
        assert np.array_equal(bits(verified[out]), bits(committed[out]))


@pytest.mark.parametrize("case", [c for c in SHIFTED_CASES if c.operands["cursor"][1] > 1], ids=str)
def test_any_split_gives_the_same_bits(runner: Runner, case: Case) -> None:
    n, rng = int(case.operands["cursor"][1]), rng_for("split", str(case))  # type: ignore[arg-type]
    whole = runner.run(case)
    for pieces in row_counts(rng, n):
        for name, array in in_pieces(runner, case, pieces, rng).items():
            at_once = whole[name][:n] if has_rows(case, name) else whole[name]
            assert_same_bits(at_once, array, f"{case} {name} in pieces {pieces}")


@pytest.mark.only_on("cpu")
def test_any_number_of_threads_gives_the_same_bits(runner: Runner) -> None:
    one, three = (Runner(make_backend("cpu", threads)) for threads in (1, 3))
    try:
        for case in CASES:
            one.backend.resize(1)  # type: ignore[attr-defined]
            first = one.run(case)
            three.backend.resize(3)  # type: ignore[attr-defined]
            other = three.run(case)
            for name in first.keys() - {"partials", "work"}:
                assert_same_bits(first[name], other[name], f"{case} {name}")
    finally:
        runner.backend.resize(2)  # type: ignore[attr-defined]
