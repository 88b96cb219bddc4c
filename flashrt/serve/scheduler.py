"""The scheduler: one thread that owns the engine, and gives its lanes to requests.

IS: the loop of steps, and the way of a request through them from its prompt to its end. IS NOT:
what can be carried out, and where (admission), which boundaries are known (prefix), who is next
(queue), trees of sessions (sessions).

A lane is a worker: it takes a request, goes to the deepest known boundary of its prompt, is fed the
rest, generates, and leaves capsules: where the last turn of the prompt starts, and at the end.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from flashrt.base.errors import (
    BackendError,
    CapsuleError,
    FlashrtError,
    PoolFull,
)
from flashrt.base.tracing import PLAN, trace
from flashrt.capsule.capsule import Capsule
from flashrt.models.model import STEP_ROWS
from flashrt.serve.admission import Admission, sampling_of
from flashrt.serve.ask import (
    Ask,
    Closing,
    NoSlot,
    QueueFull,
    Reason,
    Ticket,
    TimedOut,
    TokenLogprobs,
)
from flashrt.serve.meters import Meters, TurnTiming
from flashrt.serve.pace import Pace
from flashrt.serve.prefix import Entry, PrefixIndex, owner_key
from flashrt.serve.queue import OLDEST_EVERY, FairQueue
from flashrt.serve.work import Asked, Choice, Ends, LaneStatus, Left, Limits, Worker
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Generation
from flashrt.session.together import Feed, step
from flashrt.store.reuse import Rates

_T = TypeVar("_T")
FIRST_GUESS_S = 1.0  # of the time that a request has a lane, until some were measured
NEWEST = 0.1  # weight of the newest such time
PATIENCE_S = 0.5  # an idle loop looks around this often


class Scheduler:
    """See the module. `submit`, `call`, `lanes` and `close` are for other threads."""

    def __init__(
        self, engine: SessionEngine, index: PrefixIndex, limits: Limits, ends: Ends, rates: Rates
    ) -> None:
        """Takes all free lanes of the engine. Raises LaneBusy when there is none."""
        self.engine, self.index, self.limits, self.ends = engine, index, limits, ends
        self.meters = Meters()
        self._admission = Admission(engine, index, limits, rates)
        self.workers = [Worker(engine.session()) for _ in range(max(1, len(engine.free_lanes)))]
        self._lock = threading.Condition()
        self._queue: FairQueue[Choice] = FairQueue()
        self._calls: deque[Callable[[], object]] = deque()
        self._is_closing = False
        self._has_ended = False
        self._stop_at = math.inf
        self._busy_s = FIRST_GUESS_S
        self._rotation = 0
        self._pace = Pace(limits.itl_s)
        self._n_fed = 0  # steps that fed prompts
        self._unended = 0  # choices whose state is being kept
        self._thread = threading.Thread(target=self._loop, name="flashrt-scheduler", daemon=True)

    # -- for other threads ----------------------------------------------------------------------

    def start(self) -> None:
        """Begin to carry out requests."""
        self._thread.start()

    def submit(self, ask: Ask) -> Ticket:
        """Take a request. Raises QueueFull, Closing, and SessionError or TokenError for one that
        cannot be carried out.
        """
        tokens = self._admission.checked(ask)
        now = time.monotonic()
        deadline = math.inf if ask.timeout_s is None else now + ask.timeout_s
        asked = Asked(
            ask, owner_key(ask.owner), tokens, now, deadline, Ticket(self._wake), time.time()
        )
        with self._lock:
            self._check_room(asked)
            self.ends.begin(asked)
            self.meters.asks += 1
            self._queue.push(asked.owner, ask.priority, Choice(asked, 0))
            self._lock.notify()
        return asked.ticket

    def call(self, work: Callable[[], _T]) -> Future[_T]:
        """`work()` in the scheduler's thread, between two steps."""
        future: Future[_T] = Future()
        if not self.post(lambda: _settle(future, work)):
            future.set_exception(Closing("the server has shut down"))
        return future

    def when_idle(self, lane: int, work: Callable[[Worker], _T]) -> Future[_T]:
        """`work(worker)` in the scheduler's thread, between two requests of a lane: at once if it
        is idle, else when its request has ended. Raises, through the future, NoSlot, Closing.
        """
        future: Future[_T] = Future()

        def wait() -> None:
            found = [w for w in self.workers if w.session.lane.index == lane]
            if found:
                found[0].waiting.append(lambda: _settle(future, lambda: work(found[0])))
            else:
                there = ", ".join(str(w.session.lane.index) for w in self.workers)
                future.set_exception(NoSlot(f"there is no slot {lane}; there are {there}"))

        if not self.post(wait):
            future.set_exception(Closing("the server has shut down"))
        return future

    def post(self, work: Callable[[], object]) -> bool:
        """The same without an answer; `work` does not raise. False once the loop has ended."""
        with self._lock:
            if self._has_ended:
                return False
            self._calls.append(work)
            self._lock.notify()
            return True

    def queue_lengths(self) -> dict[str, int]:
        """Choices that wait, by owner's key."""
        with self._lock:
            return self._queue.lengths()

    def lanes(self) -> list[LaneStatus]:
        """What each does just now."""
        found = []
        for worker in self.workers:
            choice, lane = worker.choice, worker.session.lane
            asked = choice.asked if choice else None
            found.append(
                LaneStatus(
                    lane.index, worker.state, worker.owner, lane.position,
                    asked.ask.session if asked else None,
                    len(asked.tokens) if asked else 0,
                    choice.n_tokens if choice else 0,
                )
            )  # fmt: skip
        return found

    def close(self, *, drain: bool = True) -> None:
        """Take nothing more; fail what waits; let run what runs, for `limits.drain_s` at most."""
        with self._lock:
            self._is_closing = True
            self._stop_at = time.monotonic() + (self.limits.drain_s if drain else 0.0)
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()
        for worker in self.workers:
            worker.session.close()

    # -- admission ------------------------------------------------------------------------------

    def _check_room(self, asked: Asked) -> None:
        if self._is_closing:
            raise Closing("the server is shutting down; send the request again later")
        n, own, limits = len(self._queue), self._queue.length(asked.owner), self.limits
        if n >= limits.queue or own >= limits.queue_per_owner:
            self.meters.refused += 1
            whose = f"{n} requests wait" if n >= limits.queue else f"{own} of your requests wait"
            wait_s = max(1.0, self._busy_s * n / len(self.workers))
            raise QueueFull(f"{whose}; try again in {wait_s:.0f} s", wait_s)

    def _wake(self, _: Ticket) -> None:
        with self._lock:
            self._lock.notify()

    # -- the loop -------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._go_on():
            try:
                self._reap()
                self._attend()
                self._admit()
                self._step()
            except Exception as error:  # ours: whoever runs is told, others are served
                trace(PLAN, f"scheduler: {error!r}")
                failed = BackendError(f"the server failed in a step: {error!r}")
                told = error if isinstance(error, FlashrtError) else failed
                try:
                    for asked in self._running():
                        self._fail(asked, told)
                except Exception as worse:  # as of an engine that somebody closed
                    self._die(worse)
                    return

    def _die(self, error: Exception) -> None:
        """The engine cannot be used: everybody is told, and nothing more is taken."""
        with self._lock:
            self._is_closing = self._has_ended = True
            waiting = [choice.asked for choice in self._queue.remove(lambda _: True)]
            calls, self._calls = list(self._calls), deque()
        told = BackendError(f"the server cannot go on: {error!r}")
        running = self._running()
        for worker in self.workers:
            worker.choice = None
            calls += worker.waiting
        for asked in dict.fromkeys([*running, *waiting]):
            if not asked.is_over:
                self._fail(asked, told)
        for work in calls:
            work()

    def _go_on(self) -> bool:
        """Carry out calls; wait while there is nothing else to do. False at the end."""
        while True:
            with self._lock:
                calls, self._calls = list(self._calls), deque()
                is_idle = not calls and not self._has_work()
                if is_idle:
                    if self._is_closing and not self._unended:
                        self._has_ended = True
                        return False
                    self._lock.wait(PATIENCE_S)
            for work in calls:
                work()
            if not is_idle:
                return True

    def _has_work(self) -> bool:
        return len(self._queue) > 0 or any(w.choice or w.waiting for w in self.workers)

    def _running(self) -> list[Asked]:
        found = (worker.choice.asked for worker in self.workers if worker.choice)
        return list(dict.fromkeys(found))

    def _reap(self) -> None:
        """Requests that were cancelled, that waited for too long, or that will not come to it."""
        now = time.monotonic()
        with self._lock:
            gone = self._queue.remove(
                lambda c: (
                    c.asked.is_over
                    or c.asked.ticket.is_cancelled
                    or now >= c.asked.deadline
                    or (self._is_closing and not c.asked.has_begun)
                )
            )
        for choice in gone:
            asked = choice.asked
            if asked.is_over:
                continue
            if asked.ticket.is_cancelled:
                self._end_waiting(choice, "cancelled")
            elif asked.has_begun:
                self._end_waiting(choice, "timeout")
            elif now >= asked.deadline:
                self.meters.timed_out += 1
                waited = f"{now - asked.submitted:.1f} s"
                self._fail(
                    asked, TimedOut(f"the request waited for {waited}, and no lane was free")
                )
            else:
                self._fail(asked, Closing("the server is shutting down; send it again later"))
        for worker in self.workers:
            choice_ = worker.choice
            if choice_ is None or choice_.reason is not None:
                continue
            asked = choice_.asked
            if asked.ticket.is_cancelled or asked.is_deaf or now >= self._stop_at:
                self._end(worker, "cancelled")
                self._maybe_leave(worker)
            elif now >= asked.deadline:
                self._end(worker, "timeout")
                self._maybe_leave(worker)

    def _end_waiting(self, choice: Choice, reason: Reason) -> None:
        """A choice that has no lane."""
        if choice.index == 0:
            for index in range(choice.asked.ask.n):
                self._told_end(choice.asked, index, reason, None)
        else:
            self._told_end(choice.asked, choice.index, reason, None)

    def _attend(self) -> None:
        """What waited for lanes that are idle now."""
        for worker in self.workers:
            while worker.choice is None and worker.waiting:
                worker.waiting.popleft()()

    def _admit(self) -> None:
        while free := [worker for worker in self.workers if worker.choice is None]:
            lanes_of = Counter(w.choice.asked.owner for w in self.workers if w.choice)
            with self._lock:
                choice = self._queue.pop(lanes_of)
            if choice is None:
                return
            try:
                self._begin(choice, free)
            except FlashrtError as error:
                self._fail(choice.asked, error)

    def _begin(self, choice: Choice, free: list[Worker]) -> None:
        """A lane goes to the deepest known boundary of the prompt."""
        asked, now = choice.asked, time.monotonic()
        worker, decision = self._admission.placed(asked, free)
        worker.choice, worker.owner, worker.used = choice, asked.owner, now
        session, n = worker.session, len(asked.tokens)
        at = session.lane.position
        if not asked.has_begun:
            asked.has_begun, asked.began = True, now
            asked.cached, asked.action = at, str(decision.action)
            self.meters.wait.add(now - asked.submitted)
            self.meters.prompt_tokens += n
            self.meters.cached_tokens += at
            self._tell(asked, lambda: asked.ask.sink.began(n, at))
        start = max((p for p in asked.ask.turn_starts if p > 0), default=0)
        choice.stops = [p for p in sorted({start, n}) if p > at]
        if choice.index == 0 and at == start > 0:
            asked.start = self._known(asked, start)
        if not choice.stops:
            self._prompt_done(worker)

    def _known(self, asked: Asked, position: int) -> Entry | None:
        """The entry at exactly a position of the prompt."""
        found = self.index.find(asked.owner, asked.tokens[:position])
        return found[0] if found and found[0].position == position else None

    # -- steps ----------------------------------------------------------------------------------

    def _step(self) -> None:
        """One replay for all that can share it, then what follows from it."""
        active = [worker for worker in self.workers if worker.choice is not None]
        if not active:
            return
        self.meters.steps += 1
        turn = self._rotation % len(active)
        self._rotation += 1
        active = active[turn:] + active[:turn]
        feeding = self._feeding(active)
        if len(feeding) == len(active):
            self._prefill(feeding[0])
            return
        going = [w for w in active if w.state != "prompt"]
        most = self.engine.most_together
        going = going[: max(1, most - bool(feeding))]
        room = STEP_ROWS - len(going)
        if feeding and any(w.state == "decode" for w in going):
            room = self._pace.rows(len(going), room)
        self._step_together(going, self._pieces(feeding[: most - len(going)], room))

    def _feeding(self, active: list[Worker]) -> list[Worker]:
        """Those that are in their prompts, whose rows come first: who has the least left, so that
        a short prompt does not wait for long ones; one time in OLDEST_EVERY the oldest, so that
        none starves.
        """

        def left(worker: Worker) -> int:
            return len(self._choice(worker).asked.tokens) - worker.session.position

        found = sorted((w for w in active if w.state == "prompt"), key=left)
        self._n_fed += bool(found)
        if found and self._n_fed % OLDEST_EVERY == 0:
            oldest = min(found, key=lambda w: self._choice(w).asked.began)
            found.remove(oldest)
            found.insert(0, oldest)
        return found

    def _prefill(self, worker: Worker) -> None:
        """A whole launch of one prompt: nobody decodes meanwhile."""
        choice = self._choice(worker)
        session = worker.session
        at = session.position
        n = min(self.engine.model.buckets[-1], choice.stops[0] - at)
        try:
            session.prefill(choice.asked.tokens[at : at + n])
            self._fed(worker)
        except FlashrtError as error:
            self._fail(choice.asked, error)

    def _pieces(self, feeding: list[Worker], room: int) -> list[tuple[Worker, int]]:
        """How many tokens each is fed: the first as many as there is room for, what it does not
        need goes to the next.
        """
        pieces = []
        for worker in feeding:
            session = worker.session
            pending = session.position - session.lane.position
            n = min(self._choice(worker).stops[0] - session.position, room - pending)
            if n > 0:
                pieces.append((worker, n))
                room -= n + pending
        return pieces

    def _step_together(self, going: list[Worker], pieces: list[tuple[Worker, int]]) -> None:
        began, feeds = time.monotonic(), []
        for worker, n in pieces:
            choice, session = self._choice(worker), worker.session
            at, asked = session.position, choice.asked
            if at + n == len(asked.tokens) and at and asked.ask.max_tokens:
                choice.generation = self._generation(worker)
                if choice.generation is None:
                    continue
            then = choice.generation.params if choice.generation is not None else None
            feeds.append(Feed(session, asked.tokens[at : at + n], then))
        decoding = []
        for worker in going:
            choice = self._choice(worker)
            if choice.reason is not None:  # its last token is to be state
                feeds.append(Feed(worker.session, _NO_TOKENS))
            elif choice.generation is not None:
                decoding.append(choice.generation)
        step(decoding, feeds)
        for worker in going:
            choice_ = worker.choice
            if choice_ is not None and choice_.reason is None:
                self._take(worker)
        self._pace.note(len(going), sum(n for _, n in pieces), time.monotonic() - began)
        for worker, _ in pieces:
            if worker.choice is not None:
                self._fed(worker)
        for worker in going:
            if worker.state == "end":
                self._maybe_leave(worker)

    def _fed(self, worker: Worker) -> None:
        """A piece of its prompt is state."""
        choice = self._choice(worker)
        asked, position = choice.asked, worker.session.position
        if not choice.stops or position < choice.stops[0]:
            return
        choice.stops.pop(0)
        start = max((p for p in asked.ask.turn_starts if p > 0), default=0)
        if position == start:
            entry = self._capsule(worker)
            if choice.index == 0:
                asked.start = entry
        if not choice.stops:
            self._prompt_done(worker)

    def _prompt_done(self, worker: Worker) -> None:
        choice = self._choice(worker)
        asked = choice.asked
        if choice.index == 0 and asked.ask.n > 1:
            asked.prompt = self._capsule(worker)
            if asked.prompt is not None:
                self.index.hold(asked.prompt, f"ask {id(asked)}")
            with self._lock:
                for index in range(asked.ask.n - 1, 0, -1):
                    fork = Choice(asked, index)
                    self._queue.push(asked.owner, asked.ask.priority, fork, is_next=True)
        if not asked.ask.max_tokens:
            self._end(worker, "length")
            self._maybe_leave(worker)
        elif choice.generation is None:
            choice.generation = self._generation(worker)

    def _generation(self, worker: Worker) -> Generation | None:
        """None where the request failed for it."""
        choice = self._choice(worker)
        ask = choice.asked.ask
        room = self.engine.max_positions - len(ask.tokens)
        try:
            return worker.session.generate(
                min(ask.max_tokens, room + 1),
                stop=ask.stop_tokens,
                **sampling_of(ask, choice.index),
            )
        except FlashrtError as error:
            self._fail(choice.asked, error)
            return None

    def _take(self, worker: Worker) -> None:
        """The token that the step gave."""
        choice = self._choice(worker)
        asked, generation = choice.asked, choice.generation
        assert generation is not None
        told, noted = asked.ask.logprobs, self.limits.noted
        logprobs = None
        try:
            token = next(generation)
            if told is not None or noted is not None:
                session = worker.session
                logprob, top = session.logprobs(max(told or 0, noted or 0))
                choice.logprobs.append((session.position - 1, TokenLogprobs(logprob, tuple(top))))
                if told is not None:
                    logprobs = TokenLogprobs(logprob, tuple(top[:told]))
        except StopIteration:
            reason = generation.reason
            assert reason is not None, "neither closed nor failed"
            self._end(worker, reason)
            return
        except FlashrtError as error:
            self._fail(asked, error)
            return
        now = time.monotonic()
        choice.n_tokens += 1
        asked.n_generated += 1
        self.meters.generated_tokens += 1
        if asked.first_token is None:
            asked.first_token = now
            self.meters.first_token.add(now - asked.submitted)
        elif choice.last_token:
            self.meters.next_token.add(now - choice.last_token)
        choice.last_token = now
        sink, index = asked.ask.sink, choice.index
        goes_on = self._tell(asked, lambda: sink.token(index, token, logprobs))
        if goes_on is False:
            self._end(worker, "stop")
        elif not generation.left and next(generation, None) is None:  # it tells why, at no cost
            self._end(worker, generation.reason or "length")

    # -- ends -----------------------------------------------------------------------------------

    def _end(self, worker: Worker, reason: Reason) -> None:
        """Nothing more is generated; the state is to be kept."""
        choice = self._choice(worker)
        if choice.generation is not None:
            choice.generation.close()
        choice.reason = reason

    def _maybe_leave(self, worker: Worker) -> None:
        """It leaves unless the last token is to be fed yet, and the next step can do that."""
        generation = self._choice(worker).generation
        is_alone = sum(w.choice is not None for w in self.workers) == 1
        n_pending = worker.session.position - worker.session.lane.position
        has_drafts = generation is not None and bool(generation.draft.draft)
        if is_alone or not n_pending or has_drafts:
            self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        """A capsule of the end; the lane is free."""
        choice = self._choice(worker)
        asked, reason = choice.asked, choice.reason
        assert reason is not None
        tokens = worker.session.tokens
        is_prompt = len(tokens) >= len(asked.tokens)
        end = self._capsule(worker)
        self._free(worker)
        left = Left(choice.index, reason, tokens, end, asked.start, tuple(choice.logprobs))
        if not is_prompt:  # in the midst of its prompt: worth trying again from, but no turn
            self._told_end(asked, choice.index, reason, None)
            for index in range(1, asked.ask.n) if choice.index == 0 else ():
                self._told_end(asked, index, reason, None)
            return
        self._unended += 1

        def tell(node: str | None) -> None:
            self._unended -= 1
            self._told_end(asked, left.index, left.reason, node)

        try:
            self.ends.leave(asked, left, tell)
        except FlashrtError as error:
            self._unended -= 1
            self._fail(asked, error)

    def _capsule(self, worker: Worker) -> Entry | None:
        """An entry of the lane's state; None when there is no room: then only speed is lost."""
        session, asked = worker.session, self._choice(worker).asked
        if not session.position:
            return None
        try:
            self.index.make_room_for(session.lane)
            capsule: Capsule = session.snapshot()
        except (PoolFull, CapsuleError) as error:
            trace(PLAN, f"no capsule at {session.position}: {error}")
            return None
        entry = self.index.add(asked.owner, capsule)
        asked.made.append(entry)
        return entry

    def _told_end(self, asked: Asked, index: int, reason: Reason, node: str | None) -> None:
        if asked.is_over:
            return
        asked.n_ended += 1
        if asked.n_ended == asked.ask.n:
            self._over(asked, reason)  # first: whoever is told may submit the next turn at once
        self._tell(asked, lambda: asked.ask.sink.ended(index, reason, node))

    def _fail(self, asked: Asked, error: FlashrtError) -> None:
        """It fails alone: its lanes are not to be gone on from, what it made is not to be used."""
        if asked.is_over:
            return
        try:
            for worker in self.workers:
                if worker.choice is not None and worker.choice.asked is asked:
                    self._void(worker)
            for entry in asked.made:
                if not entry.holders - {f"ask {id(asked)}"} and entry.queue is not None:
                    self.index.forget(entry)
        finally:
            self.meters.failed += 1
            self._over(asked, "failed")
            self._tell(asked, lambda: asked.ask.sink.failed(error))

    def _void(self, worker: Worker) -> None:
        """Nobody knows what its lane holds: nothing of it may be used."""
        generation, lane = self._choice(worker).generation, worker.session.lane
        self._free(worker)
        worker.owner = None
        if generation is not None:
            generation.close()
        self.engine.poison_lane(lane)
        self.engine.capsules.reset(lane)

    def _over(self, asked: Asked, reason: str) -> None:
        asked.is_over = True
        if asked.prompt is not None and asked.prompt.queue is not None:
            self.index.release(asked.prompt, f"ask {id(asked)}")
        now = time.monotonic()
        self.meters.cancelled += reason == "cancelled"
        if reason == "timeout":
            self.meters.timed_out += 1
        if asked.has_begun:
            self._busy_s += NEWEST * (now - asked.began - self._busy_s)
        first = None if asked.first_token is None else asked.first_token - asked.submitted
        self.meters.turns.append(
            TurnTiming(
                time.time(), asked.owner, asked.ask.session, asked.action, reason,
                len(asked.tokens), asked.cached, asked.n_generated,
                max(0.0, asked.began - asked.submitted), first, now - asked.submitted,
            )
        )  # fmt: skip
        self.ends.over(asked)

    def _free(self, worker: Worker) -> None:
        worker.choice = None
        worker.used = time.monotonic()

    def _tell(self, asked: Asked, what: Callable[[], _T]) -> _T | None:
        """Call the sink; one that raises is told nothing more, and its request ends."""
        if asked.is_deaf:
            return None
        try:
            return what()
        except Exception as error:
            trace(PLAN, f"a sink raised: {error!r}")
            asked.is_deaf = True
            return None

    def _choice(self, worker: Worker) -> Choice:
        assert worker.choice is not None, "asked of workers that have one"
        return worker.choice


def _settle(future: Future[_T], work: Callable[[], _T]) -> None:
    """Give a future what `work` returns or raises, unless nobody waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


_NO_TOKENS = np.empty(0, np.int32)
