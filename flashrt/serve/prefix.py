"""The prefix index: which known states are a prefix of a prompt; per owner.

IS: entries for capsules in memory and in the store, found in time proportional to the prompt by
exact comparison of tokens; and who gives way when there is no room. IS NOT: restoring or taking
capsules (scheduler). Only the scheduler's thread calls it.

An entry that a node of a session needs is held: it is sent to slower tiers, never dropped. Others
are dropped, the one that was used longest ago first.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError
from flashrt.base.tracing import PLAN, trace
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.extent import Tier
from flashrt.capsule.lineage import Lane, segment_layout
from flashrt.core.planner import align
from flashrt.serve.radix import Node, RadixTree
from flashrt.session.engine import SessionEngine
from flashrt.store.manifest import Place, prefix_digests, tokens_digest
from flashrt.store.store import Store

MOST_FOUND = 8  # boundaries that are weighed for one prompt: the deepest ones
PREFIX = "serve"  # of names in the store
_OWNER_NBYTES, _ID_NBYTES = 12, 8


def owner_key(owner: str) -> str:
    """The owner, as files name them: an API key must not be read off a folder."""
    return hashlib.blake2b(owner.encode(), digest_size=_OWNER_NBYTES).hexdigest()


@dataclass(slots=True, eq=False)
class Entry:
    """A boundary that some prompt may begin with."""

    owner: str  # its key
    id: str
    position: int
    capsule: Capsule | None = None  # None: in the store alone
    place: Place | None = None  # None: not in the store
    holders: set[str] = field(default_factory=set)  # nodes of sessions that need it
    is_lent: bool = False  # found in a store that others serve from: its name there is theirs
    node: Node[Entry] | None = None  # in the tree, while it is in memory
    queue: OrderedDict[Entry, None] | None = None  # where its turn to give way is kept

    @property
    def name(self) -> str:
        """Of its ref in the store."""
        return f"{PREFIX}/{self.owner}/{self.id}"

    @property
    def tier(self) -> str:
        """device, host, disk or store."""
        return "store" if self.capsule is None else self.capsule.fixed.tier.value


@dataclass(frozen=True, slots=True)
class Kept:
    """How many entries without a session are kept."""

    in_memory: int = 1024
    in_store: int = 4096


class PrefixIndex:
    """Of one engine, and of a store if there is one."""

    def __init__(
        self, engine: SessionEngine, store: Store | None, kept: Kept | None = None
    ) -> None:
        self._engine, self._store = engine, store
        self._table = engine.capsules
        self._kept = kept or Kept()
        self._trees: dict[str, RadixTree[Entry]] = {}
        # Of entries in the store alone: by owner, position, digest of tokens.
        self._stored: dict[str, dict[int, dict[str, Entry]]] = {}
        self._loose: OrderedDict[Entry, None] = OrderedDict()  # in memory, without a holder
        self._held: OrderedDict[Entry, None] = OrderedDict()  # in memory, with one
        self._loose_stored: OrderedDict[Entry, None] = OrderedDict()  # in the store alone
        self._held_stored: OrderedDict[Entry, None] = OrderedDict()
        self._host_nbytes: Counter[Entry] = Counter()  # taken from the device, now in host memory
        self.evictions: Counter[str] = Counter()  # by where entries went: host, disk, store, gone
        self.removals: list[str] = []  # names that the store should forget

    # -- what is there --------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Of the engine: what another made does not fit."""
        return self._engine.fingerprint

    @property
    def checkpoint(self) -> Path:
        """Of the engine: its tokenizer has the text of tokens."""
        return self._engine.checkpoint.path

    def entries(self) -> Iterator[Entry]:
        """All of them."""
        for queue in (self._loose, self._held, self._loose_stored, self._held_stored):
            yield from queue

    def tiers(self) -> dict[str, tuple[int, int]]:
        """Entries, and bytes of their own, by tier."""
        found = dict.fromkeys(("device", "host", "disk", "store"), (0, 0))
        for entry in self.entries():
            n, nbytes = found[entry.tier]
            found[entry.tier] = n + 1, nbytes + (entry.capsule.nbytes if entry.capsule else 0)
        return found

    def find(self, owner: str, tokens: NDArray[np.int32]) -> list[Entry]:
        """The deepest boundaries that are prefixes of `tokens`, deepest first; of those in the
        store alone, positions and digests say so, and `need` compares the tokens.
        """
        tree = self._trees.get(owner)
        found = tree.path(tokens) if tree else []
        if stored := self._stored.get(owner):
            positions = sorted(p for p in stored if p <= len(tokens))
            digests = prefix_digests(tokens, positions)
            found += [e for p in positions if (e := stored[p].get(digests[p])) is not None]
        return sorted(found, key=lambda entry: -entry.position)[:MOST_FOUND]

    def same(self, owner: str, tokens: NDArray[np.int32]) -> Entry | None:
        """The entry of exactly these tokens; of one in the store alone a digest says so."""
        tree = self._trees.get(owner)
        path = tree.path(tokens) if tree else []
        if path and path[0].position == len(tokens):
            return path[0]
        stored = self._stored.get(owner, {}).get(len(tokens), {})
        return stored.get(tokens_digest(tokens)) if stored else None

    def need(self, entry: Entry, tokens: NDArray[np.int32]) -> Capsule:
        """Its capsule, read from the store where it is there alone; it was used just now.

        Raises CapsuleError when that cannot be read, or is of other tokens than these begin with.
        """
        if entry.capsule is None:
            assert self._store is not None and entry.place is not None
            capsule = self._store.load(self._engine, entry.place)
            if not np.array_equal(capsule.tokens, tokens[: entry.position]):
                capsule.drop()
                raise CapsuleError(f"{entry.place.name}: its tokens only look like the prompt's")
            self._enter(entry, capsule)
            entry.is_lent = False  # whoever used it last answers for its name
        self._queue(entry)
        assert entry.capsule is not None
        return entry.capsule

    # -- coming and going -----------------------------------------------------------------------

    def add(self, owner: str, capsule: Capsule, holder: str | None = None) -> Entry:
        """A capsule that was taken; equal tokens are the same state, and kept once."""
        tokens = capsule.tokens
        known = self.same(owner, tokens)
        if known is not None and known.capsule is not None:
            capsule.drop()
        elif known is not None:
            self._enter(known, capsule)
        entry = known or Entry(owner, secrets.token_hex(_ID_NBYTES), capsule.position)
        if known is None:
            self._enter(entry, capsule)
        if holder is not None:
            entry.holders.add(holder)
        self._queue(entry)
        while len(self._loose) > self._kept.in_memory:
            self._leave(next(iter(self._loose)))
        return entry

    def add_stored(
        self, owner: str, id_: str, place: Place, holders: set[str], *, is_lent: bool = False
    ) -> Entry:
        """An entry of another process, found in the store; oldest first."""
        entry = Entry(owner, id_, place.position, place=place, holders=holders, is_lent=is_lent)
        self._stored_of(entry)[place.tokens_digest] = entry
        self._queue(entry)
        return entry

    def saved(self, entry: Entry, place: Place) -> None:
        """It is in the store now."""
        entry.place = place

    def hold(self, entry: Entry, holder: str) -> None:
        """A node needs it."""
        entry.holders.add(holder)
        self._queue(entry)

    def release(self, entry: Entry, holder: str) -> None:
        """A node does not need it any more."""
        entry.holders.discard(holder)
        self._queue(entry)

    def forget(self, entry: Entry) -> None:
        """It is gone, whoever held it: nobody could read it, or nobody wants it."""
        capsule = entry.capsule
        self._unlist(entry)
        if capsule is not None:
            capsule.drop()
        if entry.place is not None:
            if not entry.is_lent:
                self.removals.append(entry.name)
            entry.place = None
        entry.holders.clear()

    # -- room -----------------------------------------------------------------------------------

    def make_room_for(self, lane: Lane) -> None:
        """Room in the pool for a capsule of the lane, as far as others can give way. Waypoints go
        first, as they cost speed alone.
        """
        rows = self._engine.arena.plan.lanes[lane.index].rows
        base = lane.base(lane.position)
        start = 0 if base is None else base.stop
        nbytes = align(self._table.fixed_nbytes)
        if lane.position > start:
            nbytes += align(segment_layout(rows, start, lane.position)[1])
        pool = self._table.pool
        while pool.free_nbytes < nbytes <= pool.nbytes:
            longest = max(self._engine.lanes, key=lambda other: len(other.waypoints))
            if longest.waypoints:
                self._table.drop_waypoint(longest, longest.waypoints[0])
            elif not self._evict():
                return

    def _evict(self) -> bool:
        """One entry leaves the device; False when none can."""
        for queue in (self._loose, self._held):
            for entry in queue:
                if entry.tier == Tier.DEVICE:
                    try:
                        self._demote(entry)
                    except CapsuleError as error:  # as a disk that is full
                        trace(PLAN, f"{entry.capsule} stays on the device: {error}")
                        continue
                    return True
        return False

    def _demote(self, entry: Entry) -> None:
        capsule = entry.capsule
        assert capsule is not None
        before = self._table.pool.free_nbytes
        if self._host_has_room(capsule.nbytes):
            capsule.to(Tier.HOST)
            self._host_nbytes[entry] = self._table.pool.free_nbytes - before
            self.evictions["host"] += 1
        else:
            self._leave(entry)

    def _leave(self, entry: Entry) -> None:
        """Out of memory: it is in the store, or goes to the disk of this process when somebody
        holds it, or is gone.
        """
        capsule = entry.capsule
        assert capsule is not None
        if entry.place is not None:
            self._unlist(entry)
            capsule.drop()
            self._stored_of(entry)[entry.place.tokens_digest] = entry
            self._queue(entry)
            self.evictions["store"] += 1
        elif entry.holders:
            capsule.to(Tier.DISK)
            self._host_nbytes.pop(entry, None)
            self.evictions["disk"] += 1
        else:
            self.forget(entry)
            self.evictions["gone"] += 1

    def _host_has_room(self, nbytes: int) -> bool:
        """Whether the host tier has room, or gets it from those that are there for longest."""
        budget = self._engine.budgets.host_bytes
        if nbytes > budget:
            return False
        for entry in list(self._host_nbytes):
            if self._host_nbytes.total() + nbytes <= budget:
                break
            self._leave(entry)
        return self._host_nbytes.total() + nbytes <= budget

    # -- inside ---------------------------------------------------------------------------------

    def _enter(self, entry: Entry, capsule: Capsule) -> None:
        """It is in memory from now on."""
        self._unlist(entry)
        node = self._trees.setdefault(entry.owner, RadixTree()).node(capsule.tokens)
        node.value = entry
        entry.node, entry.capsule = node, capsule

    def _unlist(self, entry: Entry) -> None:
        """In no table and no queue."""
        self._host_nbytes.pop(entry, None)
        if entry.queue is not None:
            del entry.queue[entry]
            entry.queue = None
        if entry.node is not None:
            entry.node.value = None
            tree = self._trees[entry.owner]
            tree.prune(entry.node)
            if not tree.root.children and tree.root.value is None:
                del self._trees[entry.owner]
            entry.node = entry.capsule = None
        elif entry.place is not None:
            positions = self._stored.get(entry.owner, {})
            there = positions.get(entry.position, {})
            if there.get(entry.place.tokens_digest) is entry:
                del there[entry.place.tokens_digest]
                if not there:
                    del positions[entry.position]
                if not positions:
                    del self._stored[entry.owner]

    def _stored_of(self, entry: Entry) -> dict[str, Entry]:
        return self._stored.setdefault(entry.owner, {}).setdefault(entry.position, {})

    def _queue(self, entry: Entry) -> None:
        """Last in the queue that it belongs to."""
        if entry.queue is not None:
            del entry.queue[entry]
        if entry.capsule is not None:
            queue = self._held if entry.holders else self._loose
        else:
            queue = self._held_stored if entry.holders else self._loose_stored
        queue[entry] = None
        entry.queue = queue
        while len(self._loose_stored) > self._kept.in_store:
            self.forget(next(iter(self._loose_stored)))
            self.evictions["gone"] += 1
