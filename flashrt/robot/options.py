"""Options of a control loop: what was given, checked, in ticks and nanoseconds.

IS: plain data. IS NOT: anything that changes. Called by: control, recording.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from flashrt.base.errors import SessionError
from flashrt.robot.policy import Array, PolicyShape

OnMiss = Literal["hold", "last", "raise"]
MAX_HISTORY_TICKS = 10_000_000  # beyond that somebody mistook a unit


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """See ControlLoop."""

    hz: float = 50.0
    deadline_ms: float | None = None
    on_miss: OnMiss = "hold"
    overlap: int = 1
    hold_action: ArrayLike | None = None
    keep_seconds: float = 5.0
    boundary_seconds: float = 0.5

    def check(self, policy: PolicyShape) -> None:
        """Raises SessionError for what makes no sense with a policy."""
        spans = (self.hz, self.keep_seconds, self.boundary_seconds)
        if not all(math.isfinite(x) and x > 0 for x in spans):
            raise SessionError(
                f"hz={self.hz}, keep_seconds={self.keep_seconds}, boundary_seconds="
                f"{self.boundary_seconds}: each is positive and finite"
            )
        if self.history_ticks > MAX_HISTORY_TICKS:
            raise SessionError(
                f"keep_seconds={self.keep_seconds} and boundary_seconds={self.boundary_seconds} at "
                f"{self.hz} Hz: more than {MAX_HISTORY_TICKS} ticks"
            )
        if self.deadline_ms is not None and not self.deadline_ms >= 0:
            raise SessionError(f"deadline_ms={self.deadline_ms} is not at least 0")
        if self.on_miss not in get_args(OnMiss):
            raise SessionError(f"on_miss={self.on_miss!r}; choose one of {get_args(OnMiss)}")
        longest = min(policy.n_action_steps, policy.chunk_size - policy.n_action_steps)
        if not 0 <= self.overlap <= longest:
            raise SessionError(
                f"overlap={self.overlap} is not in [0, {longest}]: the policy executes "
                f"{policy.n_action_steps} of {policy.chunk_size} planned actions"
            )
        self.hold(policy)

    @staticmethod
    def check_seed(seed: int) -> None:
        """Raises SessionError unless it is one."""
        if not 0 <= seed < 1 << 63:
            raise SessionError(f"seed {seed} is not in [0, 2**63)")

    def hold(self, policy: PolicyShape) -> Array | None:
        """The action executed in place of a late one, float32 [action_dim], if it was given."""
        if self.hold_action is None:
            return None
        action = np.array(self.hold_action, np.float32)
        if action.shape != (policy.action_dim,) or not np.isfinite(action).all():
            raise SessionError(
                f"hold_action={self.hold_action}: the policy's actions are {policy.action_dim} "
                "finite numbers"
            )
        return action

    def arguments(self) -> dict[str, Any]:
        """To make another loop with the same options."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def deadline_ns(self) -> float:
        """Without a deadline, infinity."""
        return math.inf if self.deadline_ms is None else self.deadline_ms * 1e6

    @property
    def boundary_ticks(self) -> int:
        """Ticks between automatic boundaries."""
        return max(1, round(self.boundary_seconds * self.hz))

    @property
    def history_ticks(self) -> int:
        """Ticks to keep, so that keep_seconds are reached from everywhere between boundaries."""
        return max(1, math.ceil(self.keep_seconds * self.hz)) + self.boundary_ticks
