"""Who writes to a store where there are no locks: announcements, in files of the store itself.

IS: the protocol by which no save that was reported is lost to a sweep; see docs/store.md. IS NOT:
reads and writes of objects (remote). It needs a filesystem where a file that was put is listed at
once, and nothing else: no clock, no lock, no atomic rename.

    writers/save-ID       a save is at work; it goes before the save is reported
    writers/sweep-ID      a sweep looks for what nobody needs; saves wait
    writers/condemned-ID  what that sweep deletes, one name a line; saves of other names go on
    writers/beat-ID       changes while the process lives; nobody's clock is compared with another's
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from flashrt.base.errors import StoreError

WRITERS = "writers"
SAVE, SWEEP, CONDEMNED, BEAT, CLOCK = "save", "sweep", "condemned", "beat", "clock"
LEASE_S = 60.0  # without a beat that long, by the clock of whoever waits: dead
BEAT_S = 15.0
POLL_S = 0.5
_MOST_LIST_NBYTES = 1 << 30
_END = "end of the list"  # of condemned names: one without it is still being written


class Files(Protocol):
    """What the protocol needs of a filesystem. All raise StoreError."""

    @property
    def url(self) -> str: ...
    def put(self, name: str, data: bytes) -> None:
        """A file; while it is written it may be seen in part."""
        ...

    def get(self, name: str, most_nbytes: int) -> bytes | None: ...
    def names(self, below: str) -> list[str]: ...
    def delete(self, name: str) -> None: ...


@dataclass(slots=True)
class Writers:
    """Of one store, as one process sees them."""

    files: Files
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    @contextlib.contextmanager
    def publishing(self) -> Iterator[Publication]:
        """See folder.Folder."""
        turn = Publication(self)
        try:
            turn.begin()
            yield turn
        finally:
            turn.end()

    @contextlib.contextmanager
    def sweeping(self, grace_s: float, *, take_over: bool) -> Iterator[Sweep]:
        """See folder.Folder."""
        turn = Sweep(self, grace_s)
        try:
            turn.begin(take_over=take_over)
            yield turn
        finally:
            turn.end()

    def present(self) -> dict[str, set[str]]:
        """Ids by kind."""
        kinds = (SAVE, SWEEP, CONDEMNED, BEAT, CLOCK)
        found: dict[str, set[str]] = {kind: set() for kind in kinds}
        for name in self.files.names(WRITERS):
            kind, dash, id = name.removeprefix(f"{WRITERS}/").partition("-")
            if dash and kind in found:
                found[kind].add(id)
        return found

    def announce(self, kind: str, id: str) -> None:
        """A file that says who is at work; written once, so that nobody can bring it back."""
        who = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
        self.files.put(name_of(kind, id), json.dumps(who).encode())

    def who(self, kind: str, id: str) -> str:
        """The announcement, for a message."""
        raw = self.files.get(name_of(kind, id), 4096) or b"{}"
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
            said = json.loads(raw)
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(said["since"])))
            return f"process {said['process']} on {said['host']}, since {since} by its clock"
        return f"an unknown process ({id})"

    def condemned(self, id: str) -> frozenset[str] | None:
        """The names on a sweep's list; None while it is not whole. A list that is gone by now is
        empty: its sweep has ended.
        """
        raw = self.files.get(name_of(CONDEMNED, id), _MOST_LIST_NBYTES)
        *names, end = (
            _END.split("\n") if raw is None else raw.decode("utf-8", "replace").split("\n")
        )
        return frozenset(names) if end == _END else None

    def forget(self, kind: str, id: str) -> None:
        """An announcement goes; its beat after it."""
        self.files.delete(name_of(kind, id))
        self.files.delete(name_of(BEAT, id))


@dataclass(slots=True)
class _Beat:
    """Says now and then that a process lives."""

    writers: Writers
    id: str
    last: float
    count: int = 0

    def beat(self) -> bool:
        """Whether it was time to say so."""
        now = self.writers.clock()
        if now - self.last < BEAT_S:
            return False
        self.last, self.count = now, self.count + 1
        self.writers.files.put(name_of(BEAT, self.id), str(self.count).encode())
        return True


@dataclass(slots=True)
class _Watch:
    """Tells the dead from the slow: a beat that does not change during a lease."""

    writers: Writers
    said: dict[str, tuple[bytes | None, float]] = field(default_factory=dict)

    def is_dead(self, id: str) -> bool:
        beat, now = self.writers.files.get(name_of(BEAT, id), 64), self.writers.clock()
        before, since = self.said.get(id, (None, now))
        if id not in self.said or beat != before:
            self.said[id] = beat, now
            return False
        return now - since >= LEASE_S


class Publication:
    """A save's turn. See folder.Publishing."""

    def __init__(self, writers: Writers) -> None:
        self._writers = writers
        self._condemned: dict[str, frozenset[str]] = {}
        self._beat: _Beat | None = None

    def begin(self) -> None:
        """Announce; withdraw and wait while a sweep is looking. Whoever announced first is seen by
        the other: either the sweep sees this save and waits, or this save sees the sweep.
        """
        watch, writers = _Watch(self._writers), self._writers
        while True:
            self.end()
            id = secrets.token_hex(8)
            self._beat = _Beat(writers, id, writers.clock())
            writers.announce(SAVE, id)
            there = writers.present()
            lists = {id: writers.condemned(id) for id in there[CONDEMNED]}
            looking = (there[SWEEP] | there[CONDEMNED]) - {
                i for i, n in lists.items() if n is not None
            }
            if not looking:
                self._condemned = {id: names for id, names in lists.items() if names is not None}
                return
            self.end()
            for id in looking:
                if watch.is_dead(id):
                    # It deletes nothing any more: before it does, it looks for this file again. If
                    # it has just looked, its list is there, and the next round reads it.
                    writers.forget(SWEEP, id)
                    if id in there[CONDEMNED] and id not in there[SWEEP]:
                        writers.files.delete(name_of(CONDEMNED, id))  # a part of a list
            writers.sleep(POLL_S)

    def spare(self, name: str) -> None:
        """See folder.Publishing."""
        watch = _Watch(self._writers)
        if self._beat is not None:
            self._beat.beat()
        for id in [id for id, names in self._condemned.items() if name in names]:
            while name_of(CONDEMNED, id) in self._writers.files.names(WRITERS):
                if watch.is_dead(id):
                    raise StoreError(
                        f"{self._writers.files.url}: {name} is being deleted by a sweep that does "
                        f"not go on: {self._writers.who(SWEEP, id)}; if that process is dead, run "
                        "`flashrt store gc --take-over`"
                    )
                if self._beat is not None:
                    self._beat.beat()
                self._writers.sleep(POLL_S)
            del self._condemned[id]

    def still_counts(self) -> bool:
        """See folder.Publishing: the announcement is still there, so no sweep began since."""
        assert self._beat is not None, "begun"
        if self._writers.files.get(name_of(SAVE, self._beat.id), 4096) is not None:
            return True
        self.begin()
        return False

    def end(self) -> None:
        """Withdraw the announcement; one that stays behind expires."""
        if self._beat is not None:
            with contextlib.suppress(StoreError):
                self._writers.forget(SAVE, self._beat.id)
            self._beat = None


