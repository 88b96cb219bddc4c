"""Cursors: where a lane stands, in words on the device that kernels and engines read and write.

IS: the number of each word, once for Python and C (kernels get the enums of this file from the
generated header: CursorWord.ROWS is CURSOR_ROWS there), the record of a policy's cursor, and the
checks on what the host writes into it. IS NOT: a schedule, or admission of words from a file.

A chunk of a policy's actions has a row per tick, the first for the tick whose observation it was
planned from: the action of tick n is row n - chunk of the queue, as long as n < stop.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.base.checks import as_integer, shown
from flashrt.base.errors import SessionError

CURSOR_WORDS = 16  # of every cursor; those without a name are 0
REQUEST_WORDS = 16
NO_OBSERVATION = -1
MAX_SEED = (1 << 64) - 1


class CursorWord(enum.IntEnum):
    """The cursor of tokens: of a lane, of a draft, of each row of a verify."""

    POSITION = 0  # of the launch's first row
    ROWS = 1  # valid rows of the launch
    TOKEN = 2  # sampled last; -1: none


class PolicyWord(enum.IntEnum):
    """The cursor of a policy's lane; see PolicyCursor."""

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


class RequestWord(enum.IntEnum):
    """What the host asks of the plan that begins."""

    COMMITTED = 0  # rows of the chunk that the plan is to keep as they were promised
    GIVEN = 1  # whether the host gives the noise that the plan starts from


class VerdictWord(enum.IntEnum):
    """What a verify found: how many rows are accepted, then the token sampled after each."""

    ACCEPTED = 0
    TOKENS = 1  # the first of them


_N_WORDS = len(PolicyWord)


@dataclass(frozen=True, slots=True)
class PolicyCursor:
    """The words of a policy's lane, read at one instant."""

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
    """The two words of a seed. Raises SessionError unless it is an integer in [0, 2^64)."""
    whole = as_integer(seed)
    if whole is None or not 0 <= whole <= MAX_SEED:
        raise SessionError(f"seed={shown(seed)} is not an integer in [0, 2^64)")
    return np.array([whole & 0xFFFFFFFF, whole >> 32], np.uint32)
