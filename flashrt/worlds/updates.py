"""Things that are carried from place to place: the last write wins.

IS: a stream of updates about a few things, and questions where they are now. IS NOT: an inventory
(each thing told once). It exists to ask for a fact that was told several times, the last one right.
"""

from __future__ import annotations

from flashrt.worlds.document import Document, Message, Thing, dice_of, draw_things, is_in, where_is
from flashrt.worlds.names import PLACES


class Updates:
    """Up to `things` things that move; every call of `move` tells of one of them."""

    def __init__(self, seed: int, things: int = 12) -> None:
        self._dice = dice_of("updates", seed)
        self._all = draw_things(self._dice, things)
        self._unseen = list(self._all)
        self.places: dict[Thing, str] = {}

    def move(self, count: int = 1) -> str:
        """Text of the next `count` updates, eight words each; `places` follows."""
        return " ".join(self._one() for _ in range(count))

    def question(self, thing: Thing) -> str:
        """What the user asks."""
        return where_is(thing)

    def answer(self, thing: Thing) -> str:
        """What the assistant should say now."""
        return is_in(thing, self.places[thing])

    def any_thing(self) -> Thing:
        """One that was told of."""
        return self._dice.choice(list(self.places))

    def _one(self) -> str:
        thing = self._unseen.pop() if self._unseen else self._dice.choice(self._all)
        self.places[thing] = self._dice.choice(PLACES)
        return goes_to(thing, self.places[thing])


def goes_to(thing: Thing, place: str) -> str:
    """One update."""
    return f"the {thing} goes to the {place} ."


def document(seed: int, updates: int, questions: int, things: int = 12) -> Document:
    """`updates` updates in user turns of about equal length, each with a question at its end."""
    world = Updates(seed, things)
    messages: list[Message] = []
    for count in shares(updates, questions):
        told = world.move(count)
        thing = world.any_thing()
        messages += [
            Message("user", f"{told} {world.question(thing)}"),
            Message("assistant", world.answer(thing)),
        ]
    return Document(tuple(messages))


def shares(total: int, parts: int) -> list[int]:
    """`total` split into at most `parts` counts, each at least 1 and equal up to 1."""
    parts = max(1, min(parts, total))
    return [total // parts + (i < total % parts) for i in range(parts)]
