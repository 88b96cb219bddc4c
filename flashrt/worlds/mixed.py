"""Whole sessions: facts and hints in one prompt, then questions, updates, moves and requests.

IS: the worlds combined, as the demo and the loops use them. IS NOT: another kind of question. It
exists so that the model is trained on the mixture that a real session holds.
"""

from __future__ import annotations

from flashrt.worlds.building import Building
from flashrt.worlds.document import Document, Message, dice_of, is_in, where_is
from flashrt.worlds.inventory import Inventory
from flashrt.worlds.moves import Moves
from flashrt.worlds.names import PLACES
from flashrt.worlds.updates import goes_to


def document(seed: int, facts: int, hints: int, turns: int, filler: int = 0) -> Document:
    """A session of `turns` user turns of four kinds. Things of the inventory may be moved: then
    the last word counts. Moves are told at most once, in one turn.
    """
    dice = dice_of("mixed", seed)
    inventory, building, walker = Inventory(seed, facts, filler), Building(seed, hints), Moves(seed)
    places = {t: p for t, p in inventory.places.items() if t not in building.hints}
    if not places:
        places = dict(inventory.places)
    parts = [*(is_in(t, p) for t, p in places.items()), building.prompt()]
    messages = [Message("system", " ".join(part for part in parts if part))]
    wanted = dice.sample(building.things, hints)
    for _ in range(turns):
        kind = dice.random()
        if kind < 0.25 and wanted:
            messages += building.play(wanted.pop())
            continue
        if kind < 0.4 and len(walker.positions) == 1:
            said = f"{walker.start()} {walker.walk(dice.randint(2, 12))} {walker.question()}"
            messages += [Message("user", said), Message("assistant", walker.answer())]
            continue
        told = ""
        asked = dice.choice(list(places))
        if kind > 0.75:
            moved = dice.choice(list(places))
            places[moved] = dice.choice(PLACES)
            told = goes_to(moved, places[moved]) + " "
            asked = dice.choice((asked, moved))
        messages += [
            Message("user", told + where_is(asked)),
            Message("assistant", is_in(asked, places[asked])),
        ]
    return Document(tuple(messages), tuple(walker.positions) if len(walker.positions) > 1 else ())
