"""A run: one call of `Fleet.rollouts`, from its branches to their results.

IS: what is sent where and when, what comes back, in which order it is handed out, and what becomes
of the branches of a worker that died. IS NOT: the rule of placement, or actors (member).

All of it happens in the event loop of whoever iterates: a task per worker listens, another sends.
A branch is in the books of one worker from when it is placed until its result is known; when that
worker is lost, whatever is in its books is placed again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import FlashrtError, FleetError
from flashrt.base.tracing import PLAN, trace
from flashrt.fleet.branch import Branch, Progress, Rollout, Trunk
from flashrt.fleet.member import BytesLost, Incarnation, Member, WorkerLost
from flashrt.fleet.message import Absent, Assignment, Finished, Passed, Wanted
from flashrt.fleet.placement import Seat, choose

_POLL_S = 2.0  # a listener asks again after that
_STOP_S = 10.0  # that a worker is waited for, at the end
_SUSPECT = 2  # losses after which a branch has a worker to itself: who else dies with it is spared
_QUEUED = 2  # branches per lane that a worker is given: one on it, one that waits


class _Boundary(NamedTuple):
    """Where a branch can go on from."""

    trunk: Trunk
    tokens: NDArray[np.int32]  # since the beginning of the branch
    logprobs: NDArray[np.float64]


@dataclass(slots=True, eq=False)
class _Pending:
    """A branch that is not over."""

    index: int
    branch: Branch
    start: Trunk
    losses: int = 0
    boundary: _Boundary | None = None
    begun: _Boundary | None = None  # that it was last sent with

    @property
    def trunk(self) -> Trunk:
        """Where it begins when it is sent now."""
        return self.start if self.boundary is None else self.boundary.trunk

    def assignment(self) -> Assignment:
        """For a worker, from here on."""
        self.begun = self.boundary
        branch = replace(self.branch, start=None)
        if self.begun is not None:
            left = branch.max_tokens - len(self.begun.tokens)
            branch = replace(branch, suffix=(), max_tokens=left)
        return Assignment(self.index, self.trunk.address, branch)

    def joined(
        self, tokens: NDArray[np.int32], logprobs: NDArray[np.float64]
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """What it has now, from what it has since it was sent."""
        if self.begun is None:
            return tokens, logprobs
        before = self.begun
        return np.append(before.tokens, tokens), np.append(before.logprobs, logprobs)


@dataclass(slots=True, eq=False)
class _Place:
    """The books of one worker."""

    member: Member
    actor: Incarnation
    n_lanes: int
    pending: dict[int, _Pending] = field(default_factory=dict)  # placed and not over
    outgoing: list[_Pending] = field(default_factory=list)  # of those: not sent yet
    is_up: bool = True
    is_out: bool = False  # it cannot be started again
    is_alone: bool = False
    sender: asyncio.Task[None] | None = None

    def seat(self, address: str) -> Seat:
        """As a branch sees it that begins there."""
        is_coming = any(p.trunk.address == address for p in self.outgoing)
        has_capsule = is_coming or address in self.actor.holds
        most = _QUEUED * self.n_lanes
        index, load = self.member.index, len(self.pending)
        return Seat(index, self.n_lanes, load, most, has_capsule, self.is_alone)


class Run:
    """See the module."""

    def __init__(
        self,
        name: str,
        members: Sequence[Member],
        n_lanes: int,
        trunk: Trunk,
        branches: Iterable[Branch],
        wanted: Wanted,
        *,
        is_ordered: bool,
        in_flight: int,
        retries: int,
        progress: Callable[[Progress], object] | None,
        made: Callable[[Trunk], Trunk],
    ) -> None:
        """`made`: is told of every trunk that comes to be, and returns the one to be used."""
        self._name, self._trunk, self._wanted = name, trunk, wanted
        self._places = [_Place(m, m.present, n_lanes, is_up=not m.is_lost) for m in members]
        self._branches: Iterator[tuple[int, Branch]] = enumerate(branches)
        self._total = len(branches) if isinstance(branches, Sized) else None
        self._is_ordered, self._in_flight, self._retries = is_ordered, in_flight, retries
        self._tell, self._made = progress, made
        self._again: deque[_Pending] = deque()  # to be placed before others
        self._out: asyncio.Queue[Rollout | BaseException] = asyncio.Queue()
        self._held: dict[int, Rollout] = {}  # that wait for their turn
        self._turn = 0
        self._n_open = 0  # branches taken, less results handed out
        self._is_exhausted = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._done = self._failed = self._n_tokens = self._losses = 0

    async def results(self) -> AsyncGenerator[Rollout, None]:
        """All results. Closing it, or a cancellation, stops the branches within a step."""
        try:
            for place in self._places:
                self._spawn(self._listen(place))
            self._dispatch()
            while self._n_open or not self._is_exhausted:
                found = await self._out.get()
                if isinstance(found, BaseException):
                    raise found
                self._n_open -= 1
                self._dispatch()
                self._report(found)
                yield found
        finally:
            await self._end()

    # -- placing ----------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Place branches while there is room, on workers and among the results."""
        while (pending := self._next()) is not None:
            alone = pending.losses >= _SUSPECT
            places = [p for p in self._places if p.is_up]
            index = choose((p.seat(pending.trunk.address) for p in places), alone)
            if index is None:
                self._again.appendleft(pending)
                return
            place = next(p for p in places if p.member.index == index)
            place.is_alone = alone
            place.pending[pending.index] = pending
            place.outgoing.append(pending)
            if place.sender is None or place.sender.done():
                place.sender = self._spawn(self._send(place))

    def _next(self) -> _Pending | None:
        if self._again:
            return self._again.popleft()
        if self._is_exhausted or self._n_open >= self._in_flight:
            return None
        try:
            index, branch = next(self._branches)
        except StopIteration:
            self._is_exhausted = True
            return None
        self._n_open += 1
        return _Pending(index, branch, branch.start or self._trunk)

    async def _send(self, place: _Place) -> None:
        """What was placed on a worker, with the capsules that it does not have yet."""
        while place.outgoing:
            actor, batch = place.actor, place.outgoing
            place.outgoing = []
            by_trunk: dict[str, list[_Pending]] = {}
            for pending in batch:
                by_trunk.setdefault(pending.trunk.address, []).append(pending)
            for several in by_trunk.values():
                try:
                    await _install(actor, several[0].trunk)
                    mine = [p for p in several if place.pending.get(p.index) is p]
                    if place.actor is not actor or not mine:
                        continue  # lost meanwhile, and taken back
                    assignments = [p.assignment() for p in mine]
                    await actor.call("submit", self._name, self._wanted, assignments)
                except WorkerLost:
                    await self._recover(place, actor)
                    break  # the rest of the batch was taken back too
                except BytesLost as error:
                    self._without_start(place, several, error)
                except FlashrtError as error:
                    for pending in several:
                        self._give_up(place, pending, error)

    def _without_start(self, place: _Place, several: Sequence[_Pending], error: BytesLost) -> None:
        """The bytes that these branches begin at are gone: a boundary's, or a kept end's."""
        for pending in several:
            if pending.boundary is not None:
                pending.boundary = None
                self._take_back(place, pending)
            else:
                self._give_up(place, pending, FleetError(
                    f"branch {pending.index} (seed {pending.branch.seed}): the state that it "
                    f"begins at, {pending.start.address}, went with the machine that kept it: "
                    f"{error}"
                ))  # fmt: skip
        self._dispatch()

    # -- listening --------------------------------------------------------------------------------

    async def _listen(self, place: _Place) -> None:
        while not place.is_out:
            actor = place.actor
            if not place.is_up:
                await self._recover(place, actor)
                continue
            try:
                events = await actor.call("collect", self._name, _POLL_S)
            except WorkerLost:
                await self._recover(place, actor)
                continue
            for event in events:
                pending = place.pending.get(event.index)
                if pending is None or place.actor is not actor:
                    continue
                if isinstance(event, Absent):
                    actor.holds.discard(event.address)
                    self._take_back(place, pending)
                elif isinstance(event, Passed):
                    self._spawn(self._note_boundary(place, pending, event))
                elif self._wanted.keep and event.error is None:
                    self._spawn(self._keep(place, pending, event))
                else:
                    self._finish(place, pending, event, None)
            self._dispatch()

    async def _note_boundary(self, place: _Place, pending: _Pending, event: Passed) -> None:
        """Its parcel leaves the worker; once it has, the branch can go on from there."""
        actor, begun = place.actor, pending.begun
        try:
            trunk = await self._fetched(actor, pending, event.address, event.position)
        except (WorkerLost, BytesLost):
            return  # the listener finds out; the boundary before is as good
        is_at_work = place.pending.get(pending.index) is pending and pending.begun is begun
        if trunk is not None and is_at_work:
            pending.boundary = _Boundary(trunk, *pending.joined(event.tokens, event.logprobs))

    async def _keep(self, place: _Place, pending: _Pending, event: Finished) -> None:
        """A result is one when its end can outlive the worker."""
        assert event.digest is not None, "it ended well"
        actor = place.actor
        try:
            trunk = await self._fetched(actor, pending, event.digest, event.position)
        except (WorkerLost, BytesLost):
            await self._recover(place, actor)
            return
        if place.pending.get(pending.index) is not pending:
            return
        if trunk is None:  # gone before it was fetched: the same bits once more
            self._take_back(place, pending)
        else:
            actor.holds.add(event.digest)
            self._finish(place, pending, event, trunk)
        self._dispatch()

    async def _fetched(
        self, actor: Incarnation, pending: _Pending, address: str, position: int
    ) -> Trunk | None:
        base = pending.start if pending.begun is None else pending.begun.trunk
        parcel, nbytes = await actor.fetch(address, self._name)
        return self._made(Trunk(address, position, nbytes, parcel, base)) if nbytes else None

    # -- losses -----------------------------------------------------------------------------------

    async def _recover(self, place: _Place, actor: Incarnation) -> None:
        """A worker is lost: its branches go elsewhere, or wait for the actor in its place. If none
        can be started, the others go on without; the last one raises why.
        """
        if place.actor is actor and place.is_up:
            place.is_up, place.is_alone = False, False
            self._losses += 1
            lost, place.pending, place.outgoing = place.pending, {}, []
            for pending in sorted(lost.values(), key=lambda p: -p.index):
                pending.losses += 1
                if pending.losses > self._retries:
                    self._hand_out(self._lost_for_good(place, pending))
                else:
                    self._again.appendleft(pending)
            self._dispatch()
        try:
            await place.member.revive(actor)
        except FlashrtError as error:
            place.is_out = True
            if all(p.is_out for p in self._places):
                raise
            trace(PLAN, f"worker {place.member.index} is left out: {error}")
            return
        if place.actor is actor:
            place.actor, place.is_up = place.member.present, True
            self._dispatch()

    def _lost_for_good(self, place: _Place, pending: _Pending) -> Rollout:
        error = FleetError(
            f"branch {pending.index} (seed {pending.branch.seed}): {pending.losses} workers died "
            f"with it, the last one worker {place.member.index}; it may be what kills them; "
            f"retries={self._retries} is the limit"
        )
        return self._rollout(place, pending, None, error, None)

    def _take_back(self, place: _Place, pending: _Pending) -> None:
        """To be placed again; nobody is to blame."""
        place.is_alone = False
        del place.pending[pending.index]
        self._again.appendleft(pending)

    # -- results ----------------------------------------------------------------------------------

    def _finish(self, place: _Place, pending: _Pending, event: Finished, end: Trunk | None) -> None:
        del place.pending[pending.index]
        place.is_alone = False
        self._hand_out(self._rollout(place, pending, event, event.error, end))

    def _give_up(self, place: _Place, pending: _Pending, error: FlashrtError) -> None:
        if place.pending.pop(pending.index, None) is pending:
            place.is_alone = False
            self._hand_out(self._rollout(place, pending, None, error, None))
            self._dispatch()

    def _rollout(
        self,
        place: _Place,
        pending: _Pending,
        event: Finished | None,
        error: FlashrtError | None,
        end: Trunk | None,
    ) -> Rollout:
        if event is not None:
            tokens, logprobs = pending.joined(event.tokens, event.logprobs)
        elif pending.boundary is not None:
            _, tokens, logprobs = pending.boundary
        else:
            tokens, logprobs = np.empty(0, np.int32), np.empty(0, np.float64)
        return Rollout(
            index=pending.index,
            branch=pending.branch,
            tokens=tokens,
            logprobs=logprobs if self._wanted.logprobs else None,
            reason=None if event is None else event.reason,
            digest=None if event is None else event.digest,
            error=error,
            end=end,
            worker=place.member.index,
            losses=pending.losses,
            resumed=0 if pending.begun is None else len(pending.begun.tokens),
            seconds=0.0 if event is None else event.seconds,
        )

    def _hand_out(self, rollout: Rollout) -> None:
        if not self._is_ordered:
            self._out.put_nowait(rollout)
            return
        self._held[rollout.index] = rollout
        while self._turn in self._held:
            self._out.put_nowait(self._held.pop(self._turn))
            self._turn += 1

    def _report(self, rollout: Rollout) -> None:
        self._done += 1
        self._failed += rollout.error is not None
        self._n_tokens += len(rollout.tokens)
        if self._tell is not None:
            self._tell(Progress(
                self._done, self._failed, self._total, self._n_open, self._n_tokens,
                self._losses, sum(place.is_up for place in self._places),
            ))  # fmt: skip

    # -- tasks ------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose error ends the run."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self._out.put_nowait(error)

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # if it was cancelled before it began
        return task

    async def _end(self) -> None:
        """No task goes on, and no worker has anything of this run any more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        actors = [place.member.present for place in self._places]
        stops = [asyncio.ensure_future(a.call("stop", self._name)) for a in actors]
        for stop in stops:
            stop.add_done_callback(_seen)
        await asyncio.wait(stops, timeout=_STOP_S)


def _seen(stop: asyncio.Future[Any]) -> None:
    """Who is gone has stopped too."""
    if not stop.cancelled():
        stop.exception()


async def _install(actor: Incarnation, trunk: Trunk) -> None:
    """The capsules of a trunk's lineage that an actor does not have. Raises what `call` raises."""
    lineage = trunk.lineage
    known = [i for i, t in enumerate(lineage) if t.address in actor.holds]
    for first in dict.fromkeys((known[-1] + 1 if known else 0, 0)):
        wanted = lineage[first:]
        if not wanted:
            return
        done = await actor.install([t.parcel for t in wanted])
        if done.missing is None:
            actor.holds |= {t.address for t in wanted}
            return
        actor.holds.discard(done.missing)
    raise FleetError(f"{actor.name} lacks capsule {done.missing}, and has nothing to make it of")
