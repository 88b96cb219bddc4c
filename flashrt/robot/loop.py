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
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from flashrt.base.checks import shown
from flashrt.base.errors import DeadlineMissed, PoolFull, SessionError
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.lineage import Lane
from flashrt.engine.actions import checked_vector
from flashrt.robot.history import NO_CUT, History, PastTick
from flashrt.robot.options import (
    ControlOptions,
    OnMiss,
    checked_count,
    checked_seconds,
    checked_seed,
)
from flashrt.robot.policy import Array, Policy
from flashrt.robot.schedule import run_slack, run_tick
from flashrt.robot.timing import LoopTiming


class LoopListener(Protocol):
    """Who hears of all that a loop does; a recording.LoopRecorder."""

    def tick(self, observation: Array, action: Array, *, is_late: bool) -> None: ...
    def override(self, executed: Array) -> None: ...
    def slack(self, digest: str | None) -> None: ...
    def event(self, what: str, value: int = 0, digest: str | None = None) -> None: ...


class ControlLoop:
    """A policy on one lane, ticking. Not for use by two threads at once."""

    def __init__(
        self,
        engine: Policy,
        hz: float = 50.0,
        deadline_ms: float | None = None,
        on_miss: OnMiss = "hold",
        *,
        overlap: int = 1,
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
        within the tick. keep_seconds: how far `rewind` reaches. boundary_seconds: between the
        boundaries it starts from. Raises SessionError for bad options, LaneBusy.
        """
        options = ControlOptions(
            hz, deadline_ms, on_miss, overlap, hold_action, keep_seconds, boundary_seconds
        )
        options.check(engine.config)
        seed = checked_seed(seed)
        self._take_lane(engine, options)
        self.reset(seed)

    def _take_lane(self, engine: Policy, options: ControlOptions) -> None:
        """Everything but the state that the lane begins in. Raises LaneBusy."""
        config = engine.config
        dims = config.observation_dim, config.action_dim
        self.engine = engine
        self.options = options
        self.listener: LoopListener | None = None
        self.timing = LoopTiming(engine.stats)
        self._hold = options.hold(config)
        self._history = History(options.history_ticks, *dims)
        self._observation = np.zeros(config.observation_dim, np.float32)  # the one at hand
        self._sent = np.zeros(config.action_dim, np.float32)  # the previous action
        self._is_sent_known = False  # to the host; there is none before tick 0
        self._is_slack_done = True
        self._lane = engine.take_lane()
        self._give_back = partial(_give_back, engine, self._lane, self._history)
        self.is_closed = False

    # -- ticking --------------------------------------------------------------------------------

    def tick(self, observation: ArrayLike) -> Array:
        """The action for an observation: float32 [action_dim], in the environment's units.

        Raises ObservationError for a wrong shape or dtype or a value that is not finite: nothing
        has happened then. Raises DeadlineMissed under on_miss="raise": the tick has happened.
        """
        return self.tick_due(observation, time.perf_counter_ns())

    def tick_due(self, observation: ArrayLike, due_ns: int) -> Array:
        """The same for an instant of time.perf_counter_ns from which the deadline counts."""
        self._check_open()
        started_ns = time.perf_counter_ns()
        checked = self._checked(observation)
        action = self._step(checked)
        now_ns = time.perf_counter_ns()
        is_late = now_ns - due_ns > self.options.deadline_ns
        instead = self._late() if is_late else None
        self._note(checked, action, is_late=is_late)
        if instead is not None:
            self.executed(instead)
        self.timing.latency.add(now_ns - started_ns)
        if is_late and self.options.on_miss == "raise":
            raise DeadlineMissed(
                f"tick {self.position - 1}: its action came {(now_ns - due_ns) / 1e6:.3f} ms after "
                f"it was due, {self.options.deadline_ms:g} ms are allowed; the loop may go on"
            )
        return action if instead is None else instead

    def executed(self, action: ArrayLike) -> None:
        """Something else than the last tick's action was executed: by a limiter, or a person.

        float32 [action_dim]; to be said before `slack`: what is planned follows on it. Raises
        SessionError when that is over, ObservationError for what is no action.
        """
        self._check_open()
        if self._is_slack_done:
            raise SessionError("executed: to be said after a tick, before its slack")
        self.engine.override(self._lane, action)
        self._send(np.asarray(action, np.float32))
        self._history.override(self._sent)
        if self.listener is not None:
            self.listener.override(self._sent)

    def tick_as_recorded(self, observation: ArrayLike, executed: ArrayLike | None) -> Array:
        """A tick without a deadline, and what was executed in place of its action, if anything."""
        self._check_open()
        action = self._step(checked := self._checked(observation))
        self._note(checked, action)
        if executed is not None:
            self.executed(executed)
        return action

    def slack(self) -> None:
        """Do what the last tick left to be done: plan ahead, keep a boundary for `rewind`.

        To be called once the action is on its way; whatever was not given time is made up for at
        the start of the next tick, to the same bits.
        """
        if self._is_slack_done:
            return
        self._check_open()
        started_ns = time.perf_counter_ns()
        if run_slack(self.engine, self._lane, self.options.overlap):
            self.timing.planning.add(time.perf_counter_ns() - started_ns)
        self._is_slack_done = True
        is_boundary = self._history.end % self.options.boundary_ticks == 0
        if is_boundary:
            self._keep_boundary()
        if self.listener is not None:
            self.listener.slack(self.engine.digest(self._lane) if is_boundary else None)

    @property
    def lane(self) -> Lane:
        """Where the state is. Not to be changed by others."""
        return self._lane

    @property
    def position(self) -> int:
        """Ticks since the reset; the number of the tick to come."""
        return self.engine.cursor(self._lane).tick

    @property
    def seed(self) -> int:
        """Of the noise that chunks are made from."""
        return self.engine.cursor(self._lane).seed

    def digest(self) -> str:
        """128-bit value of the whole control state, as 32 hex digits."""
        self._finish_tick()
        return self.engine.digest(self._lane)

    # -- episodes, interrupts, boundaries -------------------------------------------------------

    def reset(self, seed: int = 0) -> None:
        """Begin an episode: nothing remembered, nothing promised. The noise of its chunks depends
        on `seed`, in [0, 2**63), and on the tick.
        """
        self._check_open()
        seed = checked_seed(seed)
        self.engine.reset(self._lane, seed)
        self._moved()
        self._tell("reset", seed)

    def set_seed(self, seed: int) -> None:
        """Other noise for the chunks from here on, as for a fork that is to try something else."""
        seed = checked_seed(seed)
        self._finish_tick()
        self.engine.set_seed(self._lane, seed)
        self._history.clear()
        self._tell("set_seed", seed)

    def interrupt(self, keep: int = 0) -> None:
        """Drop the rest of the chunk: what comes is planned from the observations to come.

        At most `keep` more of the actions promised are executed; with 0, the next tick plans before
        it acts, which takes the time of both.
        """
        keep = checked_count("interrupt: keep", keep)
        self._finish_tick()
        if not self._history.boundaries:
            self._keep_boundary()
        self._history.cut(self._cut(self.position + keep))
        self._tell("interrupt", keep)

    def snapshot(self, name: str | None = None) -> Capsule:
        """Freeze the whole control state. Raises PoolFull, changing nothing, without room."""
        self._finish_tick()
        capsule = self._with_room(name)
        self._tell("snapshot", digest=None if self.listener is None else capsule.digest)
        return capsule

    def restore(self, capsule: Capsule) -> None:
        """Continue from a capsule. `rewind` reaches back to here afterwards, not beyond.

        Raises CapsuleError for a dropped or foreign capsule; nothing has changed then.
        """
        self._check_open()
        self.engine.restore(self._lane, capsule)
        self._moved()
        self._tell("restore", digest=None if self.listener is None else capsule.digest)

    def fork(self, n: int = 1, seeds: Sequence[int] | None = None) -> list[ControlLoop]:
        """`n` more loops in this one's present state, on free lanes; with `seeds`, each plans with
        its own noise. Raises LaneBusy, and makes none, when lanes are short.
        """
        n = checked_count("fork: n", n)
        noise = [None] * n if seeds is None else [checked_seed(seed) for seed in seeds]
        if len(noise) != n:
            raise SessionError(f"fork: {len(noise)} seeds for {n} loops")
        self._finish_tick()
        loops: list[ControlLoop] = []
        try:
            for _ in range(n):
                loop = ControlLoop.__new__(ControlLoop)
                loop._take_lane(self.engine, self.options)  # as it is: `adopt` overwrites it all
                loops.append(loop)
            for loop, seed in zip(loops, noise, strict=True):
                loop.adopt(self)
                if seed is not None:
                    loop.set_seed(seed)
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
        self._check_open()
        other._finish_tick()
        if other is not self:
            self.engine.fork(other._lane, self._lane)
            self._moved()
            if self.listener is not None:
                self.listener.event("restore", digest=self.digest())

    def rewind(self, seconds: float) -> None:
        """Go back in time, to the bit: the nearest boundary before, then the ticks since, run
        again. Raises SessionError, changing nothing, beyond what is kept.
        """
        self.rewind_ticks(round(checked_seconds("rewind: seconds", seconds) * self.options.hz))

    def rewind_ticks(self, ticks: int) -> None:
        """The same, by a number of ticks."""
        ticks = checked_count("rewind: ticks", ticks)
        self._finish_tick()
        history = self._history
        target = history.end - ticks
        if target < history.first:
            reach = history.end - history.first
            raise SessionError(
                f"rewind: {ticks} ticks, of {reach} that can be gone back "
                f"({reach / self.options.hz:.2f} s); a larger keep_seconds keeps more"
            )
        if ticks:
            start, capsule = history.at_or_before(target)
            again = [history.past_tick(t) for t in range(start, target)]
            self._is_sent_known = False
            try:
                self.engine.restore(self._lane, capsule)
                for past in again:
                    self._send(self._run_again(past))
            except BaseException:  # Ctrl-C, say: somewhere between
                self._moved()
                raise
            history.cut_back(target)
            self._tell("rewind", ticks)

    # -- the rest -------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counts, quantiles in seconds, and counters of the engine since this loop was made."""
        return self.timing.summary()

    def close(self) -> None:
        """Give the lane back. Capsules stay. A second close does nothing."""
        if not self.is_closed:
            self.is_closed = True
            self._give_back()

    def __del__(self) -> None:
        """A forgotten loop's lane goes to the next one that asks; better say when: `close`.

        Only noted here: a collection may strike in the middle of a change to the pool.
        """
        with contextlib.suppress(AttributeError):  # of an instance whose __init__ did not finish
            if not self.is_closed:
                self.engine.forgotten.append(self._give_back)

    def __enter__(self) -> ControlLoop:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- inside ---------------------------------------------------------------------------------

    def _checked(self, observation: ArrayLike) -> Array:
        """The loop's own copy, until the next one; what comes after this door trusts it."""
        own = self._observation
        return checked_vector("observation", observation, len(own), "f", own)

    def _step(self, observation: Array) -> Array:
        """What every tick is: the slack of the one before, a boundary to begin with, the graphs."""
        self.slack()
        if not self._history.boundaries:
            self._keep_boundary()
        if not self._is_sent_known and self.position > 0:
            self._send(self.engine.action(self._lane))  # as before a restore
        self._is_slack_done = False
        try:
            return run_tick(self.engine, self._lane, observation)
        except BaseException:  # Ctrl-C, say: nobody knows whether the tick has happened
            self._history.clear()
            if self.listener is not None:
                self.listener.event("restore", digest=self.engine.digest(self._lane))
            raise

    def _cut(self, stop: int) -> int:
        """Promise nothing from tick `stop` on; what is promised up to, which may be less."""
        stop = min(stop, self.engine.cursor(self._lane).stop)
        self.engine.cut(self._lane, stop)
        return stop

    def _run_again(self, past: PastTick) -> Array:
        """A tick of the history, the interrupt before it and its slack included; what was executed,
        float32 [action_dim].
        """
        if past.cut != NO_CUT:
            self._cut(past.cut)
        action = run_tick(self.engine, self._lane, past.observation)
        if past.executed is not None:
            action = past.executed
            self.engine.override(self._lane, action)
        run_slack(self.engine, self._lane, self.options.overlap)
        return action

    def _late(self) -> Array | None:
        """The deadline policy; what is executed in place of the action, if anything."""
        self.timing.misses += 1
        if self.options.on_miss != "hold" or not (self._is_sent_known or self._hold is not None):
            return None
        return self._sent.copy() if self._hold is None else self._hold.copy()

    def _note(self, observation: Array, action: Array, *, is_late: bool = False) -> None:
        self.timing.ticks += 1
        self._history.add(observation)
        self._send(action)
        if self.listener is not None:
            self.listener.tick(observation, action, is_late=is_late)

    def _send(self, action: Array) -> None:
        self._sent[...], self._is_sent_known = action, True

    def _moved(self) -> None:
        """The lane is somewhere else."""
        self._is_slack_done, self._is_sent_known = True, False
        self._history.clear()

    def _finish_tick(self) -> None:
        """The slack of the last tick, if nobody gave it yet."""
        self._check_open()
        self.slack()

    def _keep_boundary(self) -> None:
        """A boundary for `rewind`; without room for any, only reach is lost."""
        with contextlib.suppress(PoolFull):
            self._history.keep(self._with_room(None))

    def _with_room(self, name: str | None) -> Capsule:
        while True:
            try:
                return self.engine.snapshot(self._lane, name)
            except PoolFull:
                if not self._history.forget_oldest():
                    raise

    def _tell(self, what: str, value: int = 0, digest: str | None = None) -> None:
        if self.listener is not None:
            self.listener.event(what, value, digest)

    def _check_open(self) -> None:
        if self.is_closed:
            raise SessionError("the control loop is closed; make another one")


def _give_back(engine: Policy, lane: Lane, history: History) -> None:
    """The lane of a loop, and its boundaries. Knows no loop, which can be collected meanwhile."""
    history.clear()
    engine.release(lane)
