"""What every world is made of: things, messages of a chat, and documents that are chats.

IS: the types, the seeds, the two sentences that several worlds share. IS NOT: a prompt; the chat
template of the checkpoint makes one of `Message.as_dict`.

A seed gives the same world on every machine. The bundled model was trained on seeds below HELD_OUT.
It has never seen a world whose seed is HELD_OUT or above: tests and the demo draw from those.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from flashrt.worlds.names import COLORS, THINGS

HELD_OUT = 10**9


class Thing(NamedTuple):
    """Something with a name of two words; str() gives `red key`."""

    color: str
    noun: str

    def __str__(self) -> str:
        return f"{self.color} {self.noun}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat; role is system, user, assistant or tool."""

    role: str
    content: str

    def as_dict(self) -> dict[str, object]:
        """For chat templates."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Document:
    """A chat in which every assistant turn is right.

    `positions`: the true column and row (from 0) after the start and after every move that a user
    turn tells, in order; empty for worlds without moves.
    """

    messages: tuple[Message, ...]
    positions: tuple[tuple[int, int], ...] = ()


def dice_of(world: str, seed: int) -> random.Random:
    """The random numbers of one world; equal seeds of two worlds are unrelated."""
    return random.Random(f"{world} {seed}")


def draw_things(dice: random.Random, count: int) -> list[Thing]:
    """Distinct things; at most 384. Raises ValueError beyond."""
    return dice.sample([Thing(color, noun) for color in COLORS for noun in THINGS], count)


def where_is(thing: Thing) -> str:
    """The question for a place."""
    return f"where is the {thing} ?"


def is_in(thing: Thing, place: str) -> str:
    """The answer to `where_is`, and the fact itself."""
    return f"the {thing} is in the {place} ."
