"""Time in a policy that is integrated from noise to actions: from 1 to 0 in equal steps.

IS: the times of Euler steps, and the features that a policy has them by, both as LeRobot computes
them. IS NOT: a step (ops.EULER), or what is made of the features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def times_of(steps: int) -> list[float]:
    """Of each step: added up in double, rounded to float32."""
    return [float(np.float32(1.0 + step * (-1.0 / steps))) for step in range(steps)]


def time_features(
    time: float, dims: int, min_period: float, max_period: float
) -> NDArray[np.float32]:
    """Of a time: the sines of `dims` / 2 angles, then their cosines; the periods of the angles go
    from `min_period` to `max_period` in equal ratios. float32 [dims], computed in double.
    """
    shares = np.linspace(0.0, 1.0, dims // 2)
    periods = min_period * (max_period / min_period) ** shares
    angles = 1.0 / periods * 2 * np.pi * time
    return np.concatenate([np.sin(angles), np.cos(angles)]).astype(np.float32)
