"""Real-time chunking as LeRobot computes it (after Black et al. 2025, arXiv 2506.07339).

IS: the settings of a config, how much the chunk before guides each row of the next, and how much an
error counts at each Euler step; in LeRobot's float32. IS NOT: the step itself (op `guide`). LeRobot
takes the gradient of a step's result by its input with the velocity held still, which is 1: so
there is no backward pass.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.messages import listed, shown

Values = NDArray[np.float32]


class Schedule(enum.StrEnum):
    """How weights fall from the rows that are executed meanwhile on: RTCAttentionSchedule."""

    ZEROS = "ZEROS"
    ONES = "ONES"
    LINEAR = "LINEAR"
    EXP = "EXP"


@dataclass(frozen=True, slots=True)
class Guidance:
    """LeRobot's rtc_config, enabled."""

    schedule: Schedule
    most: float  # max_guidance_weight
    horizon: int  # execution_horizon

    def weights(self, rows: int, left: int, delay: int, horizon: int | None = None) -> Values:
        """Of each of `rows` rows, `left` of which the chunk before has. `delay`: rows that are
        executed while the chunk is made; `horizon`: rows from which on nothing guides, by default
        the config's.
        """
        end = min(self.horizon if horizon is None else horizon, left)
        start = min(delay, end)
        found = np.zeros(rows, np.float32)
        if self.schedule is Schedule.ONES:
            found[:end] = 1
        found[:start] = 1
        n = min(end, rows) - start
        if n > 0 and self.schedule in (Schedule.LINEAR, Schedule.EXP):
            falling = _falling(n)
            if self.schedule is Schedule.EXP:
                falling = np.asarray(falling * np.expm1(falling), np.float32) / np.float32(
                    math.e - 1
                )
            found[start : start + n] = falling
        return found

    def strength(self, time: float) -> float:
        """How much an error of a guided row counts at a time from 1 to 0."""
        past = np.float32(1 - time)
        left = np.float32(1) - past
        most = np.float32(self.most)
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = (left * left + past * past) / (left * left)
            share = left / past if past != 0 else most
            return float(min(share * spread, most))


def guidance_of(given: object, problems: list[str]) -> Guidance | None:
    """Of the field rtc_config; None where it is not enabled."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        problems.append(f"rtc_config is {shown(given)}, expected null or fields")
        return None
    if not given.get("enabled", False):
        return None
    schedule = given.get("prefix_attention_schedule", Schedule.LINEAR)
    horizon = given.get("execution_horizon", 10)
    most = given.get("max_guidance_weight", 10.0)
    is_horizon = isinstance(horizon, int) and not isinstance(horizon, bool) and horizon > 0
    is_most = isinstance(most, int | float) and not isinstance(most, bool) and 0 < most < 1e6
    if schedule in Schedule.__members__ and is_horizon and is_most:
        return Guidance(Schedule[schedule], float(most), int(horizon))
    problems.append(
        f"rtc_config has prefix_attention_schedule {shown(schedule)}, execution_horizon "
        f"{shown(horizon)} and max_guidance_weight {shown(most)}; expected one of "
        f"{listed(list(Schedule))}, an integer and a number, both positive"
    )
    return None


def _falling(n: int) -> Values:
    """n numbers between 1 and 0, evenly, as torch.linspace has them: from both ends."""
    step = np.float32(-1) / np.float32(n + 1)
    i = np.arange(n + 2, dtype=np.float32)
    near = i < (n + 2) // 2
    whole: Values = np.where(near, np.float32(1) + step * i, -step * (np.float32(n + 1) - i))
    return whole[1:-1].astype(np.float32)
