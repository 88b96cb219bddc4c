"""Waypoints: boundaries that a session keeps by itself, so that a rollback replays few tokens.

IS: a pure rule: which boundaries to keep, dense near the head and log-spaced behind it. IS NOT: the
waypoints themselves (capsule.table), or anything that exactness rests on: without a waypoint a
rollback replays more, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

STRIDE = 64  # tokens between waypoints near the head
DENSE = 256  # how far behind the head every stride is kept
SPREAD = 3  # behind that, neighbours may be distance / SPREAD apart
MOST_KEPT = 16  # of those that somebody asked for: the last ones are spared
FORKED = 2  # of these, the last ones go along with a fork


def is_due(position: int, last: int) -> bool:
    """Whether a boundary at `position` deserves a waypoint, the last one being at `last`."""
    return position - last >= STRIDE


def superfluous(positions: Sequence[int], head: int) -> list[int]:
    """Of ascending waypoints, those to give up with the sequence at `head`.

    One goes when its neighbours are still close enough without it: closer than STRIDE within DENSE
    of the head, and than distance / SPREAD behind. What stays grows with the log of the length.
    """
    kept: list[int] = []
    gone: list[int] = []
    for i, position in enumerate(positions):
        following = positions[i + 1] if i + 1 < len(positions) else head
        distance = head - position
        gap = following - (kept[-1] if kept else 0)
        allowed = STRIDE if distance <= DENSE else max(STRIDE, distance // SPREAD)
        if i + 1 < len(positions) and gap <= allowed:
            gone.append(position)
        else:
            kept.append(position)
    return gone
