"""A position on a grid after many moves: state that must be carried, not looked up.

IS: a start, steps north, south, east and west inside GRID x GRID, and the position. IS NOT: a
robot that acts (see robot). It exists to ask for something that stands nowhere in the text: the
recurrent state must hold it.
"""

from __future__ import annotations

import random

from flashrt.worlds.document import Document, Message, dice_of
from flashrt.worlds.names import DIRECTIONS, NUMBERS
from flashrt.worlds.updates import shares

GRID = len(NUMBERS)
QUESTION = "where am i ?"


class Moves:
    """A walker; `position` is column and row, counted from 0 here and from one in words."""

    def __init__(self, seed: int) -> None:
        self._dice = dice_of("moves", seed)
        self.position = (self._dice.randrange(GRID), self._dice.randrange(GRID))
        self.positions = [self.position]  # at the start and after every move

    def start(self) -> str:
        """The sentence that tells the start; say it first."""
        return f"start in {cell(self.positions[0])} ."

    def walk(self, count: int = 1) -> str:
        """The next `count` moves, one word each."""
        return " ".join(self._step() for _ in range(count))

    def question(self) -> str:
        """What the user asks."""
        return QUESTION

    def answer(self) -> str:
        """What the assistant should say now."""
        return f"you are in {cell(self.position)} ."

    def _step(self) -> str:
        name = self._dice.choice([d for d in DIRECTIONS if moved(self.position, d)])
        self.position = moved(self.position, name) or self.position
        self.positions.append(self.position)
        return name


def cell(position: tuple[int, int]) -> str:
    """`column three row five` for (2, 4)."""
    return f"column {NUMBERS[position[0]]} row {NUMBERS[position[1]]}"


def moved(position: tuple[int, int], direction: str) -> tuple[int, int] | None:
    """The neighbouring cell, or None beyond the edge."""
    step = DIRECTIONS[direction]
    column, row = position[0] + step[0], position[1] + step[1]
    return (column, row) if 0 <= column < GRID and 0 <= row < GRID else None


def random_cell(dice: random.Random) -> tuple[int, int]:
    """Any cell."""
    return dice.randrange(GRID), dice.randrange(GRID)


def document(seed: int, moves: int, questions: int) -> Document:
    """`moves` moves in user turns of about equal length, each with a question at its end."""
    world, messages = Moves(seed), []
    for i, count in enumerate(shares(moves, questions)):
        said = f"{world.walk(count)} {world.question()}"
        messages += [
            Message("user", said if i else f"{world.start()} {said}"),
            Message("assistant", world.answer()),
        ]
    return Document(tuple(messages), tuple(world.positions))
