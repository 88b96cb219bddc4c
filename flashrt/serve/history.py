"""Responses that can be gone on from: what `previous_response_id` names.

IS: conversations by id, per owner, the oldest forgotten first when they are too many or too large;
on a shelf too, where servers share one. IS NOT: sessions or capsules: those are what makes going on
fast, these are only texts.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

MOST_KEPT, MOST_NBYTES = 1000, 64 << 20  # of one owner


@dataclass(frozen=True, slots=True)
class Kept:
    """A response: its own object, and all messages up to its end."""

    response: dict[str, Any]
    messages: list[dict[str, Any]]
    nbytes: int


class Shelf(Protocol):
    """Where responses lie that other servers may be asked for."""

    async def put(self, owner: str, name: str, kept: Kept) -> None:
        """Keep one; it is there when this returns."""
        ...

    async def get(self, owner: str, name: str) -> Kept | None:
        """One of them, whoever put it there."""
        ...

    async def drop(self, owner: str, name: str) -> bool:
        """Forget it; whether it was there."""
        ...


class History:
    """Of all owners; nobody sees another's. Used in the event loop alone."""

    def __init__(
        self, shelf: Shelf | None = None, most: int = MOST_KEPT, most_nbytes: int = MOST_NBYTES
    ) -> None:
        self._shelf, self._most, self._most_nbytes = shelf, most, most_nbytes
        self._kept: dict[str, OrderedDict[str, Kept]] = {}

    async def keep(
        self, owner: str, response: dict[str, Any], messages: list[dict[str, Any]]
    ) -> None:
        """Remember a response under its id."""
        nbytes = len(json.dumps(messages)) + len(json.dumps(response))
        if nbytes > self._most_nbytes:
            return
        made, kept = Kept(response, messages, nbytes), self._of(owner)
        kept[response["id"]] = made
        if self._shelf is not None:
            await self._shelf.put(owner, response["id"], made)
        while len(kept) > self._most or sum(k.nbytes for k in kept.values()) > self._most_nbytes:
            name, _ = kept.popitem(last=False)
            if self._shelf is not None:
                await self._shelf.drop(owner, name)

    async def find(self, owner: str, name: str) -> Kept | None:
        """What is known under an id."""
        found = self._of(owner).get(name)
        if found is None and self._shelf is not None:
            found = await self._shelf.get(owner, name)
            if found is not None:
                self._of(owner)[name] = found
        elif found is not None:
            self._of(owner).move_to_end(name)
        return found

    async def forget(self, owner: str, name: str) -> bool:
        """Forget it; whether it was there."""
        was_here = self._of(owner).pop(name, None) is not None
        was_there = self._shelf is not None and await self._shelf.drop(owner, name)
        return was_here or was_there

    def _of(self, owner: str) -> OrderedDict[str, Kept]:
        return self._kept.setdefault(owner, OrderedDict())
