"""The words of the worlds: colours, things, places, directions, heroes of stories.

IS: word lists; each word is one token of the bundled model. IS NOT: grammar (see the worlds). The
lists are part of what a seed means: another word, or another order, makes other worlds.
"""

from __future__ import annotations

COLORS = (
    "red", "blue", "green", "black", "white", "golden", "silver", "brown", "purple", "yellow",
    "grey", "pink", "old", "new", "tiny", "huge",
)  # fmt: skip
THINGS = (
    "key", "lamp", "coin", "book", "rope", "map", "sword", "ring", "cup", "hat", "bell", "box",
    "drum", "flute", "mirror", "candle", "bottle", "compass", "brush", "clock", "glove", "stone",
    "wheel", "ticket",
)  # fmt: skip
PLACES = (
    "attic", "cellar", "kitchen", "library", "garden", "hall", "tower", "stable", "chapel",
    "vault", "pantry", "study", "bedroom", "balcony", "workshop", "bakery", "cave", "harbor",
    "forest", "bridge", "mill", "barn", "market", "temple", "museum", "office", "gallery",
    "theater", "station", "pier", "school", "garage",
)  # fmt: skip
NUMBERS = ("one", "two", "three", "four", "five", "six")  # of columns and rows
DIRECTIONS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
HEROES = ("fox", "bear", "queen", "sailor", "miller", "witch", "giant", "child")
MOODS = ("brave", "clever", "tired", "happy", "sad", "quiet")
VERBS = ("walked", "ran", "went", "sailed")
