"""Responses that can be gone on from: what `previous_response_id` names.

IS: conversations by id, per owner, the oldest forgotten first when they are too many or too large.
IS NOT: sessions or capsules: those are what makes going on fast, these are only texts.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MOST_KEPT, MOST_NBYTES = 1000, 64 << 20  # of one owner


@dataclass(frozen=True, slots=True)
class Kept:
    """A response: its own object, and all messages up to its end."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    nbytes: int


class History:
    """Of all owners; nobody sees another's. Used in the event loop alone."""

    def __init__(self, most: int = MOST_KEPT, most_nbytes: int = MOST_NBYTES) -> None:
        self._most, self._most_nbytes = most, most_nbytes
        self._kept: dict[str, OrderedDict[str, Kept]] = {}

    def keep(self, owner: str, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Remember a response under its id."""
        nbytes = len(json.dumps(messages)) + len(json.dumps(response))
        if nbytes > self._most_nbytes:
            return
        kept = self._of(owner)
        kept[response["id"]] = Kept(response, messages, nbytes)
        while len(kept) > self._most or sum(k.nbytes for k in kept.values()) > self._most_nbytes:
            kept.popitem(last=False)

    def find(self, owner: str, name: str) -> Kept | None:
        """What is known under an id."""
        found = self._of(owner).get(name)
        if found is not None:
            self._of(owner).move_to_end(name)
        return found

    def forget(self, owner: str, name: str) -> bool:
        """Forget it; whether it was there."""
        return self._of(owner).pop(name, None) is not None

    def _of(self, owner: str) -> OrderedDict[str, Kept]:
        return self._kept.setdefault(owner, OrderedDict())
