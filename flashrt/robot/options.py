"""Options of a control loop: what was given, checked, in ticks and nanoseconds.

IS: plain data. IS NOT: anything that changes. All checks are made before a lane is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from numpy.typing import ArrayLike

from flashrt.base.checks import as_integer, as_number, shown
from flashrt.base.errors import ObservationError, SessionError
from flashrt.engine.numbers import checked_vector
from flashrt.robot.policy import Array, PolicyShape

OnMiss = Literal["hold", "last", "raise"]
MAX_HISTORY_TICKS = 10_000_000  # beyond that somebody mistook a unit
MIN_HZ, MAX_HZ = 1e-6, 1e6  # periods from a microsecond to eleven days
MAX_SECONDS = 1e9  # of a rewind or a run: thirty years


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

    def __post_init__(self) -> None:
        """Raises SessionError for what makes no sense with any policy."""
        self._set("hz", checked_hz("hz", self.hz))
        self._set("overlap", checked_count("overlap", self.overlap))
        for name in ("keep_seconds", "boundary_seconds"):
            seconds = as_number(getattr(self, name))
            if seconds is None or not 0 < seconds < math.inf:
                raise SessionError(
                    f"{name}={shown(getattr(self, name))} is not a positive, finite number"
                )
            self._set(name, seconds)
        if self.keep_seconds * self.hz + self.boundary_seconds * self.hz > MAX_HISTORY_TICKS:
            raise SessionError(
                f"keep_seconds={self.keep_seconds} and boundary_seconds={self.boundary_seconds} at "
                f"{self.hz} Hz: more than {MAX_HISTORY_TICKS} ticks"
            )
        if self.deadline_ms is not None:
            deadline = as_number(self.deadline_ms)
            if deadline is None or not deadline >= 0:
                raise SessionError(
                    f"deadline_ms={shown(self.deadline_ms)} is not a number of at least 0"
                )
            self._set("deadline_ms", deadline)
        if not isinstance(self.on_miss, str) or self.on_miss not in get_args(OnMiss):
            raise SessionError(f"on_miss={shown(self.on_miss)}; choose one of {get_args(OnMiss)}")

    def check(self, policy: PolicyShape) -> None:
        """Raises SessionError for what makes no sense with this policy."""
        longest = longest_overlap(policy)
        if self.overlap > longest:
            raise SessionError(
                f"overlap={self.overlap} is not in [0, {longest}]: the policy executes "
                f"{policy.n_action_steps} actions of a chunk of {policy.chunk_size}"
            )
        self.hold(policy)

    def hold(self, policy: PolicyShape) -> Array | None:
        """The action executed in place of a late one, float32 [action_dim], if it was given."""
        if self.hold_action is None:
            return None
        try:
            return checked_vector("hold_action", self.hold_action, policy.action_dim)
        except ObservationError as error:
            raise SessionError(f"{error}: one of the policy's actions") from error

    def arguments(self) -> dict[str, Any]:
        """By name."""
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

    def _set(self, name: str, value: object) -> None:
        """Of this frozen record, while it is made: numpy's scalars become Python's."""
        object.__setattr__(self, name, value)


def longest_overlap(policy: PolicyShape) -> int:
    """Ticks over which a chunk can be made while the one before is executed."""
    return min(policy.n_action_steps, policy.chunk_size - policy.n_action_steps)


def checked_hz(what: str, value: object) -> float:
    """Ticks per second. Raises SessionError that names `what`."""
    hz = as_number(value)
    if hz is None or not MIN_HZ <= hz <= MAX_HZ:
        raise SessionError(
            f"{what}={shown(value)} is not a number of ticks per second in [{MIN_HZ:g}, {MAX_HZ:g}]"
        )
    return hz


def checked_seconds(what: str, value: object) -> float:
    """A time span. Raises SessionError that names `what`."""
    seconds = as_number(value)
    if seconds is None or not 0 <= seconds <= MAX_SECONDS:
        raise SessionError(
            f"{what}={shown(value)} is not a number of seconds in [0, {MAX_SECONDS:g}]"
        )
    return seconds


def checked_count(what: str, value: object) -> int:
    """A number of ticks, or of loops. Raises SessionError that names `what`."""
    count = as_integer(value)
    if count is None or count < 0:
        raise SessionError(f"{what}={shown(value)} is not an integer of at least 0")
    return count


def checked_seed(seed: object) -> int:
    """A seed. Raises SessionError."""
    whole = as_integer(seed)
    if whole is None or not 0 <= whole < 1 << 63:
        raise SessionError(f"seed={shown(seed)} is not an integer in [0, 2**63)")
    return whole
