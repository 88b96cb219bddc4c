"""Promise: rows of prompts are as many as the bound leaves time for, and enough to get on."""

from __future__ import annotations

import random

import pytest

from flashrt.serve.pace import LEAST_ROWS, SHARE, Pace

MOST = 57


def steps(
    alone: float, fixed: float, each: float, *, itl_s: float | None = None, noise: float = 0.1
) -> list[tuple[int, float]]:
    """(rows, seconds) of the last of many steps beside 7 lanes, of this cost."""
    dice, pace, found = random.Random(1), Pace(itl_s), []
    for _ in range(400):
        rows = pace.rows(7, MOST)
        if rows and dice.random() < 0.15:  # a prompt ends
            rows = dice.randint(1, rows)
        seconds = (alone + (fixed + each * rows if rows else 0)) * (1 + dice.gauss(0, noise))
        pace.note(7, rows, seconds)
        found.append((rows, seconds))
    return found[50:]


@pytest.mark.parametrize("fixed", [0.0, 0.003])
@pytest.mark.parametrize("itl_s", [None, 0.050])
def test_a_step_keeps_to_its_bound(fixed: float, itl_s: float | None) -> None:
    """Fault: a row's cost, or a mixed step's own, is not learnt; so decoders wait for too long, or
    prompts for nothing.
    """
    bound = itl_s or 0.020 * (1 + SHARE)
    full = sorted(seconds for rows, seconds in steps(0.020, fixed, 0.001, itl_s=itl_s) if rows > 9)
    assert 0.8 * bound < full[len(full) // 2] < 1.1 * bound
    assert full[int(0.95 * len(full))] < 1.35 * bound


def test_where_rows_cost_nothing_a_step_has_all(noise: float = 0.05) -> None:
    """Fault: a graph that takes as long for few rows as for many is given few."""
    for alone in (0.002, 0.010):
        rows = [rows for rows, _ in steps(alone, 0.003, 0.0, noise=noise) if rows]
        assert sorted(rows)[len(rows) // 2] == MOST


def test_prompts_get_on_whatever_the_bound() -> None:
    """Fault: a bound that cannot be kept, or a step that was never measured, ends all feeding."""
    found = steps(0.020, 0.0, 0.001, itl_s=0.001)
    assert max(rows for rows, _ in found) == LEAST_ROWS
    assert 0 < sum(rows == 0 for rows, _ in found) < 0.03 * len(found), "looked at again, rarely"
    pace = Pace()
    assert pace.rows(3, MOST) == 0, "what a step takes without prompts is to be known first"
    pace.note(3, 0, 0.01)
    assert pace.rows(3, MOST) == MOST and pace.rows(4, MOST) == 0