class Sweep:
    """A sweeper's turn. See folder.Sweeping."""

    def __init__(self, writers: Writers, grace_s: float) -> None:
        self.grace_s = grace_s
        self.id = secrets.token_hex(8)
        self._writers = writers
        self._beat = _Beat(writers, self.id, writers.clock())
        self._has_condemned = False

    def begin(self, *, take_over: bool) -> None:
        """Announce, alone among sweeps; then wait until no save is at work. New ones wait for this
        sweep; those that do not go on are taken for dead.
        """
        writers = self._writers
        if take_over:
            there = writers.present()
            for id in there[CONDEMNED]:
                writers.files.delete(name_of(CONDEMNED, id))
            for id in there[SWEEP]:
                writers.forget(SWEEP, id)
        self._wait_for_others()
        writers.announce(SWEEP, self.id)
        self._refuse(writers.present())
        watch = _Watch(writers)
        while saves := writers.present()[SAVE]:
            for id in saves:
                if watch.is_dead(id):
                    writers.forget(SAVE, id)
            self._beat.beat()
            writers.sleep(POLL_S)
        there = writers.present()
        for id in there[BEAT] - there[SAVE] - there[SWEEP] - there[CONDEMNED]:
            writers.files.delete(name_of(BEAT, id))  # of processes that were killed
        for id in there[CLOCK]:
            writers.files.delete(name_of(CLOCK, id))

    def condemn(self, names: Collection[str]) -> None:
        """See folder.Sweeping. Saves that come now read the list; one that took this sweep for dead
        before has removed its announcement.
        """
        self._has_condemned = True
        text = "\n".join([*sorted(names), _END])
        self._writers.files.put(name_of(CONDEMNED, self.id), text.encode())
        self._need(SWEEP)

    def go_on(self) -> None:
        """See folder.Sweeping."""
        if self._beat.beat():
            self._need(CONDEMNED if self._has_condemned else SWEEP)

    def end(self) -> None:
        """The list goes first: a sweep without one deletes nothing."""
        with contextlib.suppress(StoreError):
            if self._has_condemned:
                self._writers.files.delete(name_of(CONDEMNED, self.id))
            self._writers.forget(SWEEP, self.id)

    def _wait_for_others(self) -> None:
        """Until there is no other sweep; one that died while it looked is removed. Raises
        StoreError for one that looks for long, or deletes: that needs a person who knows.
        """
        watch, writers = _Watch(self._writers), self._writers
        until = writers.clock() + 2 * LEASE_S
        while True:
            there = writers.present()
            looking = there[SWEEP] - there[CONDEMNED]
            if there[CONDEMNED] or (looking and writers.clock() > until):
                self._refuse(there)
            if not looking:
                return
            for id in looking:
                if watch.is_dead(id):
                    writers.files.delete(name_of(SWEEP, id))  # as a save does, see there
            writers.sleep(POLL_S)

    def _refuse(self, there: dict[str, set[str]]) -> None:
        """Raises StoreError where there is another sweep."""
        if others := (there[SWEEP] | there[CONDEMNED]) - {self.id}:
            raise StoreError(
                f"{self._writers.files.url}: another sweep is at work: "
                f"{self._writers.who(SWEEP, min(others))}; wait for it, or, if that process is "
                "dead, run `flashrt store gc --take-over`"
            )

    def _need(self, kind: str) -> None:
        if self._writers.files.get(name_of(kind, self.id), _MOST_LIST_NBYTES) is None:
            raise StoreError(
                f"{self._writers.files.url}: this sweep was taken for dead and ends; sweep again"
            )


def name_of(kind: str, id: str) -> str:
    """A file of the protocol, within the store."""
    return f"{WRITERS}/{kind}-{id}"
