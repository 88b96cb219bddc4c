"""Control loops: a policy at a fixed rate, that can be snapshot, restored, forked and rewound.

IS: what happens in a tick and in the slack after it; boundaries; the deadline policy. IS NOT: the
policy's arithmetic (an engine's graphs), nor when to plan (schedule), nor an environment (run).

The tick takes in an observation and hands out an action that was planned before. The next chunk is
planned in the slack, while this one is executed: real-time chunking (see schedule). The order of
all this is fixed by tick numbers alone, so the same observations give the same bits, however fast
or late anything was; a missed deadline is written down, and comes again in a replay.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from numpy.typing import ArrayLike

from flashrt.base.checks import shown
from flashrt.base.errors import (
    CapsuleError,
    DeadlineMissed,
    PoolFull,
    SessionError,
)
from flashrt.base.locks import reentrant_lock
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import Lane
from flashrt.capsule.turn import Turn, exclusive
from flashrt.engine.numbers import Given, checked_vector, checked_vectors
from flashrt.engine.packed import Packed
from flashrt.robot.history import NO_CUT, NOTHING, Boundary, History, LoopState, PastTick
from flashrt.robot.options import (
    ControlOptions,
    OnMiss,
    checked_count,
    checked_seconds,
    checked_seed,
    longest_overlap,
)
from flashrt.robot.policy import Array, Observation, Policy, guiding, naming, taking
from flashrt.robot.schedule import run_slack, run_tick
from flashrt.robot.timing import LoopTiming

OBSERVED_KINDS = "f"  # numpy's letters of the dtypes that an observation may have


class Took(NamedTuple):
    """Instants of a tick, of time.perf_counter_ns."""

    due_ns: int  # the deadline counts from here
    started_ns: int  # of the call
    done_ns: int  # the action is there


class LoopListener(Protocol):
    """Who hears of all that a loop does; a recording.LoopRecorder."""

    def tick(self, observation: Array, action: Array, *, is_late: bool) -> None: ...
    def override(self, executed: Array) -> None: ...
    def slack(self, digest: str | None) -> None: ...
    def event(self, what: str, value: int = 0, digest: str | None = None) -> None: ...


class ControlLoop:
    """A policy on one lane, ticking. A call of another thread waits until the one at hand is over.

    After an exception anywhere in a call, Ctrl-C say, the call has happened or it has not, and
    `position` tells which: the lane is in doubt from before the first byte changes until the record
    of what happened was swapped, and a lane in doubt is made again before the next call begins.
    """

    def __init__(
        self,
        engine: Policy,
        hz: float = 50.0,
        deadline_ms: float | None = None,
        on_miss: OnMiss = "hold",
        *,
        overlap: int | None = None,
        hold_action: ArrayLike | None = None,
        seed: int = 0,
        keep_seconds: float = 5.0,
        boundary_seconds: float = 0.5,
    ) -> None:
        """Takes a free lane of the engine and resets it to `seed`.

        hz: ticks per second, for `rewind` and `run`; a tick itself waits for nothing. deadline_ms:
        of an action, from the call of `tick`, or from the instant due in `run`; None: none. on_miss
        says what becomes of a late action: "hold" drops it, and `hold_action` (else the previous
        action) is executed; "last" hands it out, late; "raise" raises DeadlineMissed. In each case
        the observation was taken in and the loop goes on. overlap: ticks over which a chunk is
        made, in [0, min(N, H - N)] of a policy that executes N actions of a chunk of H; 0 plans
        within the tick; None: 1, or 0 where the policy has no room for it. keep_seconds: how far
        `rewind` reaches. boundary_seconds: between the boundaries it starts from. Raises
        SessionError for bad options, LaneBusy, and PoolFull when there is no room for one boundary,
        which the loop keeps until it is closed.
        """
        if overlap is None:
            overlap = min(1, longest_overlap(engine.config))
        options = ControlOptions(
            hz, deadline_ms, on_miss, overlap, hold_action, keep_seconds, boundary_seconds
        )
        options.check(engine.config)
        seed = checked_seed(seed)
        self._open(engine, options, lambda: self.reset(seed))

    def _open(self, engine: Policy, options: ControlOptions, begin: Callable[[], None]) -> None:
        """On a lane of its own, which `begin` puts into the state to begin with. Raises LaneBusy,
        PoolFull.
        """
        self.engine = engine
        self.options = options
        self.timing = LoopTiming(engine.stats)
        self.lock = reentrant_lock()  # whoever has it is in a call; see `exclusive`
        self._named = naming(engine)
        self._taken = taking(engine)
        self._hold = options.hold(engine.config)
        is_holding = options.on_miss == "hold" and options.deadline_ms is not None
        self._is_sent_needed = is_holding and self._hold is None  # else nobody asks for it
        self._boundary_ticks = options.boundary_ticks
        self._history = History(options.history_ticks)
        self._state = LoopState()
        self._is_in_doubt = True  # whether the lane may be elsewhere than the record says
        self._listener: LoopListener | None = None
        self._n_told = 0  # changes that the listener heard of
        self._is_closed = False
        self._take_lane(begin)

    @exclusive
    def _take_lane(self, begin: Callable[[], None]) -> None:
        self._lane = self.engine.take_lane(self)
        try:
            begin()
            self._keep_boundary()
        except BaseException:
            self.engine.release_from(self._lane, self)
            raise

    # -- ticking --------------------------------------------------------------------------------

    def tick(self, observation: Observation) -> Array:
        """The action for an observation: float32 [action_dim], in the environment's units.

        A policy of cameras takes it by names, {"observation.state": ..., "observation.images.top":
        ...}; see ActionEngine.pack. Raises ObservationError for a wrong shape or dtype or a value
        that is not finite: nothing has happened then. Raises DeadlineMissed under on_miss="raise":
        the tick has happened.
        """
        return self.tick_due(observation, time.perf_counter_ns())

    @exclusive
    def tick_due(self, observation: Observation, due_ns: int) -> Array:
        """The same for an instant of time.perf_counter_ns from which the deadline counts."""
        started_ns = time.perf_counter_ns()
        checked = self._checked(observation)
        state = self.ready()
        self._is_in_doubt = True
        action = run_tick(self.engine, self._lane, checked)
        took = Took(due_ns, started_ns, time.perf_counter_ns())
        return self.end_tick(state, checked, action, took)

    @exclusive
    def executed(self, action: ArrayLike) -> None:
        """Something else than the last tick's action was executed: by a limiter, or a person.

        float32 [action_dim]; to be said before `slack`: what is planned follows on it. Raises
        SessionError when that is over, ObservationError for what is no action.
        """
        state = self.recovered()
        if state.is_slack_done:
            raise SessionError("executed: to be said after a tick, before its slack")
        done = checked_vector("action", action, self.engine.config.action_dim)
        self._is_in_doubt = True
        self.engine.override(self._lane, done)
        last = state.end - 1
        self._history.put(last, self._history.past_tick(last)._replace(executed=done))
        self._commit(state._replace(sent=done, changes=state.changes + 1))
        if (listener := self._listening()) is not None:
            listener.override(done)
            self._n_told = self._state.changes

    @exclusive
    def tick_as_recorded(self, observation: ArrayLike, executed: ArrayLike | None) -> Array:
        """A tick without a deadline, and what was executed in place of its action, if anything."""
        checked, instead = self._checked(observation), None
        if executed is not None:
            instead = checked_vector("action", executed, self.engine.config.action_dim)
        state = self.ready()
        self._is_in_doubt = True
        action = run_tick(self.engine, self._lane, checked)
        self._ticked(state, checked, action, instead)
        return action

    @exclusive
    def predict_chunk(self, observation: Observation, given: Given | None = None) -> Array:
        """The chunk that the policy would plan from an observation for the coming tick, float32
        [chunk_size, action_dim] in the environment's units. The loop stays where it is. `given`:
        what it starts from, see ActionEngine.plan.

        Raises ObservationError, PoolFull where there is no room to come back, and SessionError for
        a policy of your own without the verbs of NamedVerbs, or without those that take `given`.
        """
        named = naming(self.engine)
        if named is None:
            raise SessionError("predict_chunk: this policy does not show its chunks")
        giving = None if given is None else guiding(self.engine)
        if given is not None and giving is None:
            raise SessionError("predict_chunk: this policy's plans take nothing but observations")
        checked = self._checked(observation)
        asked = None if giving is None or given is None else giving.checked_given(given)
        self.ready()
        capsule = self._frozen(None)
        try:
            self._is_in_doubt = True
            self.engine.observe_trusted(self._lane, checked)
            if giving is None:
                self.engine.plan(self._lane, 0)
            else:
                giving.plan(self._lane, 0, given=asked)
            chunk = named.chunk(self._lane)
            self.engine.restore(self._lane, capsule)
            self._is_in_doubt = False
        finally:
            capsule.drop()
        return chunk

    @exclusive
    def slack(self) -> None:
        """Do what the last tick left to be done: plan ahead, keep a boundary for `rewind`.

        To be called once the action is on its way; whatever was not given time is made up for at
        the start of the next tick, to the same bits.
        """
        state = self.recovered()
        if not state.is_slack_done:
            self._slack(state)

    @property
    def turn(self) -> Turn:
        """The engine's: calls of several threads take turns."""
        return self.engine.turn

    @property
    def lane(self) -> Lane:
        """Where the state is. Not to be changed by others."""
        return self._lane

    @property
    def position(self) -> int:
        """Ticks since the reset, the number of the tick to come; as it was once it is closed."""
        return self._located()[0]

    @property
    def seed(self) -> int:
        """Of the noise that chunks are made from."""
        return self._located()[1]

    @property
    def is_closed(self) -> bool:
        """Whether the lane was given back."""
        return self._is_closed

    @property
    def listener(self) -> LoopListener | None:
        """Who hears of what happens from when it is set."""
        return self._listener

    @listener.setter
    def listener(self, listener: LoopListener | None) -> None:
        self._n_told = self._state.changes
        self._listener = listener

    @exclusive
    def digest(self) -> str:
        """128-bit value of the whole control state, as 32 hex digits."""
        self._finished()
        return self._digest()

    # -- episodes, interrupts, boundaries -------------------------------------------------------

    @exclusive
    def reset(self, seed: int = 0) -> None:
        """Begin an episode: nothing remembered, nothing promised. The noise of its chunks depends
        on `seed`, in [0, 2**63), and on the tick.
        """
        self._check_open()
        seed = checked_seed(seed)
        self._is_in_doubt = True
        self.engine.reset(self._lane, seed)
        self._put(Boundary(0, None, seed), 0, seed)
        self._tell("reset", seed)

    @exclusive
    def set_seed(self, seed: int) -> None:
        """Other noise for the chunks from here on, as for a fork that is to try something else."""
        seed = checked_seed(seed)
        state = self.ready()
        self._is_in_doubt = True
        self.engine.set_seed(self._lane, seed)
        self._put(None, state.position, seed)
        self._tell("set_seed", seed)

    @exclusive
    def interrupt(self, keep: int = 0) -> None:
        """Drop the rest of the chunk: what comes is planned from the observations to come.

        At most `keep` more of the actions promised are executed; with 0, the next tick plans before
        it acts, which takes the time of both.
        """
        keep = checked_count("interrupt: keep", keep)
        state = self.ready()
        self._is_in_doubt = True
        cut = self._cut(self._located()[0] + keep)
        self._commit(state._replace(cut=cut, changes=state.changes + 1))
        self._tell("interrupt", keep)

    @exclusive
    def snapshot(self, name: str | None = None) -> Capsule:
        """Freeze the whole control state. Raises PoolFull, changing nothing, without room."""
        self._finished()
        capsule = self._frozen(name)
        if self._listener is not None:
            self._listener.event("snapshot", digest=capsule.digest)
        return capsule

    def check_capsule(self, capsule: Capsule) -> None:
        """Raises CapsuleError unless `restore` would take it."""
        self._check_open()
        self.engine.check_capsule(capsule)

    @exclusive
    def restore(self, capsule: Capsule) -> None:
        """Continue from a capsule. `rewind` reaches back to here afterwards, not beyond.

        Raises CapsuleError for a dropped or foreign capsule; nothing has changed then.
        """
        self._check_open()
        was_in_doubt = self._is_in_doubt
        if self._state.position is None and not was_in_doubt:
            self._locate()
        self._is_in_doubt = True
        try:
            self.engine.restore(self._lane, capsule)
        except CapsuleError:  # found before anything moved
            self._is_in_doubt = was_in_doubt
            raise
        self._put(Boundary(0, capsule), None, None)
        if self._listener is not None:
            self._tell("restore", digest=capsule.digest)

    @exclusive
    def fork(self, n: int = 1, seeds: Sequence[int] | None = None) -> list[ControlLoop]:
        """`n` more loops in this one's present state, on free lanes; with `seeds`, each plans with
        its own noise. Raises LaneBusy or PoolFull, and makes none, when lanes or room are short.
        """
        n = checked_count("fork: n", n)
        noise = [None] * n if seeds is None else [checked_seed(seed) for seed in seeds]
        if len(noise) != n:
            raise SessionError(f"fork: {len(noise)} seeds for {n} loops")
        self._finished()
        loops: list[ControlLoop] = []
        try:
            for seed in noise:
                loops.append(self._forked(seed))
        except BaseException:
            for loop in loops:
                loop.close()
            raise
        return loops

    def adopt(self, other: ControlLoop) -> None:
        """Take over the present state of another loop of this engine."""
        if not isinstance(other, ControlLoop):
            raise SessionError(f"adopt: {shown(other)} is not a control loop")
        if other.engine is not self.engine:
            raise SessionError("adopt: the other loop is another engine's")
        # In one order for every thread, so that none waits forever.
        first, second = (self, other) if id(self) < id(other) else (other, self)
        with first.lock, second.lock: self._adopt(other)  # noqa: E701  # fmt: skip

    def rewind(self, seconds: float) -> None:
        """Go back in time, to the bit: the nearest boundary before, then the ticks since, run
        again. Raises SessionError, changing nothing, beyond what is kept.
        """
        self.rewind_ticks(round(checked_seconds("rewind: seconds", seconds) * self.options.hz))

    @exclusive
    def rewind_ticks(self, ticks: int) -> None:
        """The same, by a number of ticks."""
        ticks = checked_count("rewind: ticks", ticks)
        state = self.recovered()
        reach = state.end - state.first
        if ticks > reach:
            raise SessionError(
                f"rewind: {ticks} ticks, of {reach} that can be gone back "
                f"({reach / self.options.hz:.2f} s); a larger keep_seconds keeps more"
            )
        if not ticks:
            self._finished()
            return
        target, position = state.end - ticks, self.position - ticks
        seed, state = self.seed, self._state
        self._is_in_doubt = True
        sent = self._run_again(next(state.bases(target)), target)
        boundaries = tuple(b for b in state.boundaries if b.tick <= target)
        rewound = LoopState(state.origin, boundaries, target, position=position, seed=seed)
        self._commit(rewound._replace(sent=sent, changes=state.changes + 1))
        self._drop_spares()
        self._tell("rewind", ticks)

    # -- the rest -------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counts, quantiles in seconds, and counters of the engine since this loop was made."""
        return self.timing.summary()

    @exclusive
    def close(self) -> None:
        """Give the lane back. Capsules stay. A second close does nothing."""
        if not self._is_closed:
            with contextlib.suppress(SessionError):  # the engine is closed, or the state is lost
                self._located()
            self._is_closed = True
        self.engine.release_from(self._lane, self)

    def __enter__(self) -> ControlLoop:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the state, and making it again -----------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionError("the control loop is closed; make another one")
        self.engine.check_open()

    def recovered(self) -> LoopState:
        """What every call begins with: the loop is open, and the lane is where the record says.

        Raises SessionError where that cannot be.
        """
        self._check_open()
        if self._is_in_doubt or not self._lane.is_trusted:
            self._make_again()
        return self._state

    def _finished(self) -> LoopState:
        """The slack of the last tick is over, if nobody gave it yet."""
        state = self.recovered()
        if not state.is_slack_done:
            self._slack(state)
            state = self._state
        if self._listener is not None and self._n_told != state.changes:
            # An exception fell between a change and the word of it.
            self._listener.event("restore", digest=self._digest())
            self._n_told = state.changes
        return state

    def ready(self) -> LoopState:
        """The same, for what changes the lane: its number is known, and it can be made again."""
        state = self._finished()
        if state.position is None:
            state = self._locate()
        if state.sent is None and state.position and self._is_sent_needed:
            self._state = state._replace(sent=self.engine.action(self._lane))
        if not state.has_base(self._history.capacity):
            self._keep_boundary()
        return self._state

    def _commit(self, state: LoopState) -> None:
        """The lane is in this state. One line: an exception falls before it or after it."""
        self._state, self._is_in_doubt = state, False

    def _put(self, origin: Boundary | None, position: int | None, seed: int | None) -> None:
        """The lane is somewhere else, and goes back no further than to here."""
        before = self._state
        self._commit(
            LoopState(origin, (), 0, NO_CUT, True, position, seed, None, before.changes + 1)
        )
        if len(before.boundaries) > 1:
            self._drop_spares()

    def _located(self) -> tuple[int, int]:
        """Position and seed. After a restore the device is asked once."""
        state = self._state
        if state.position is None or state.seed is None:
            state = self._locate()
        assert state.position is not None and state.seed is not None
        return state.position, state.seed

    @exclusive
    def _locate(self) -> LoopState:
        state, cursor = self.recovered(), self.engine.cursor(self._lane)
        self._state = state._replace(position=cursor.tick, seed=cursor.seed)
        return self._state

    def _make_again(self) -> None:
        """An exception fell into a call: nobody knows what the lane holds. The state of before is
        made again from the nearest boundary that can be read.
        """
        state = self._state
        self._is_in_doubt = True
        for boundary in state.bases(state.end):
            try:
                self._run_again(boundary, state.end, is_last_whole=state.is_slack_done)
            except CapsuleError:  # found before anything moved
                continue
            if state.cut != NO_CUT:
                self._cut(state.cut)
            self._is_in_doubt = False
            return
        raise SessionError(
            "the control loop was interrupted where it had no boundary to go back to, and its "
            "state is lost; reset it, or restore a capsule"
        )

    def _run_again(self, base: Boundary, stop: int, *, is_last_whole: bool = True) -> Array | None:
        """Go to a boundary, and from there up to tick `stop`, interrupts and slacks included; of
        the last tick only if it is whole. What was executed last, if anything was.
        """
        engine, lane = self.engine, self._lane
        if base.capsule is None:
            engine.reset(lane, base.seed)
        else:
            engine.restore(lane, base.capsule)
        action: Array | None = None
        for tick in range(base.tick, stop):
            past = self._history.past_tick(tick)
            if past.cut != NO_CUT:
                self._cut(past.cut)
            action = run_tick(engine, lane, past.observation)
            if past.executed is not None:
                action = past.executed
                engine.override(lane, action)
            if is_last_whole or tick + 1 < stop:
                run_slack(engine, lane, self.options.overlap)
        return action

    # -- boundaries -----------------------------------------------------------------------------

    def _keep_boundary(self) -> None:
        """A boundary before the coming tick. Room for one is the loop's own: raises PoolFull only
        where it was lost.
        """
        while True:
            try:
                capsule = self.engine.keep_boundary(self._lane)
                break
            except PoolFull:
                if not self._give_way() and not self._drop_last():
                    raise
        state = self._state
        boundary = Boundary(state.end, capsule)
        self._state = state._replace(boundaries=(*state.boundaries, boundary))
        self._drop_spares()

    def _frozen(self, name: str | None) -> Capsule:
        """A snapshot, boundaries giving way. Raises PoolFull."""
        while True:
            try:
                return self.engine.snapshot(self._lane, name)
            except PoolFull:
                if not self._give_way():
                    raise

    def _spares(self) -> list[Capsule]:
        """Capsules that the loop kept and that lead nowhere any more."""
        used = [b.capsule for b in self._state.boundaries]
        return [c for c in self.engine.kept_boundaries(self._lane) if c not in used]

    def _drop_spares(self) -> None:
        """But one, where there is no boundary: its room is for the next."""
        spares = self._spares()
        for capsule in spares if self._state.boundaries else spares[1:]:
            capsule.drop()

    def _give_way(self) -> bool:
        """Drop what is missed least; False when the loop has one capsule left."""
        if len(self.engine.kept_boundaries(self._lane)) < 2:
            return False
        spares, state = self._spares(), self._state
        if not spares:
            self._state = state._replace(boundaries=state.boundaries[1:])
            spares = self._spares()
        spares[0].drop()
        return True

    def _drop_last(self) -> bool:
        """The same for the last one, whose room is needed for the next boundary."""
        self._state = self._state._replace(boundaries=())
        spares = self._spares()
        for capsule in spares:
            capsule.drop()
        return bool(spares)

    # -- what a tick and a slack are made of ------------------------------------------------------
    # For whoever runs the verbs of several loops at once (together), in their turn and locks.

    @property
    def is_slack_due(self) -> bool:
        """Whether the slack after the last tick is still to come, as far as the record says."""
        return not self._state.is_slack_done

    def doubt(self) -> None:
        """The verbs of a tick or a slack are about to run: the lane is in doubt until the record of
        them is made. It was `ready` for a tick, `recovered` for a slack.
        """
        self._is_in_doubt = True

    def end_tick(self, state: LoopState, observation: Array, action: Array, took: Took) -> Array:
        """The verbs of a tick have run, and this came of it; what is executed.

        Raises DeadlineMissed under on_miss="raise", once the tick has happened.
        """
        late_ns = took.done_ns - took.due_ns
        is_late = late_ns > self.options.deadline_ns
        instead = self._late(state) if is_late else None
        self._ticked(state, observation, action, instead, is_late=is_late)
        self.timing.latency.add(took.done_ns - took.started_ns)
        if is_late and self.options.on_miss == "raise":
            raise DeadlineMissed(
                f"tick {state.position}: its action came {late_ns / 1e6:.3f} ms after "
                f"it was due, {self.options.deadline_ms:g} ms are allowed; the loop may go on"
            )
        return action if instead is None else instead.copy()

    def end_slack(self, state: LoopState, planning_ns: int | None) -> None:
        """The verbs of a slack have run; how long they took, if anything was planned."""
        if planning_ns is not None:
            self.timing.planning.add(planning_ns)
        self._commit(state.slack_done())
        if self._named is not None and not self._named.is_last_observation_used(self._lane):
            last = state.end - 1
            past = self._history.past_tick(last)
            self._history.put(last, past._replace(observation=NOTHING))
        is_boundary = state.end % self._boundary_ticks == 0
        if is_boundary:
            with contextlib.suppress(PoolFull):  # only reach is lost
                self._keep_boundary()
        if (listener := self._listener) is not None and self._n_told == state.changes:
            listener.slack(self._digest() if is_boundary else None)

    # -- inside ---------------------------------------------------------------------------------

    def _checked(self, observation: Observation) -> Array:
        """The loop's own copy; what comes after this door trusts it. Raises ObservationError."""
        vector = as_vector(self.engine, observation)
        if isinstance(vector, Packed):
            return cast(Array, vector)
        size = self.engine.config.observation_dim
        checked = checked_vector("observation", vector, size, OBSERVED_KINDS)
        return checked if self._taken is None else self._taken(checked)

    def _late(self, state: LoopState) -> Array | None:
        """The deadline policy; what is executed in place of the action, if anything."""
        self.timing.misses += 1
        if self.options.on_miss != "hold":
            return None
        return state.sent if self._hold is None else self._hold

    def _ticked(
        self,
        state: LoopState,
        observation: Array,
        action: Array,
        instead: Array | None,
        *,
        is_late: bool = False,
    ) -> None:
        """The graphs of a tick have run, from `state`."""
        if instead is not None:
            self.engine.override(self._lane, instead)
        self._history.put(state.end, PastTick(observation, state.cut, instead))
        sent = instead
        if sent is None and self._is_sent_needed:
            sent = action.copy()
        ticked = state.ticked(sent, self._history.capacity)
        self._commit(ticked)
        self.timing.ticks += 1
        if ticked.boundaries is not state.boundaries:
            self._drop_spares()
        if (listener := self._listening()) is not None:
            listener.tick(observation, action, is_late=is_late)
            if instead is not None:
                listener.override(instead)
            self._n_told = self._state.changes

    def _slack(self, state: LoopState) -> None:
        started_ns = time.perf_counter_ns()
        self._is_in_doubt = True
        is_planned = run_slack(self.engine, self._lane, self.options.overlap)
        self.end_slack(state, time.perf_counter_ns() - started_ns if is_planned else None)

    def _digest(self) -> str:
        return self.engine.digest(self._lane)

    def _cut(self, stop: int) -> int:
        """Promise nothing from tick `stop` on; what is promised up to, which may be less."""
        stop = min(stop, self.engine.cursor(self._lane).stop)
        self.engine.cut(self._lane, stop)
        return stop

    def _forked(self, seed: int | None) -> ControlLoop:
        """Another loop in this one's state. The boundaries of this one give way to its own."""
        loop = ControlLoop.__new__(ControlLoop)
        while True:
            try:
                loop._open(self.engine, self.options, lambda: loop._copy(self, seed))
                return loop
            except PoolFull:
                if not self._give_way():
                    raise

    @exclusive
    def _adopt(self, other: ControlLoop) -> None:
        self._check_open()
        other._finished()
        if other is not self:
            if self._state.position is None and not self._is_in_doubt:
                self._locate()
            self._copy(other, None)
            if self._listener is not None:
                self._tell("restore", digest=self._digest())

    def _copy(self, other: ControlLoop, seed: int | None) -> None:
        """The state of another loop, which is finished; with `seed` for what comes."""
        position, same = other._located()
        self._is_in_doubt = True
        self.engine.fork(other._lane, self._lane)
        if seed is not None:
            self.engine.set_seed(self._lane, seed)
        self._put(None, position, same if seed is None else seed)

    def _listening(self) -> LoopListener | None:
        """The listener, if it heard of all but the change at hand; see `_finished`."""
        return self._listener if self._n_told == self._state.changes - 1 else None

    def _tell(self, what: str, value: int = 0, digest: str | None = None) -> None:
        if (listener := self._listening()) is not None:
            listener.event(what, value, digest)
            self._n_told = self._state.changes


def checked_observations(engine: Policy, observations: Sequence[Observation]) -> list[Array]:
    """The loops' own copies of observations, one for each of several. Raises ObservationError."""
    size, take = engine.config.observation_dim, taking(engine)
    vectors = [as_vector(engine, observation) for observation in observations]
    plain = [vector for vector in vectors if not isinstance(vector, Packed)]
    checked = iter(checked_vectors("observation", plain, size, OBSERVED_KINDS))
    return [
        cast(Array, vector)
        if isinstance(vector, Packed)
        else next(checked)
        if take is None
        else take(next(checked))
        for vector in vectors
    ]


def as_vector(engine: Policy, observation: Observation) -> ArrayLike:
    """An observation by names as a vector, if the policy knows names; else as it is. Raises
    ObservationError.
    """
    named = naming(engine) if isinstance(observation, Mapping) else None
    if named is None or not isinstance(observation, Mapping):
        return cast(ArrayLike, observation)
    return named.pack(observation)
