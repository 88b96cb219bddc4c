"""A scripted expert for `flashrt.worlds.pusht`: round to the far side of the T, then through it.

IS: a function of the whole state, which no policy sees. IS NOT perfect: the T turns under a push
that does not go through its middle, and then the pusher goes round again.
"""

from __future__ import annotations

import math

import numpy as np

from flashrt.worlds import pusht
from flashrt.worlds.pusht import Array

PUSHER = 15.0  # px, radius
ORBIT = 106.0  # px from the T's centre: clear of its farthest corner
LEAD = 60.0  # px: how far ahead of the pusher the controller's goal is put, at most
PUSH_LEAD = 44.0
ALIGNED = 16.0  # px beside the line through T and place: the push begins
SLIPPED = 26.0  # px: it is given up
DONE = 10.0  # px


def act(state: Array) -> Array:
    """Where the pusher is to go next, [2], px."""
    centre, pusher = state[[pusht.T_X, pusht.T_Y]], state[[pusht.X, pusht.Y]]
    gap = pusht.place(state) - centre
    if np.hypot(*gap) < DONE:
        return pusher
    ahead = gap / np.hypot(*gap)
    side = np.array([-ahead[1], ahead[0]])
    arm = pusher - centre
    off = math.remainder(math.atan2(*-ahead[::-1]) - math.atan2(*arm[::-1]), 2 * math.pi)
    reach = float(np.max((pusht.corners(state) - centre) @ -ahead)) + PUSHER
    behind, lateral = float(arm @ -ahead), float(arm @ side)
    is_touching = behind < reach + 4
    if behind > 0 and abs(lateral) < (SLIPPED if is_touching else ALIGNED):
        lead = min(PUSH_LEAD, float(np.hypot(*gap)) * 1.2 + 12 + max(0.0, behind - reach))
        return pusher + ahead * lead - side * np.clip(2.5 * lateral, -PUSH_LEAD, PUSH_LEAD)
    angle = math.atan2(*arm[::-1]) + float(np.clip(off, -0.6, 0.6))
    goal = centre + ORBIT * np.array([math.cos(angle), math.sin(angle)])
    goal = np.clip(goal, 25.0, pusht.SIZE - 25.0)
    step = goal - pusher
    length = float(np.hypot(*step))
    return pusher + step * min(1.0, LEAD / max(length, 1e-9))
