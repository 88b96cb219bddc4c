"""Bodies of requests: bytes -> JSON within limits, and its fields, each checked when it is read.

IS: the one reader of what clients send. Every refusal is a 400 that names the parameter. IS NOT:
what a field means (wire), or the size of a body (http).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from flashrt.base.checks import as_integer, as_number
from flashrt.base.messages import printable, shown
from flashrt.serve.refusal import Refusal, bad

MOST_DEPTH = 100
_LOWEST, _HIGHEST = -(1 << 63), (1 << 64) - 1


def parse(body: bytes) -> Fields:
    """The object that a body holds. Refuses what is no JSON object of bounded depth in UTF-8, NaN,
    infinities and halves of characters.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise bad(None, f"the body is not UTF-8: byte {error.start}") from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise bad(None, f"the body nests deeper than {MOST_DEPTH} levels") from error
    except ValueError as error:
        raise bad(None, f"the body is not JSON: {printable(str(error))}") from error
    if not isinstance(value, dict):
        raise bad(None, f"the body is {_kind(value)}; a JSON object is expected")
    _check(value)
    return Fields(value)


def _refuse_constant(name: str) -> NoReturn:
    raise bad(None, f"the body is not JSON: {name} is no number of JSON")


def _check(value: object) -> None:
    """Depth, and texts that no UTF-8 can hold."""
    level: list[object] = [value]
    for _ in range(MOST_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                for name in item:
                    _check_text(name)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str):
                _check_text(item)
        if not inner:
            return
        level = inner
    raise bad(None, f"the body nests deeper than {MOST_DEPTH} levels")


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad(None, f"a text holds half a character (a lone surrogate) at {error.start}") from (
            error
        )


class Fields:
    """A JSON object of a request. A field that is null counts as absent.

    All readers refuse a wrong type or range with the field's path; `needed` refuses an absent one.
    """

    def __init__(self, value: Mapping[str, Any], at: str = "") -> None:
        self.value = value
        self.at = at

    def path(self, name: str) -> str:
        """Where a field is, for refusals."""
        return f"{self.at}.{name}" if self.at else name

    def has(self, name: str) -> bool:
        """Whether it is there and not null."""
        return self.value.get(name) is not None

    def get(self, name: str) -> Any:
        """Whatever is there."""
        return self.value.get(name)

    def refuse(self, name: str, wanted: str) -> Refusal:
        """The refusal of a field's value."""
        path, value = self.path(name), self.value.get(name)
        if value is None:
            return bad(path, f"{path} is missing; give {wanted}", "missing_required_parameter")
        return bad(path, f"{path} is {shown(value)}; give {wanted}", "invalid_value")

    def needed(self, name: str, wanted: str) -> Any:
        """Its value, which must be there."""
        if not self.has(name):
            raise self.refuse(name, wanted)
        return self.value[name]

    def only(self, known: Collection[str]) -> None:
        """Refuse fields that nobody knows: a misspelt one would do nothing."""
        for name in self.value:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                path = printable(self.path(name))
                raise bad(path, f"{path}: unknown parameter{hint}", "unknown_parameter")

    def refused(self, name: str, why: str, *allowed: object) -> None:
        """Refuse a field that cannot be honoured, unless it says nothing."""
        value = self.value.get(name)
        if value is not None and not any(value is a or value == a for a in allowed):
            path = self.path(name)
            raise bad(path, f"{path}: {why}", "unsupported_parameter")

    # -- of one type ----------------------------------------------------------------------------

    def text(self, name: str, choices: Collection[str] = ()) -> str | None:
        """A text, perhaps one of some."""
        value = self.value.get(name)
        if value is None:
            return None
        wanted = f"one of {', '.join(choices)}" if choices else "a text"
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.refuse(name, wanted)
        return value

    def needed_text(self, name: str, choices: Collection[str] = ()) -> str:
        """A text that must be there."""
        found = self.text(name, choices)
        if found is None:
            raise self.refuse(name, f"one of {', '.join(choices)}" if choices else "a text")
        return found

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.value.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def whole(self, name: str, low: int = _LOWEST, high: int = _HIGHEST) -> int | None:
        """An integer in [low, high]."""
        value = self.value.get(name)
        if value is None:
            return None
        found = as_integer(value)
        if found is None and isinstance(value, float) and value.is_integer():
            found = int(value)  # 1.0 is an integer of JSON
        if found is None or not low <= found <= high:
            raise self.refuse(name, f"an integer in [{low}, {high}]")
        return found

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """A finite number in [low, high]."""
        value = self.value.get(name)
        if value is None:
            return None
        found = as_number(value)
        if found is None or not math.isfinite(found) or not low <= found <= high:
            is_bounded = math.isfinite(low) or math.isfinite(high)
            raise self.refuse(name, f"a number in [{low}, {high}]" if is_bounded else "a number")
        return found

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text or a list of texts, none of them empty."""
        value = self.value.get(name)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        is_fine = isinstance(found, list) and all(isinstance(t, str) and t for t in found)
        if not is_fine or len(found) > most:
            raise self.refuse(name, f"a text, or up to {most} texts, none of them empty")
        return tuple(found)

    def items(self, name: str) -> list[Any] | None:
        """A list."""
        value = self.value.get(name)
        if value is not None and not isinstance(value, list):
            raise self.refuse(name, "a list")
        return value

    def object(self, name: str) -> Fields | None:
        """An object."""
        value = self.value.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return Fields(value, self.path(name))

    def objects(self, name: str) -> list[Fields]:
        """A list of objects; empty where there is none."""
        return objects(self.items(name) or [], self.path(name))


def objects(items: Sequence[Any], at: str) -> list[Fields]:
    """Items of a list, each of which must be an object."""
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise bad(f"{at}[{i}]", f"{at}[{i}] is {shown(item)}; give an object", "invalid_value")
    return [Fields(item, f"{at}[{i}]") for i, item in enumerate(items)]


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
