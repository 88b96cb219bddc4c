"""A building with hidden things and two tools, `look` and `take`, which may fail.

IS: hints for the prompt, a simulator that answers tool calls, the right next turn, a check of the
goal. IS NOT: an agent. It exists because tool calls change a world: an agent that rolls back must
roll back the world too, and this one is small enough to check that.

Each hint names two places. The agent looks into the first, then into the second, takes the thing
when it sees it (some are stuck once: the same call again works), and tells where it was, or that
it is lost.
"""

from __future__ import annotations

import re

from flashrt.worlds.document import Document, Message, Thing, dice_of, draw_things
from flashrt.worlds.names import PLACES

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(re.escape(CALL_OPEN) + r"([^<]*)" + re.escape(CALL_CLOSE))
NOTHING, STUCK, TAKEN = "you see nothing .", "it is stuck .", "you have it ."
ABSENT, UNKNOWN = "it is not here .", "you can not do that ."
FAILURES = (NOTHING, STUCK, ABSENT, UNKNOWN)


def call_text(*words: str) -> str:
    """`<tool_call> look attic</tool_call>` for ("look", "attic")."""
    return f"{CALL_OPEN} {' '.join(words)}{CALL_CLOSE}"


def parse_call(text: str) -> list[str]:
    """Words of the first tool call in a text; empty if there is none."""
    found = _CALL.search(text)
    return found[1].split() if found else []


class Building:
    """`count` hidden things (at most 32, no two in one place), some of them in no hinted place."""

    def __init__(self, seed: int, count: int = 8) -> None:
        dice = dice_of("building", seed)
        self.things = draw_things(dice, count)
        free = dice.sample(PLACES, len(PLACES))
        self.hints: dict[Thing, tuple[str, str]] = {}
        self.hidden: dict[Thing, str] = {}  # where things truly are; lost ones are nowhere
        for thing in self.things:
            true, other = free.pop(), dice.choice(PLACES)
            while other == true:
                other = dice.choice(PLACES)
            luck = dice.random()
            self.hints[thing] = (true, other) if luck < 0.4 else (other, true)
            if luck < 0.8:
                self.hidden[thing] = true
        self._stuck = {thing for thing in self.things if dice.random() < 0.25}
        self._here: str | None = None
        self.taken: dict[Thing, str] = {}  # and from where
        self._dice = dice

    def prompt(self) -> str:
        """The system message: one hint of twelve words per thing."""
        return " ".join(
            f"the {thing} may be in the {first} or the {second} ."
            for thing, (first, second) in self.hints.items()
        )

    def request(self, thing: Thing) -> str:
        """What the user asks."""
        return f"bring me the {thing} ."

    def call(self, text: str) -> str:
        """Run the tool call of an assistant turn; the result for the tool turn."""
        words = parse_call(text)
        if len(words) == 2 and words[0] == "look" and words[1] in PLACES:
            return self._look(words[1])
        if len(words) == 3 and words[0] == "take":
            return self._take(Thing(words[1], words[2]))
        return UNKNOWN

    def is_brought(self, thing: Thing) -> bool:
        """The goal: the thing was taken."""
        return thing in self.taken

    def is_lost(self, thing: Thing) -> bool:
        """It is in neither of the hinted places."""
        return thing not in self.hidden and thing not in self.taken

    def right_turns(self, thing: Thing) -> list[str]:
        """Assistant turns from the request to the answer, as the model was trained to write."""
        turns = []
        true = self.hidden.get(thing)
        for place in self.hints[thing]:
            turns.append(call_text("look", place))
            if place == true:
                turns += [call_text("take", *thing)] * (1 + (thing in self._stuck))
                return [*turns, f"the {thing} was in the {place} ."]
        return [*turns, f"the {thing} is lost ."]

    def document(self, requests: int) -> Document:
        """The prompt and requests for different things, played to the end."""
        messages = [Message("system", self.prompt())]
        for thing in self._dice.sample(self.things, min(requests, len(self.things))):
            messages += self.play(thing)
        return Document(tuple(messages))

    def play(self, thing: Thing) -> list[Message]:
        """The request and all turns to its end; changes the building."""
        messages = [Message("user", self.request(thing))]
        for turn in self.right_turns(thing):
            messages.append(Message("assistant", turn))
            if parse_call(turn):
                messages.append(Message("tool", self.call(turn)))
        return messages

    def _look(self, place: str) -> str:
        self._here = place
        seen = [thing for thing, at in self.hidden.items() if at == place]
        return f"you see the {seen[0]} ." if seen else NOTHING

    def _take(self, thing: Thing) -> str:
        if self._here is None or self.hidden.get(thing) != self._here:
            return ABSENT
        if thing in self._stuck:
            self._stuck.remove(thing)
            return STUCK
        self.taken[thing] = self.hidden.pop(thing)
        return TAKEN
