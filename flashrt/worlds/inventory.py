"""Facts in a system prompt, and questions about them: recall over long distances.

IS: which thing is in which place, with story between the facts if asked for. IS NOT: facts that
change (see updates). It exists to ask for something that stands far back in the context.
"""

from __future__ import annotations

from flashrt.worlds.document import Document, Message, Thing, dice_of, draw_things, is_in, where_is
from flashrt.worlds.names import PLACES
from flashrt.worlds.story import sentences


class Inventory:
    """`count` facts (at most 384) of eight words each, and `filler` sentences of story among them.

    Places repeat; things do not.
    """

    def __init__(self, seed: int, count: int, filler: int = 0) -> None:
        dice = dice_of("inventory", seed)
        self.places = {thing: dice.choice(PLACES) for thing in draw_things(dice, count)}
        parts = [is_in(thing, place) for thing, place in self.places.items()]
        for sentence in sentences(dice, filler):
            parts.insert(dice.randrange(len(parts) + 1), sentence)
        self._text = " ".join(parts)
        self._dice = dice

    @property
    def things(self) -> list[Thing]:
        """In the order of the prompt."""
        return list(self.places)

    def prompt(self) -> str:
        """The system message."""
        return self._text

    def question(self, thing: Thing) -> str:
        """What the user asks."""
        return where_is(thing)

    def answer(self, thing: Thing) -> str:
        """What the assistant should say."""
        return is_in(thing, self.places[thing])

    def document(self, questions: int) -> Document:
        """The prompt and questions about random things with their answers."""
        messages = [Message("system", self.prompt())]
        for thing in self._dice.choices(self.things, k=questions):
            messages += [
                Message("user", self.question(thing)),
                Message("assistant", self.answer(thing)),
            ]
        return Document(tuple(messages))
