"""Which replica a conversation lives on: a ring for what nobody knows, a directory for the rest.

IS: consistent hashing with a bound on load, and homes by key, the one used longest ago forgotten.
IS NOT: keys of requests (keys), or replicas (station).

Consistent hashing here is rendezvous hashing: each replica draws a number for a root, and the
replicas in the order of their numbers are where it would go. A replica that comes or goes moves
only the roots that it is first for.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flashrt.fleet.replicas.keys import Key

LOAD_BOUND = 1.25  # times the mean: the first replica of a root takes no more than that
MOST_KNOWN = 200_000  # keys of a directory; about 40 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A replica, as it told of itself. rank: its number among the replicas, from 0, for slots."""

    id: str
    rank: int
    lanes: int
    fingerprint: str
    pid: int = 0
    host: str = ""
    sessions: int = 0
    adopted: int = 0  # sessions that were taken over from other replicas
    foreign: int = 0  # capsules of these that another model made: computed again
    lent: int = 0  # boundaries of prompts that were found in the store
    roster: tuple[str, ...] = ()  # ids of its sessions, where they were asked for


def order_of(root: Key, ids: Iterable[str]) -> list[str]:
    """The replicas in the order in which a root prefers them."""

    def drawn(id_: str) -> bytes:
        return hashlib.blake2b(id_.encode(), key=root, digest_size=8).digest()

    return sorted(ids, key=lambda id_: (drawn(id_), id_))


def choose(root: Key | None, ids: Sequence[str], loads: Mapping[str, int]) -> str | None:
    """The first replica of a root that has no more than its share to do, `LOAD_BOUND` times the
    mean rounded up; without a root the one with least to do. None where there are none.
    """
    if not ids:
        return None
    if root is None:
        return min(ids, key=lambda id_: (loads.get(id_, 0), id_))
    total = sum(loads.get(id_, 0) for id_ in ids) + 1
    share = math.ceil(LOAD_BOUND * total / len(ids))
    order = order_of(root, ids)
    return next(id_ for id_ in order if loads.get(id_, 0) < share)


class Directory:
    """Homes by key."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._homes: OrderedDict[Key, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def find(self, keys: Iterable[Key]) -> str | None:
        """The home of the first key that has one."""
        for key in keys:
            if (home := self._homes.get(key)) is not None:
                self._homes.move_to_end(key)
                return home
        return None

    def learn(self, keys: Iterable[Key], home: str) -> None:
        """They are there from now on."""
        for key in keys:
            self._homes[key] = home
            self._homes.move_to_end(key)
        while len(self._homes) > self._most:
            self._homes.popitem(last=False)
