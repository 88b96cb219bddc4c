"""How names and values that others wrote appear in a message.

IS: lists that are cut after MOST_LISTED entries and say how many more there are; values that are
cut and made printable. IS NOT: an error type (errors). Exists because a checkpoint can hold
thousands of tensor names and a config.json any value: neither may fill a screen or steer a
terminal.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection

MOST_LISTED = 8
_MOST_CHARACTERS = 100  # of one name
_MOST_BITS = 256  # of an integer that is written out
# Control characters, separators of lines, marks that change the direction of text, and bytes that
# were no UTF-8: all that a terminal would act on, or that would make a line look like another one.
_ACTIVE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    r"\ud800-\udfff]"
)


def listed(names: Collection[object], separator: str = ", ") -> str:
    """The first names, each printable, then how many more there are."""
    return _cut([printable(str(name)) for name in list(names)[:MOST_LISTED]], names, separator)


def indented(lines: Collection[str]) -> str:
    """The first lines, indented below what was said before, then how many more there are."""
    return "\n  " + _cut(list(lines)[:MOST_LISTED], lines, "\n  ")


def printable(text: str) -> str:
    """Text on one line without control characters, its middle left out where it is long."""
    if len(text) > _MOST_CHARACTERS:
        half = (_MOST_CHARACTERS - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def visible(text: str) -> str:
    """Text that a terminal shows and does not obey, whole; newlines and tabs stay."""
    return _ACTIVE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def visible_json(text: str) -> str:
    """The same of a JSON document, which stays the same document."""
    return _ACTIVE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def shown(value: object) -> str:
    """`repr` of a value from a file: of bounded length, whatever it holds."""
    return _SHORT.repr(value)


def _cut(first: list[str], of: Collection[object], separator: str) -> str:
    more = len(of) - len(first)
    return separator.join([*first, f"and {more:,} more"] if more else first)


class _Short(reprlib.Repr):
    """Cuts every kind of value; `repr` raises for an integer of more than 4,300 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = 4

    def repr_int(self, x: int, level: int) -> str:
        """Also of an integer that Python refuses to write out."""
        if x.bit_length() > _MOST_BITS:
            return f"an integer of {x.bit_length():,} bits"
        return super().repr_int(x, level)


_SHORT = _Short()
