"""Placement: which worker takes the next branch.

IS: the rule, over plain values. IS NOT: who sends it there (run). The rule: a free lane where the
capsule is; else a free lane anywhere, and the capsule travels; else the shortest queue.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Seat(NamedTuple):
    """A worker, as the next branch sees it."""

    worker: int
    n_lanes: int
    load: int  # branches that it was given and that are not over
    most: int  # that it is given at once, so that no lane waits for the next one
    has_capsule: bool  # that the branch begins at
    is_alone: bool = False  # one branch has it to itself


def choose(seats: Iterable[Seat], alone: bool = False) -> int | None:
    """The worker for a branch; None: it has to wait. `alone`: only a worker that does
    nothing else will do.
    """
    free = [s for s in seats if not s.is_alone and s.load < (1 if alone else s.most)]
    if not free:
        return None
    best = min(free, key=lambda s: (s.load >= s.n_lanes, not s.has_capsule, s.load, s.worker))
    return best.worker
