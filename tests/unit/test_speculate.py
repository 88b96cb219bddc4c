"""The draft length: fixed ones are kept, "auto" follows acceptance and time."""

from __future__ import annotations

import random

import pytest

import flashrt
from flashrt.session.speculate import TRY_EVERY, DraftLength


def run(
    length: DraftLength, steps: int, agree: float, decode: float, draft: float, row: float
) -> list[int]:
    """Draft lengths of so many steps on a device with these times and this acceptance."""
    chosen, rng = [], random.Random(4)
    for _ in range(steps):
        n = length.next(100)
        accepted = 0
        while accepted < n and rng.random() < agree:
            accepted += 1
        length.record(n, accepted, decode + n * (draft + row))
        chosen.append(n)
    return chosen


def test_a_fixed_length_is_kept_within_room() -> None:
    length = DraftLength(4, 8)
    assert [length.next(room) for room in (9, 3, 0, -1)] == [4, 3, 0, 0]
    assert set(run(length, 50, 0.1, 1, 9, 9)) == {4}


def test_auto_measures_a_plain_step_first() -> None:
    assert DraftLength("auto", 8).next(8) == 0


@pytest.mark.parametrize(
    ("agree", "draft", "row", "low", "high"),
    [
        (0.98, 0.02, 0.02, 6, 8),
        (0.6, 0.05, 0.05, 2, 4),
        (0.1, 0.2, 0.1, 0, 0),
        (0.9, 1.2, 0.5, 0, 0),
    ],
)
def test_auto_follows_acceptance_and_time(
    agree: float, draft: float, row: float, low: int, high: int
) -> None:
    settled = run(DraftLength("auto", 8), 400, agree, 1.0, draft, row)[200:]
    usual = sorted(settled)[len(settled) // 2]
    assert low <= usual <= high


def test_auto_tries_again_when_nothing_agreed() -> None:
    length = DraftLength("auto", 8)
    run(length, 200, 0.0, 1.0, 0.1, 0.1)
    idle = run(length, 6 * TRY_EVERY, 0.0, 1.0, 0.1, 0.1)
    assert 1 <= sum(n > 0 for n in idle) <= 3
    assert sum(run(length, 400, 1.0, 1.0, 0.02, 0.02)[200:]) > 200 * 5


@pytest.mark.parametrize("draft", [-1, 9, "often", 1.5, None])
def test_lengths_that_cannot_be(draft: object) -> None:
    with pytest.raises(flashrt.SessionError, match="draft="):
        DraftLength(draft, 8)  # type: ignore[arg-type]


def test_no_head_no_drafts() -> None:
    assert DraftLength(0, 0).next(8) == 0
    for draft in (1, "auto"):
        with pytest.raises(flashrt.SessionError, match="no draft head"):
            DraftLength(draft, 0)  # type: ignore[arg-type]
