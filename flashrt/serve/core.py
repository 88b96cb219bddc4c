"""The core of serving: an engine, what is known of prompts, and the threads that serve.

IS: putting the parts together; the verbs for whoever speaks to clients. IS NOT: text or HTTP.

Verbs of sessions return futures: they are carried out by the scheduler's thread between two steps,
and answered once what they changed is in the store, if there is one. Nothing here blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from flashrt.base.errors import FlashrtError, SessionError
from flashrt.engine.sight import Image, SightCounters
from flashrt.serve.ask import Ask, Closing, Reason, Ticket, TokenLogprobs
from flashrt.serve.eyes import Eyes
from flashrt.serve.meters import Meters
from flashrt.serve.prefix import Kept, PrefixIndex
from flashrt.serve.saver import Saver
from flashrt.serve.scheduler import Scheduler
from flashrt.serve.sessions import (
    Files,
    NodeView,
    SessionBook,
    SessionView,
    TreeView,
    Turn,
)
from flashrt.serve.sharing import Sharing
from flashrt.serve.slots import Slots
from flashrt.serve.work import LaneStatus, Limits
from flashrt.session.engine import SessionEngine
from flashrt.store.reuse import Rates
from flashrt.store.store import Store

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Status:
    """The server at one moment."""

    lanes: tuple[LaneStatus, ...]
    queued: Mapping[str, int]  # choices that wait, by owner's key
    meters: Meters
    capsules: Mapping[str, tuple[int, int]]  # tier -> entries, bytes of their own in memory
    evictions: Mapping[str, int]  # by where they went: host, disk, store, gone
    pool_nbytes: int
    pool_used_nbytes: int
    problems: tuple[str, ...]  # what could not be read or saved, the last ones
    images: SightCounters | None  # of a model that sees
    images_nbytes: int  # rows of images that are kept


class Core:
    """Serves requests on all free lanes of an engine, from `start` to `close`."""

    def __init__(
        self,
        engine: SessionEngine,
        store: Store | None = None,
        *,
        limits: Limits | None = None,
        kept: Kept | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """The engine stays the caller's: close it after `close`. Nobody else may use its lanes.
        sharing: other servers use the store too; sessions come by `SessionBook.adopt` then.
        """
        self.engine, self.store = engine, store
        self.index = PrefixIndex(engine, store, kept)
        self.book = SessionBook(self.index, store, sharing)
        rates = store.rates if store is not None else Rates()
        self.scheduler = Scheduler(engine, self.index, limits or Limits(), self.book, rates)
        self.eyes = Eyes(engine, self.index, self.scheduler)
        self._saver: Saver | None = None
        if store is not None:
            self._saver = Saver(self.book.tidy)
            self.book.connect(self._saver, self.scheduler.post)
        self.sessions = Sessions(self.book, self.scheduler, self._saver, store)
        self.slots = Slots(self.scheduler, self.index, store, self._saver)

    def start(self) -> Core:
        """Find what the store has, then begin to serve. Raises StoreError."""
        self.book.load()
        if self._saver is not None:
            self._saver.start()
        self.scheduler.start()
        return self

    def submit(self, ask: Ask) -> Ticket:
        """Take a request; its sink is told what becomes of it. Raises at once QueueFull, Closing,
        NoSession, SessionBusy, and SessionError or TokenError for what cannot be carried out.
        """
        return self.scheduler.submit(ask)

    def call(self, work: Callable[[], _T]) -> Future[_T]:
        """`work()` in the scheduler's thread, between two steps: it may use the engine."""
        return self.scheduler.call(work)

    def status(self) -> Future[Status]:
        """How things are, between two steps."""
        return self.call(self._status)

    def close(self, *, drain: bool = True) -> None:
        """Take nothing more, and fail what waits (Closing). What runs may go on for as long as
        `Limits.drain_s`, or with drain=False ends at the next token; its state is kept. Blocks.
        """
        self.scheduler.close(drain=drain)
        self.eyes.close()
        if self._saver is not None:
            self._saver.close()

    def _status(self) -> Status:
        pool, scheduler = self.engine.capsules.pool, self.scheduler
        sight = self.engine.sight
        return Status(
            tuple(scheduler.lanes()), scheduler.queue_lengths(), scheduler.meters.copy(),
            self.index.tiers(), dict(self.index.evictions), pool.nbytes, pool.used_nbytes,
            tuple(self.book.problems),
            None if sight is None else dataclasses.replace(sight.counters),
            0 if sight is None else sight.nbytes,
        )  # fmt: skip


