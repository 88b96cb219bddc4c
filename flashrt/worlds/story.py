"""Plain narrative from a small grammar: language to model, and filler for long prompts.

IS: sentences in which the hero, and what the hero found, stay the same. IS NOT: facts that a test
asks about. It exists to make prompts long without making questions harder.
"""

from __future__ import annotations

import random

from flashrt.worlds.document import Document, Message, dice_of, draw_things
from flashrt.worlds.names import HEROES, MOODS, PLACES, VERBS


def sentences(dice: random.Random, count: int) -> list[str]:
    """`count` sentences of about 12 words each: tales of five sentences, one after the other."""
    tale: list[str] = []
    while len(tale) < count:
        tale += tell(dice, dice.choice(HEROES), dice.randint(3, 8))
    return tale[:count]


def tell(dice: random.Random, hero: str, count: int) -> list[str]:
    """One tale of `count` sentences, at least two: a beginning, adventures, the way home."""
    mood, friend = dice.choice(MOODS), dice.choice([h for h in HEROES if h != hero])
    thing = draw_things(dice, 1)[0]
    tale = [f"once there was a {mood} {hero} who had lost the {thing} ."]
    adventures = (
        "one day the {hero} {verb} to the {place} and looked for the {thing} .",
        "in the {place} the {hero} met a {mood} {friend} and said good morning .",
        "the {friend} said , look in the {place} , and the {hero} {verb} there .",
        "but there was nothing in the {place} and the {hero} was {mood} .",
        "that night the {hero} and the {friend} stayed in the {place} .",
    )
    for _ in range(count - 2):
        place, verb, feeling = dice.choice(PLACES), dice.choice(VERBS), dice.choice(MOODS)
        tale.append(
            dice.choice(adventures).format(
                hero=hero, friend=friend, thing=thing, place=place, verb=verb, mood=feeling
            )
        )
    return [*tale, f"then the {hero} found the {thing} and came back home ."]


def document(seed: int, count: int) -> Document:
    """A user asks for a story of `count` sentences (at least two) about a hero."""
    dice = dice_of("story", seed)
    hero = dice.choice(HEROES)
    return Document(
        (
            Message("user", f"tell me a story about a {hero} ."),
            Message("assistant", " ".join(tell(dice, hero, count))),
        )
    )
