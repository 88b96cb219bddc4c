"""A worker: one engine whose lanes branches take turns on. It runs in an actor, or in a test.

IS: the thread that has the engine to itself, the capsules that branches begin at, and the events
that wait to be collected. IS NOT: Ray (actor, member), or who gives it branches (run).

All calls but those of the thread only leave something for it: between two steps it does what was
asked, starts branches on idle lanes, and takes one step of all. So a call waits for a step at most.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import (
    BackendError,
    CapsuleError,
    FlashrtError,
    FleetError,
    PoolFull,
    StoreError,
)
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.parcel import Parcel, pack, unpack
from flashrt.fleet.message import (
    Absent,
    Assignment,
    Event,
    Finished,
    Installed,
    Passed,
    StoredParcel,
    Wanted,
    WorkerState,
)
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Generation, Session
from flashrt.session.together import step
from flashrt.store.manifest import Place
from flashrt.store.store import Store

_R = TypeVar("_R")
_MOST_STOPPED = 100  # runs: what was sent to one before it was stopped may still come
_NO_LOGPROBS = np.empty(0, np.float64)


@dataclass(slots=True, eq=False)
class _Live:
    """A branch on a lane."""

    run: str
    wanted: Wanted
    assignment: Assignment
    start: Capsule
    session: Session
    generation: Generation
    began: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    passed: str | None = None  # the parcel of its last boundary, if nobody has fetched it


@dataclass(frozen=True, slots=True)
class _Asked:
    work: Callable[[], Any]
    answer: Future[Any]
    needs_lane: bool


class Worker:
    """See the module. Its methods may be called from several threads."""

    def __init__(self, engine: SessionEngine, store: Store | None = None, node: str = "") -> None:
        """All lanes of the engine are the worker's from here on."""
        self._engine, self._store, self._node = engine, store, node
        self._idle = [engine.session() for _ in engine.lanes]
        self._at: dict[Session, str] = {}  # where the last branch of an idle session began
        self._live: list[_Live] = []
        self._waiting: deque[tuple[str, Wanted, Assignment]] = deque()
        self._capsules: OrderedDict[str, Capsule] = OrderedDict()  # least recently used first
        self._parcels: dict[str, dict[str, Parcel]] = {}  # by run and address: not fetched yet
        self._events: dict[str, list[Event]] = {}
        self._stopped: deque[str] = deque(maxlen=_MOST_STOPPED)
        self._asked: deque[_Asked] = deque()
        self._n_branches = self._n_tokens = 0
        self._failure: BaseException | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="flashrt-worker", daemon=True)
        self._thread.start()

    # -- from outside -----------------------------------------------------------------------------

    def state(self) -> WorkerState:
        """The worker as it is between two steps."""
        return self._ask(self._state)

    def prefill(self, tokens: NDArray[np.int32]) -> str:
        """The address of the state after these tokens; the worker has it from here on. Waits for an
        idle lane. Raises what `Session.prefill` and `Session.snapshot` raise.
        """
        return self._ask(lambda: self._prefill(tokens), needs_lane=True)

    def install(self, *parcels: Parcel | StoredParcel) -> Installed:
        """Capsules that branches will begin at, bases first. Those that are here are not taken
        again. Raises CapsuleError for one that is foreign or damaged.
        """
        return self._ask(lambda: self._install(parcels))

    def fetch(self, address: str, run: str = "") -> tuple[Parcel | None, int]:
        """A parcel that waits for a run under this address, else of the capsule that is here; and
        its bytes. (None, 0) where there is neither.
        """
        return self._ask(lambda: self._fetch(address, run))

    def publish(self, address: str) -> StoredParcel:
        """The capsule that is here, put into the store. Raises StoreError."""
        return self._ask(lambda: self._publish(address))

    def forget(self, addresses: list[str]) -> None:
        """Nobody will branch from these any more."""
        self._ask(lambda: self._forget(addresses))

    def submit(self, run: str, wanted: Wanted, assignments: list[Assignment]) -> None:
        """Branches that wait for a lane, in this order; nothing of a run that was stopped."""
        with self._changed:
            self._check()
            if run in self._stopped:
                return
            self._waiting += [(run, wanted, assignment) for assignment in assignments]
            self._changed.notify_all()

    def collect(self, run: str, timeout_s: float) -> list[Event]:
        """What happened to a run's branches since the last call; waits until something has.
        Returns [] after `timeout_s`, or once the run was stopped. Raises FleetError when the engine
        failed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or self._events.get(run) or run in self._stopped, timeout_s
            )
            self._check()
            return self._events.pop(run, [])

    def stop(self, run: str) -> None:
        """Nothing of a run goes on: its branches leave their lanes within a step."""
        with self._changed:
            self._stopped.append(run)
            self._waiting = deque(w for w in self._waiting if w[0] != run)
            self._events.pop(run, None)
            self._changed.notify_all()
        self._ask(lambda: self._leave(run))

    def close(self) -> None:
        """The thread ends after its step, and the engine is closed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._engine.close()

    def _ask(self, work: Callable[[], _R], *, needs_lane: bool = False) -> _R:
        """`work()`, done by the thread between two steps."""
        answer: Future[_R] = Future()
        with self._changed:
            self._check()
            self._asked.append(_Asked(work, answer, needs_lane))
            self._changed.notify_all()
        return answer.result()

    def _check(self) -> None:
        if self._failure is not None:
            raise FleetError(f"the worker's engine failed: {self._failure}") from self._failure
        if self._is_closed:
            raise FleetError("the worker is closed")

    # -- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._has_work():
                self._answer()
                self._start()
                if self._live:
                    self._step()
        except BaseException as error:  # the engine cannot be trusted: this worker is over
            failure: BaseException = error
        else:
            failure = FleetError("the worker is closed")
        with self._changed:
            if not self._is_closed:
                self._failure = failure
            asked, self._asked = self._asked, deque()
            self._changed.notify_all()
        for each in asked:
            each.answer.set_exception(FleetError(f"the worker's engine failed: {failure}"))

    def _has_work(self) -> bool:
        """Waits until there is some; False once the worker is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._asked or self._live or self._waiting
            )
            return not self._is_closed

    def _answer(self) -> None:
        """What was asked. Who needs a lane waits for one; no branch starts before that."""
        while (asked := self._next_asked()) is not None:
            try:
                asked.answer.set_result(asked.work())
            except BackendError as error:
                asked.answer.set_exception(error)
                raise
            except Exception as error:  # it is the caller's
                asked.answer.set_exception(error)

    def _next_asked(self) -> _Asked | None:
        with self._changed:
            for asked in self._asked:
                if self._idle or not asked.needs_lane:
                    self._asked.remove(asked)
                    return asked
        return None

    def _start(self) -> None:
        """Branches that wait, on idle lanes: one that holds the same rows, if there is one."""
        while self._idle:
            with self._changed:
                if not self._waiting or any(each.needs_lane for each in self._asked):
                    return
                run, wanted, assignment = self._waiting.popleft()
            capsule = self._capsules.get(assignment.address)
            if capsule is None:
                self._emit(run, Absent(assignment.index, assignment.address))
                continue
            self._capsules.move_to_end(assignment.address)
            session = min(self._idle, key=lambda s: self._at.get(s) != assignment.address)
            began = time.perf_counter()
            try:
                generation = _begin(session, capsule, assignment, wanted)
            except BackendError:
                raise
            except FlashrtError as error:
                self._emit(run, _failed(assignment.index, error, began))
            except (TypeError, ValueError, OverflowError) as error:
                wrong = FleetError(f"branch {assignment.index} cannot begin: {error}")
                self._emit(run, _failed(assignment.index, wrong, began))
            else:
                self._idle.remove(session)
                self._at[session] = assignment.address
                live = _Live(run, wanted, assignment, capsule, session, generation, began)
                self._live.append(live)

    def _step(self) -> None:
        """The next token of every branch."""
        if len(self._live) > 1:
            step([live.generation for live in self._live])
        for live in list(self._live):
            try:
                if self._take(live):
                    self._finish(live)
            except BackendError:
                raise
            except FlashrtError as error:
                self._end(live, _failed(live.assignment.index, error, live.began, live))

    def _take(self, live: _Live) -> bool:
        """Its next token; whether it is over."""
        token = next(live.generation, None)
        if token is None:
            return True
        live.tokens.append(token)
        self._n_tokens += 1
        if live.wanted.logprobs:
            live.logprobs.append(live.session.logprobs()[0])
        if not live.generation.left:
            next(live.generation, None)  # it says why it ended
            return True
        every = live.wanted.boundary_every
        if every and len(live.tokens) % every == 0:
            self._pass(live)
        return False

    def _pass(self, live: _Live) -> None:
        """A boundary that outlives the worker, once its parcel is fetched."""
        try:
            capsule = self._with_room(live.session.snapshot)
        except PoolFull:
            return  # a loss costs more then
        try:
            parcel = pack(capsule, live.start)
        finally:
            capsule.drop()
        self._discard(live)
        self._parcels.setdefault(live.run, {})[parcel.digest] = parcel
        live.passed = parcel.digest
        tokens, logprobs = _arrays(live)
        index = live.assignment.index
        event = Passed(index, parcel.digest, parcel.position, tokens, logprobs)
        self._emit(live.run, event)

    def _finish(self, live: _Live) -> None:
        if live.wanted.keep:
            capsule = self._with_room(live.session.snapshot)
            parcel = pack(capsule, live.start)
            digest = parcel.digest
            self._parcels.setdefault(live.run, {})[digest] = parcel
            self._hold(digest, capsule)
        else:
            digest = live.session.digest()
        tokens, logprobs = _arrays(live)
        seconds = time.perf_counter() - live.began
        reason, position = live.generation.reason, live.session.position
        index = live.assignment.index
        self._end(live, Finished(index, tokens, logprobs, reason, digest, position, seconds, None))

    def _end(self, live: _Live, event: Finished) -> None:
        self._discard(live)
        self._vacate(live)
        self._n_branches += 1
        self._emit(live.run, event)

    def _discard(self, live: _Live) -> None:
        """The parcel of its last boundary, if nobody has fetched it."""
        if live.passed is not None:
            self._parcels.get(live.run, {}).pop(live.passed, None)

    def _vacate(self, live: _Live) -> None:
        live.generation.close()
        self._live.remove(live)
        self._idle.append(live.session)

    def _emit(self, run: str, event: Event) -> None:
        with self._changed:
            if run not in self._stopped:
                self._events.setdefault(run, []).append(event)
                self._changed.notify_all()

    # -- what was asked ---------------------------------------------------------------------------

    def _state(self) -> WorkerState:
        engine = self._engine
        return WorkerState(
            engine.fingerprint, os.getpid(), platform.node(), self._node, engine.device,
            len(engine.lanes), len(self._live), len(self._waiting), tuple(self._capsules),
            sum(map(len, self._parcels.values())),
            self._n_branches, self._n_tokens,
        )  # fmt: skip

    def _prefill(self, tokens: NDArray[np.int32]) -> str:
        session = self._idle[0]
        self._at.pop(session, None)
        session.rollback(0)
        session.prefill(tokens)
        capsule = self._with_room(session.snapshot)
        address = capsule.digest
        self._hold(address, capsule)
        return address

    def _install(self, parcels: tuple[Parcel | StoredParcel, ...]) -> Installed:
        came: dict[str, int] = {}
        for parcel in parcels:
            if parcel.digest in self._capsules:
                self._capsules.move_to_end(parcel.digest)
                continue
            if parcel.base is not None and parcel.base not in self._capsules:
                return Installed(came, parcel.base)
            capsule = self._unpacked(parcel)
            try:
                self._to_device(capsule, {p.digest for p in parcels})
            except PoolFull:
                pass  # restores read it where it came: slower, where a device has memory of its own
            else:
                if capsule.digest != parcel.digest:  # of the bytes that are on the device
                    capsule.drop()
                    raise CapsuleError(f"capsule {parcel.digest}: its state has another digest")
            self._hold(parcel.digest, capsule)
            came[parcel.digest] = parcel.nbytes
        return Installed(came)

    def _to_device(self, capsule: Capsule, kept: set[str]) -> None:
        self._with_room(lambda: capsule.to("device"), kept)

    def _unpacked(self, parcel: Parcel | StoredParcel) -> Capsule:
        if isinstance(parcel, StoredParcel):
            return self._need_store().load(self._engine, parcel.place)
        base = None if parcel.base is None else self._capsules[parcel.base]
        return unpack(parcel, self._engine.capsules, base, self._engine.admit)

    def _fetch(self, address: str, run: str) -> tuple[Parcel | None, int]:
        parcel = self._parcels.get(run, {}).pop(address, None)
        if parcel is None and address in self._capsules:
            parcel = pack(self._capsules[address])
        return parcel, 0 if parcel is None else parcel.nbytes

    def _publish(self, address: str) -> StoredParcel:
        capsule = self._capsules[address]
        return stored(self._need_store(), self._need_store().save(capsule).place)

    def _need_store(self) -> Store:
        if self._store is None:
            raise StoreError("the fleet has no store; give it one: Fleet(..., store=URL)")
        return self._store

    def _forget(self, addresses: list[str]) -> None:
        used = self._used()
        for address in addresses:
            if address not in used and (capsule := self._capsules.pop(address, None)):
                capsule.drop()

    def _leave(self, run: str) -> None:
        for live in [live for live in self._live if live.run == run]:
            self._vacate(live)
        self._parcels.pop(run, None)
        with self._changed:
            self._events.pop(run, None)

    def _hold(self, address: str, capsule: Capsule) -> None:
        if address in self._capsules:  # the same state by another way
            capsule.drop()
        else:
            self._capsules[address] = capsule
        self._capsules.move_to_end(address)

    def _used(self) -> set[str]:
        """Addresses that branches on lanes began at, or that wait to."""
        with self._changed:
            waiting = {assignment.address for _, _, assignment in self._waiting}
        return waiting | {live.assignment.address for live in self._live}

    def _with_room(self, take: Callable[[], _R], kept: Collection[str] = ()) -> _R:
        """`take()`, capsules that no branch needs giving way, least recently used first, but for
        those that are `kept`.
        """
        while True:
            try:
                return take()
            except PoolFull:
                used = self._used() | set(kept)
                spare = next((a for a in self._capsules if a not in used), None)
                if spare is None:
                    raise
                self._capsules.pop(spare).drop()


def stored(store: Store, place: Place) -> StoredParcel:
    """What a worker needs to load a capsule of a store."""
    found = store.manifest(place)
    nbytes = sum(ref.nbytes for ref in found.objects)
    return StoredParcel(found.digest, found.position, place, nbytes)


def _begin(
    session: Session, capsule: Capsule, assignment: Assignment, wanted: Wanted
) -> Generation:
    branch = assignment.branch
    session.restore(capsule)
    if len(branch.suffix):
        session.prefill(branch.suffix)
    return session.generate(
        branch.max_tokens, branch.temperature, branch.top_k, branch.top_p, branch.seed,
        branch.stop, wanted.draft, min_p=branch.min_p,
        repetition_penalty=branch.repetition_penalty, presence_penalty=branch.presence_penalty,
        frequency_penalty=branch.frequency_penalty, logit_bias=branch.logit_bias,
    )  # fmt: skip


def _arrays(live: _Live) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    return np.array(live.tokens, np.int32), np.array(live.logprobs, np.float64)


def _failed(index: int, error: FlashrtError, began: float, live: _Live | None = None) -> Finished:
    tokens, logprobs = (np.empty(0, np.int32), _NO_LOGPROBS) if live is None else _arrays(live)
    position = 0 if live is None else live.session.position
    seconds = time.perf_counter() - began
    return Finished(index, tokens, logprobs, None, None, position, seconds, error)
