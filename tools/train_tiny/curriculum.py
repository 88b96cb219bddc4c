"""How long the rows of every task are: longer when the shorter ones are answered well.

IS: one length per task, and the marks to pass. IS NOT: the data (lessons).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from lessons import LONGEST, SHORTEST

LENGTHS = (48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
PASS_AT = {"moves": 0.88, "story": 0.6}  # share of right answer words; most of a story is chance
DEFAULT_PASS_AT = 0.92
SHORTER = 0.25  # share of batches that are no longer than needed to remember
ENOUGH = 500  # answer words at a length before the next one


@dataclass(slots=True)
class Curriculum:
    """By task: index of the length, running share of right words there, words seen there."""

    level: dict[str, int] = field(default_factory=dict)
    right: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    caps: dict[str, int] = field(default_factory=dict)  # lengths not to be exceeded

    def cap(self, task: str, length: int) -> None:
        """No rows of this task beyond `length`, one of LENGTHS."""
        self.caps[task] = length
        if self.longest(task) > length:
            self.level[task], self.seen[task] = LENGTHS.index(length), 0

    def longest(self, task: str) -> int:
        """Tokens of the task's longest rows so far."""
        return LENGTHS[self._level(task)]

    def length(self, dice: random.Random, task: str) -> int:
        """Of the next batch: mostly the longest so far, sometimes a shorter one."""
        high = self._level(task)
        return LENGTHS[dice.randint(_lowest(task), high) if dice.random() < SHORTER else high]

    def note(self, task: str, right: float, total: float) -> None:
        """Right and all answer words of a step at the task's longest length."""
        level = self._level(task)
        mean = self.right.get(task, right / total)
        self.right[task] = mean + min(0.5, total / 1000) * (right / total - mean)
        self.seen[task] = self.seen.get(task, 0) + total
        passed = self.right[task] > PASS_AT.get(task, DEFAULT_PASS_AT) and self.seen[task] > ENOUGH
        top = self.caps.get(task, LONGEST.get(task, LENGTHS[-1]))
        if passed and LENGTHS[level] < top:
            self.level[task], self.seen[task] = level + 1, 0
            self.right[task] -= 0.1  # to be earned again

    def _level(self, task: str) -> int:
        return self.level.setdefault(task, _lowest(task))


def _lowest(task: str) -> int:
    return LENGTHS.index(SHORTEST.get(task, LENGTHS[0]))
