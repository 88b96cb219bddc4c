"""Runs: which lanes a replay is about, and which of its rows are whose.

IS: the table that a replay begins with, in words on the device, and how an operand moves with it.
IS NOT: a scheduler, or the choice of a graph. It exists so that a graph knows no lane: lanes lie at
a constant stride, so the address of what is a lane's is that of lane 0 plus lane x stride, which
kernels find in the table as they find a position in a cursor.

The rows of a launch are runs, one after the other, each of one lane. The table begins with two
cursors for launches that see rows alone: the rows of the first are those of all runs, those of the
second are one per run.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashrt.base.errors import PlanError
from flashrt.core.region import DType, Region, Role

MAX_RUNS = 16
RUN_WORDS = 4
STRIDE_UNIT = 256  # bytes, of the stride of a lane


class RunsWord(enum.IntEnum):
    """Words of the table, int32."""

    COUNT = 0  # of runs
    ROWS = 1  # of all runs: where a cursor has its rows
    LAST_ROWS = 17  # one per run, where a second cursor has its rows
    FIRST = 32  # of the first run: three words each, then one that is 0


class RunWord(enum.IntEnum):
    """Words of a run."""

    LANE = 0
    FIRST_ROW = 1
    ROWS = 2


TABLE_WORDS = RunsWord.FIRST + MAX_RUNS * RUN_WORDS
RUNS = Region("runs", (TABLE_WORDS,), DType.I32, Role.IO)


class Run(NamedTuple):
    """Rows of one lane."""

    lane: int
    rows: int


@dataclass(frozen=True, slots=True)
class Stride:
    """How far an operand moves: a lane on, in units of STRIDE_UNIT; a row, a run on, in bytes."""

    lane: int = 0
    row: int = 0
    run: int = 0

    @property
    def is_still(self) -> bool:
        """Whether it stays where it is."""
        return not (self.lane or self.row or self.run)


@functools.lru_cache(maxsize=1024)  # a lane that decodes asks for the same one at every token
def table_of(runs: tuple[Run, ...]) -> bytes:
    """The words of the table, int32 [TABLE_WORDS]. Raises PlanError for no run, or too many, and
    for a lane that has two.
    """
    if not 1 <= len(runs) <= MAX_RUNS:
        raise PlanError(f"a replay is about 1 to {MAX_RUNS} lanes, got {len(runs)}")
    if len({run.lane for run in runs}) < len(runs):
        raise PlanError(f"a lane has one run in a replay, got lanes {[run.lane for run in runs]}")
    words = np.zeros(TABLE_WORDS, np.int32)
    first = 0
    for i, run in enumerate(runs):
        at = RunsWord.FIRST + i * RUN_WORDS
        words[at : at + 3] = run.lane, first, run.rows
        first += run.rows
    words[RunsWord.COUNT] = words[RunsWord.LAST_ROWS] = len(runs)
    words[RunsWord.ROWS] = first
    return words.tobytes()
