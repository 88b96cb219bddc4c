"""States of lanes by hand: a lane's state goes to the store under a name, comes back, is forgotten.

IS: the verbs behind llama.cpp's slots, and their names in the store, serve/OWNER/slot/NAME. IS NOT:
HTTP (wire), or what happens by itself: prefixes are found again without any of this.

A lane's state is its last request's owner's; to all others the lane is empty. A lane that works for
a request is waited for, as llama.cpp does.
"""

from __future__ import annotations

import contextlib
import re
import time
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from flashrt.base.errors import CapsuleError
from flashrt.base.messages import shown
from flashrt.base.tracing import PLAN, trace
from flashrt.capsule.capsule import Capsule
from flashrt.serve.ask import BadSlotFile, NoSlot, NoSlotFile
from flashrt.serve.prefix import PREFIX, PrefixIndex, owner_key
from flashrt.serve.saver import Saver
from flashrt.serve.scheduler import Scheduler
from flashrt.serve.work import Worker
from flashrt.store.store import Store

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,99}")


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A state that was saved or restored."""

    n_tokens: int
    nbytes: int  # of all that a load reads
    seconds: float


class Slots:
    """The verbs, for any thread. All raise, through their futures, NoSlot for a lane that is not
    there, and Closing; `save` and `restore` want a store, and raise BadSlotFile at once for what
    cannot be a name. A future that is cancelled before its lane is idle changes nothing.
    """

    def __init__(
        self, scheduler: Scheduler, index: PrefixIndex, store: Store | None, saver: Saver | None
    ) -> None:
        self._scheduler, self._index = scheduler, index
        self._store, self._saver = store, saver

    @property
    def has_store(self) -> bool:
        """Whether there is a place for names."""
        return self._store is not None

    def save(self, owner: str, lane: int, name: str) -> Future[SlotFile]:
        """The lane's state, in the store; a name that is taken moves. Raises NoSlot for a lane that
        has no state of the owner's, PoolFull, StoreError.
        """
        store, saver, ref = self._store, self._saver, _ref(owner, name)
        assert store is not None and saver is not None, "the caller has asked `has_store`"
        saved: Future[SlotFile] = Future()

        def take(worker: Worker) -> None:
            if not saved.set_running_or_notify_cancel():
                return
            began, key = time.monotonic(), owner_key(owner)
            session, index = worker.session, self._index
            if worker.owner != key or not session.position:
                raise NoSlot(f"slot {lane} holds no state of yours; there is nothing to save")
            index.make_room_for(session.lane)
            entry = index.add(key, session.snapshot())
            assert entry.capsule is not None, "it was added just now"
            saving = store.begin(entry.capsule, ref)
            holder = f"slot {id(saving)}"
            index.hold(entry, holder)
            sizes: list[int] = []

            def publish() -> None:
                done = saving.publish()
                sizes.append(done.new_nbytes + done.shared_nbytes)

            def settle() -> None:
                if sizes:
                    saving.finish()
                index.release(entry, holder)

            def published(error: BaseException | None) -> None:
                self._scheduler.post(settle)
                if error is not None:
                    saved.set_exception(error)
                else:
                    seconds = time.monotonic() - began
                    saved.set_result(SlotFile(entry.position, sizes[0], seconds))

            saver.do(publish, published)

        self._scheduler.when_idle(lane, take).add_done_callback(
            lambda taken: _pass_on(taken, saved)
        )
        return saved

    def restore(self, owner: str, lane: int, name: str) -> Future[SlotFile]:
        """The lane is in the state that the owner saved under a name, and the prefix index knows
        it: the next request that begins with its tokens starts from there.

        Raises NoSlotFile where the owner has saved none, and BadSlotFile for one that another model
        made, that a lane has no room for, or that is damaged: the lane is as it was then.
        """
        store, ref = self._store, _ref(owner, name)
        assert store is not None, "the caller has asked `has_store`"

        def bring(worker: Worker) -> SlotFile:
            began, session = time.monotonic(), worker.session
            place = store.named(ref)
            if place is None:
                raise NoSlotFile(f"you have saved no slot as {name!r}")
            engine, index = self._scheduler.engine, self._index
            if place.fingerprint != index.fingerprint:
                raise BadSlotFile(
                    f"{name}: saved by another model, precision or version: its fingerprint is "
                    f"{place.fingerprint}, this server's {index.fingerprint}"
                )
            if place.position > engine.max_positions:
                raise BadSlotFile(
                    f"{name} has {place.position:,} tokens; a slot holds {engine.max_positions:,}; "
                    "serve with a larger --max-positions"
                )
            capsule: Capsule | None = None
            try:
                nbytes = sum(ref.nbytes for ref in store.manifest(place).objects)
                capsule = store.load(engine, place)
                session.restore(capsule)
            except CapsuleError as error:
                if capsule is not None:
                    capsule.drop()
                trace(PLAN, f"slot {lane}: {error}")
                raise BadSlotFile(f"{name} cannot be read: what is stored is damaged") from error
            worker.owner, worker.used = owner_key(owner), time.monotonic()
            entry = index.add(worker.owner, capsule)
            return SlotFile(entry.position, nbytes, time.monotonic() - began)

        return self._scheduler.when_idle(lane, bring)

    def erase(self, owner: str, lane: int) -> Future[int]:
        """Forget the lane's state, and the index's entry of it unless a session needs that; how
        many tokens it had. 0 where the lane has no state of the owner's: it stays as it is then.
        """

        def forget(worker: Worker) -> int:
            key, session, index = owner_key(owner), worker.session, self._index
            if worker.owner != key:
                return 0
            n, tokens = session.position, session.tokens
            session.rollback(0)
            worker.owner = None
            known = index.same(key, tokens)
            if known is not None and not known.holders:
                index.forget(known)
                if self._saver is not None:
                    self._saver.tidy_soon()
            return n

        return self._scheduler.when_idle(lane, forget)


def _ref(owner: str, name: str) -> str:
    """The name in the store. Raises BadSlotFile for what cannot be one."""
    if not _NAME.fullmatch(name):
        raise BadSlotFile(
            f"{shown(name)} is not a name: give 1 to 100 letters, digits and _ . + = @ -, the "
            "first one a letter, a digit or _"
        )
    return f"{PREFIX}/{owner_key(owner)}/slot/{name}"


def _pass_on(taken: Future[None], saved: Future[SlotFile]) -> None:
    if (error := taken.exception()) is not None:
        with contextlib.suppress(InvalidStateError):  # it was cancelled
            saved.set_exception(error)
