"""How a conversation comes to another replica: through the store that all of them share.

IS: taking sessions and prefixes over from whoever served them, and the shelf of responses. IS NOT:
the choice of a replica (ring), or what is in a session's file (serve.sessions).

Nothing is sent from replica to replica. A turn is in the store before its end is told, so that the
one that comes next finds it there, whether the last one was drained or killed. Reads of the store
are done in threads; the engine's thread is asked for what changes.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar
from weakref import WeakValueDictionary

import numpy as np

from flashrt.base.errors import StoreError
from flashrt.serve.core import Core
from flashrt.serve.history import Kept
from flashrt.serve.prefix import PREFIX, owner_key
from flashrt.serve.sessions import MOST_FILE_NBYTES
from flashrt.serve.sharing import stamp_of
from flashrt.store.folder import REFS
from flashrt.store.manifest import Place
from flashrt.store.store import Store, ref_file

_T = TypeVar("_T")
_ID = re.compile(r"[0-9a-f]{1,64}")
_SHELVED = re.compile(r"[A-Za-z0-9_-]{1,100}")


class Homing:
    """Of one replica."""

    def __init__(self, core: Core, store: Store) -> None:
        self._core, self._store = core, store
        # One taking over at a time, of each session.
        self._turns = WeakValueDictionary[tuple[str, str], asyncio.Lock]()
        self.n_adopted = self.n_lent = 0

    async def session(self, owner: str, id_: str) -> None:
        """The session is here as the store has it, or newer; nothing where there is none.

        Raises ForeignSession, SessionBusy, and StoreError for one that cannot be read.
        """
        key = owner_key(owner)
        if _ID.fullmatch(id_) is None:
            return
        async with self._turns.setdefault((key, id_), asyncio.Lock()):
            await self._session(key, id_)

    async def _session(self, key: str, id_: str) -> None:
        book, name = self._core.book, f"{PREFIX}/{key}/{id_}/session.json"
        text = await asyncio.to_thread(_text_of, self._store, name)
        try:
            document = None if text is None else json.loads(text)
            stamp = None if document is None else stamp_of(document)
            if await self._do(lambda: book.knows(key, id_, stamp)) or document is None:
                return
            entries = {
                entry
                for node in document["nodes"]
                for entry in (node["end"], node["start"])
                if entry is not None
            }
            places = await asyncio.to_thread(_places, self._store, key, entries)
            await self._do(lambda: book.adopt(key, id_, document, places))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self._store.folder.url}/{name} is damaged: {error!r}") from error
        self.n_adopted += 1

    async def prefixes(self, owner: str) -> int:
        """What other replicas know of an owner's prompts is known here too; how many that are."""
        key, book = owner_key(owner), self._core.book
        known = await self._do(lambda: book.known_entries(key))
        found = await asyncio.to_thread(_unknown, self._store, key, known)
        n = await self._do(lambda: book.lend(key, found))
        self.n_lent += n
        return n

    async def stored(self, owner: str) -> tuple[str, ...]:
        """Ids of all sessions of an owner that are in the store."""
        below = f"{PREFIX}/{owner_key(owner)}"
        names = await asyncio.to_thread(self._store.folder.names, below)
        return tuple(n.split("/")[2] for n in names if n.endswith("/session.json"))

    async def leave(self) -> int:
        """Forget all sessions: others serve them from now on. How many they were."""
        return await self._do(self._core.book.let_go)

    async def _do(self, work: Callable[[], _T]) -> _T:
        return await asyncio.wrap_future(self._core.call(work))


class StoreShelf:
    """Responses in the store: see serve.history.Shelf."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, owner: str, name: str, kept: Kept) -> None:
        """See Shelf. Raises StoreError."""
        body = {"response": kept.response, "messages": kept.messages}
        data = np.frombuffer(json.dumps(body).encode(), np.uint8)

        def write() -> None:
            with self._store.folder.publishing():
                self._store.folder.write(_shelved(owner, name), data)

        await asyncio.to_thread(write)

    async def get(self, owner: str, name: str) -> Kept | None:
        """See Shelf. None also for one that is damaged."""
        if _SHELVED.fullmatch(name) is None:
            return None
        text = await asyncio.to_thread(_text_of, self._store, _shelved(owner, name))
        try:
            body = None if text is None else json.loads(text)
            return (
                None if body is None else Kept(body["response"], body["messages"], len(text or b""))
            )
        except (ValueError, KeyError, TypeError):
            return None

    async def drop(self, owner: str, name: str) -> bool:
        """See Shelf."""
        if _SHELVED.fullmatch(name) is None:
            return False

        def remove() -> bool:
            path = _shelved(owner, name)
            with self._store.folder.publishing():
                was_there = self._store.folder.size(path) is not None
                self._store.folder.delete(path)
            return was_there

        return await asyncio.to_thread(remove)


def _shelved(owner: str, name: str) -> str:
    return f"{PREFIX}/{owner_key(owner)}/responses/{name}.json"


def _text_of(store: Store, name: str) -> bytes | None:
    """A file as it is now; None where there is none. Raises StoreError."""
    if store.folder.size(name) is None:
        return None
    return store.folder.read_text(name, MOST_FILE_NBYTES)


def _places(store: Store, owner: str, entries: Iterable[str]) -> Mapping[str, Place]:
    """Where entries are stored; what is gone, or cannot be read, costs speed alone."""
    found: dict[str, Place] = {}
    for entry in entries:
        try:
            place = store.named(f"{PREFIX}/{owner}/{entry}") if _ID.fullmatch(entry) else None
        except StoreError:
            continue
        if place is not None:
            found[entry] = place
    return found


def _unknown(store: Store, owner: str, known: set[str]) -> Mapping[str, Place]:
    """Entries of an owner that are in the store and not among those; one listing, and a look at
    each that is new.
    """
    if not store.is_there:
        return {}
    below = ref_file(f"{PREFIX}/{owner}/")
    there = (
        name.removeprefix(below) for name in store.folder.names(REFS) if name.startswith(below)
    )
    return _places(store, owner, sorted(set(there) - known))
