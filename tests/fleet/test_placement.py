"""Where a branch goes: to its capsule while a lane is free there, else to a free lane anywhere."""

from __future__ import annotations

import pytest

from flashrt.fleet.placement import Seat, choose

LANES, MOST = 4, 8


def seats(*loads: int, holders: str = "", alone: str = "") -> list[Seat]:
    """Workers 0, 1, ... with these loads; `holders` have the capsule, `alone` are reserved."""
    return [
        Seat(i, LANES, load, MOST, str(i) in holders, str(i) in alone)
        for i, load in enumerate(loads)
    ]


@pytest.mark.parametrize(
    ("given", "alone", "expected"),
    [
        (seats(3, 0, holders="0"), False, 0),  # the capsule is there, and a lane is free
        (seats(4, 0, holders="0"), False, 1),  # no lane is free there: the capsule travels
        (seats(4, 5, holders="1"), False, 1),  # no lane is free anywhere: it need not travel
        (seats(5, 4, 4), False, 1),  # the shortest queue, the first of equals
        (seats(8, 8, holders="01"), False, None),  # each has as many as it is given at once
        (seats(2, 1, holders="0"), True, None),  # a suspect waits for a worker without work
        (seats(2, 0, holders="0"), True, 1),
        (seats(0, 3, holders="0", alone="0"), False, 1),  # nobody joins a suspect
        ([], False, None),
    ],
)
def test_a_branch_goes_where_the_rule_says(
    given: list[Seat], alone: bool, expected: int | None
) -> None:
    assert choose(given, alone) == expected
