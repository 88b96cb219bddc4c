"""What a control loop lets in: observations, checked into an array that is allocated once.

IS: shape, dtype, finiteness. IS NOT: normalisation; that is the policy's. Called by: control,
recording.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from flashrt.base.errors import ObservationError
from flashrt.robot.policy import Array


class Intake:
    """The loop's own copy of the observation at hand."""

    def __init__(self, observation_dim: int) -> None:
        self._own = np.zeros(observation_dim, np.float32)

    def check(self, observation: ArrayLike) -> Array:
        """The observation as float32 [observation_dim], until the next one.

        Raises ObservationError for another shape, a dtype that is not a float, NaN and infinity,
        and float64 values beyond float32.
        """
        given = np.asarray(observation)
        if given.dtype.kind != "f":
            raise ObservationError(f"observation: dtype {given.dtype}; give float32")
        if given.shape != self._own.shape:
            raise ObservationError(
                f"observation: shape {given.shape}, the policy takes {self._own.shape}"
            )
        with np.errstate(over="ignore"):
            np.copyto(self._own, given, casting="same_kind")
        if not np.isfinite(self._own).all():
            at = int(np.flatnonzero(~np.isfinite(self._own))[0])
            raise ObservationError(f"observation[{at}] is {given[at]}, which is not finite")
        return self._own
