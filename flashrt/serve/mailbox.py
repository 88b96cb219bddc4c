"""A mailbox: from the scheduler's thread to a request's coroutine.

IS: items in order, all that are there taken at once, a bound on how many wait. IS NOT: what the
items are (speaker). A reader that falls too far behind closes it: memory is not a client's to take.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Generic, TypeVar

T = TypeVar("T")
MOST_WAITING = 65_536  # items; a token is one or two of them


class Mailbox(Generic[T]):
    """Made in the event loop that reads it."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._loop = asyncio.get_running_loop()
        self._most = most
        self._items: list[T] = []
        self._lock = threading.Lock()
        self._is_there = asyncio.Event()
        self.is_closed = False
        self.is_overrun = False

    def put(self, item: T) -> bool:
        """Leave an item, from any thread; False if nobody reads any more."""
        with self._lock:
            if self.is_closed:
                return False
            if len(self._items) >= self._most:
                self.is_closed = self.is_overrun = True
            else:
                self._items.append(item)
                if len(self._items) > 1:  # the reader was told already
                    return True
            is_open = not self.is_closed
        try:
            self._loop.call_soon_threadsafe(self._is_there.set)
        except RuntimeError:  # the loop has ended, and its clients with it
            self.is_closed = True
            return False
        return is_open

    async def take(self) -> list[T]:
        """All items that are there, at least one, once there is one; none if it was overrun."""
        while True:
            with self._lock:
                items, self._items = self._items, []
                self._is_there.clear()
            if items or self.is_overrun:
                return items
            await self._is_there.wait()

    def close(self) -> None:
        """Nobody reads any more."""
        with self._lock:
            self.is_closed = True
            self._items.clear()