class Sessions:
    """Verbs of sessions, for any thread. All raise, through their futures, NoSession for what the
    owner does not have, and StoreError; those that change a session raise SessionBusy while a turn
    runs, and SessionConflict when its etag is not `etag`.
    """

    def __init__(
        self, book: SessionBook, scheduler: Scheduler, saver: Saver | None, store: Store | None
    ) -> None:
        self._book, self._scheduler = book, scheduler
        self._saver, self._store = saver, store

    def create(self, owner: str, name: str | None = None) -> Future[SessionView]:
        """An empty session."""
        return self._change(lambda: self._book.create(owner, name))

    def list(self, owner: str) -> Future[tuple[SessionView, ...]]:
        """An owner's sessions, oldest first."""
        return self._scheduler.call(lambda: self._book.list(owner))

    def view(self, owner: str, session: str) -> Future[SessionView]:
        """One of them."""
        return self._scheduler.call(lambda: self._book.view(owner, session))

    def tree(self, owner: str, session: str) -> Future[TreeView]:
        """With its nodes."""
        return self._scheduler.call(lambda: self._book.tree(owner, session))

    def tokens(self, owner: str, session: str, node: str | None = None) -> Future[tuple[int, ...]]:
        """All tokens of a node, by id or name (default: the tip)."""
        return self._scheduler.call(lambda: self._book.tokens(owner, session, node))

    def messages(
        self, owner: str, session: str, node: str | None = None
    ) -> Future[tuple[Any, ...]]:
        """Messages on the way to a node, oldest first."""
        return self._scheduler.call(lambda: self._book.messages(owner, session, node))

    def turn(self, owner: str, session: str, node: str | None = None) -> Future[Turn]:
        """A node with its own tokens and messages, by id or name (default: the tip)."""
        return self._scheduler.call(lambda: self._book.turn(owner, session, node))

    def annotate(
        self, owner: str, session: str, node: str, messages: Iterable[Mapping[str, Any]]
    ) -> Future[NodeView]:
        """More messages of a node, as the reply that its turn gave."""
        return self._change(lambda: self._book.annotate(owner, session, node, messages))

    def snapshot(
        self, owner: str, session: str, name: str, *, etag: str | None = None
    ) -> Future[NodeView]:
        """Give the tip a name."""
        return self._change(lambda: self._book.snapshot(owner, session, name, etag=etag))

    def fork(
        self, owner: str, session: str, node: str | None = None, name: str | None = None
    ) -> Future[SessionView]:
        """Another session, at a node of this one (default: the tip)."""
        return self._change(lambda: self._book.fork(owner, session, node, name))

    def restore(
        self, owner: str, session: str, node: str, *, etag: str | None = None
    ) -> Future[SessionView]:
        """The tip is any node of the tree, by id or name."""
        return self._change(lambda: self._book.restore(owner, session, node, etag=etag))

    def rollback(
        self,
        owner: str,
        session: str,
        *,
        turns: int | None = None,
        node: str | None = None,
        position: int | None = None,
        etag: str | None = None,
        images: tuple[Image, ...] = (),
    ) -> Future[SessionView]:
        """The tip is so many turns earlier, a node on the way to it, or its state at an earlier
        position: a node that is made for it, unless there is one. `images`: those of the session's
        messages, which may have to be fed again for that. Raises SessionError at once unless
        exactly one of the three is given.
        """
        if sum(given is not None for given in (turns, node, position)) != 1:
            raise SessionError("rollback: give one of turns, node and position")
        if position is not None:
            return self._to_position(owner, session, position, etag, images)
        if node is not None:
            return self._change(lambda: self._book.up(owner, session, node, etag=etag))
        return self._change(lambda: self._book.back(owner, session, turns or 0, etag=etag))

    def delete(self, owner: str, session: str, *, etag: str | None = None) -> Future[None]:
        """Forget a session. Its objects leave the store with the next `flashrt store gc`."""
        return self._change(lambda: self._book.delete(owner, session, etag=etag))

    # -- inside ---------------------------------------------------------------------------------

    def _change(self, work: Callable[[], tuple[_T, Files]]) -> Future[_T]:
        """`work` in the scheduler's thread, then its files; then the answer."""
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result, files = work()
            except BaseException as error:
                future.set_exception(error)
                return
            self._write(files, lambda e: _resolve(future, result, e))

        if not self._scheduler.post(run):
            future.set_exception(Closing("the server has shut down"))
        return future

    def _write(self, files: Files, done: Callable[[BaseException | None], object]) -> None:
        saver, store = self._saver, self._store
        if saver is None or store is None:
            done(None)
        else:
            saver.do(lambda: self._book.write(files), done)

    def _to_position(
        self, owner: str, session: str, position: int, etag: str | None, images: tuple[Image, ...]
    ) -> Future[SessionView]:
        future: Future[SessionView] = Future()

        def run() -> None:
            book = self._book
            if not future.set_running_or_notify_cancel():
                return

            def undone(error: FlashrtError) -> None:
                book.move_tip(owner, session, before)
                future.set_exception(error)

            try:
                node, tokens = book.below(owner, session, position, etag=etag)
                if len(book.tokens(owner, session, node)) == position:
                    view, files = book.restore(owner, session, node)
                    self._write(files, lambda e: _resolve(future, view, e))
                    return
                before = book.move_tip(owner, session, node)
                made = _Made(lambda: future.set_result(book.view(owner, session)), undone)
                ask = Ask(owner, tuple(tokens.tolist()), made, 0, session=session, images=images)
                try:
                    self._scheduler.submit(ask)
                except BaseException:
                    book.move_tip(owner, session, before)
                    raise
            except BaseException as error:
                future.set_exception(error)

        if not self._scheduler.post(run):
            future.set_exception(Closing("the server has shut down"))
        return future


@dataclass(frozen=True, slots=True)
class _Made:
    """The sink of a request for a state."""

    done: Callable[[], object]
    undone: Callable[[FlashrtError], object]

    def began(self, prompt_tokens: int, cached_tokens: int) -> None:
        """It has a lane."""

    def token(self, index: int, token: int, logprobs: TokenLogprobs | None) -> bool:
        """None is asked for."""
        return False

    def ended(self, index: int, reason: Reason, node: str | None) -> None:
        """The state is there, unless the server shut down meanwhile."""
        if node is not None:
            self.done()
        else:
            self.undone(Closing(f"the state was not made: {reason}"))

    def failed(self, error: FlashrtError) -> None:
        """It cannot be made."""
        self.undone(error)


def _resolve(future: Future[_T], result: _T, error: BaseException | None) -> None:
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
