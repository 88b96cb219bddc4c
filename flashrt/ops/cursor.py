"""The cursor of a policy: what its kernels and its engine know about time, in 16 words.

IS: the words of region `cursor`, their reading as a record, and the checks on what the host writes.
IS NOT: a schedule; see session. Called by: policy_engine, tests; kernels number the words alike.

A chunk of actions has a row per tick, the first for the tick whose observation it was planned from:
the action of tick n is row n - chunk of the queue, as long as n < stop.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flashrt.base.errors import ObservationError, SessionError

NO_OBSERVATION = -1
MAX_SEED = (1 << 64) - 1


class Word(enum.IntEnum):
    """Index of each word; the rest of the 16 are 0."""

    TICK = 0
    OBSERVED = 1
    SEED_LOW = 2
    SEED_HIGH = 3
    CHUNK = 4
    STOP = 5
    PLAN_TICK = 6
    PLAN_STOP = 7
    PLAN_STEPS_LEFT = 8
    HELD = 9


_N_WORDS = len(Word)


@dataclass(frozen=True, slots=True)
class PolicyCursor:
    """The words of a lane, read at one instant."""

    tick: int  # ticks done: the number of the coming one
    observed: int  # tick of the last observation; NO_OBSERVATION: none that counts
    seed: int  # of the noise that plans start from
    chunk: int  # tick of the queue's first row
    stop: int  # from this tick on the queue has no action to give
    plan_tick: int  # tick of the first row of the plan in the making
    plan_stop: int  # what `stop` becomes when it is done
    plan_steps_left: int  # Euler steps that it still lacks; 0: none is in the making
    held: int  # ticks so far that had no action and repeated the one before

    @property
    def remaining(self) -> int:
        """Actions left in the queue."""
        return max(0, self.stop - self.tick)


def read_cursor(words: Sequence[int]) -> PolicyCursor:
    """A record of the 16 words of a region, int32 each."""
    tick, observed, low, high, *rest = words[:_N_WORDS]
    seed = (high & 0xFFFFFFFF) << 32 | (low & 0xFFFFFFFF)
    return PolicyCursor(tick, observed, seed, *rest)


def seed_words(seed: int) -> NDArray[np.uint32]:
    """The two words of a seed. Raises SessionError unless it is in [0, 2^64)."""
    if not 0 <= seed <= MAX_SEED:
        raise SessionError(f"seed={seed} is not in [0, 2^64)")
    return np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)


def checked_vector(what: str, values: ArrayLike, size: int) -> NDArray[np.float32]:
    """float32 [size], contiguous and finite. Raises ObservationError that names `what`."""
    given = np.asarray(values)
    if given.shape != (size,) or given.dtype.kind not in "fiu":
        raise ObservationError(f"{what}: {given.dtype} {given.shape}, expected float32 ({size},)")
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(given, np.float32)
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array)).tolist()
        raise ObservationError(f"{what}: values {bad} are not finite: {array[bad]}")
    return array
