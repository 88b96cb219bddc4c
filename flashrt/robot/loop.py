"""Control loops: a policy at a fixed rate, that can be snapshot, restored, forked and rewound.

IS: what happens in a tick and in the slack after it; boundaries; the deadline policy. IS NOT: the
policy's arithmetic (an engine's graphs) nor when to plan (control_schedule). Called by: users.

The tick takes in an observation and hands out an action that was planned before. The next chunk is
planned in the slack, while this one is executed: real-time chunking (see control_schedule). The
order of all this is fixed by tick numbers alone, so the same observations give the same bits,
however fast or late anything was; a missed deadline is written down, and told again in a replay.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from flashrt.base.errors import DeadlineMissed, LaneBusy, PoolFull, SessionError
from flashrt.capsule.capsule import Capsule
from flashrt.engine.intake import Intake
from flashrt.robot.drive import Drive
from flashrt.robot.history import History
from flashrt.robot.options import ControlOptions, OnMiss
from flashrt.robot.policy import Array, Policy
from flashrt.robot.recording_file import NO_DIGEST
from flashrt.robot.timing import LoopTiming

if TYPE_CHECKING:
    import os

    from flashrt.robot.recording import Recorder
    from flashrt.robot.rollout import Environment
    from flashrt.robot.run import RunReport


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
        the observation was taken in and the loop goes on. overlap: ticks that a plan is spread
        over, in [0, min(N, H - N)] of a policy that executes N of H planned actions; 0 plans within
        the tick. keep_seconds: how far `rewind` reaches. boundary_seconds: between the boundaries
        it starts from. Raises SessionError for bad options, LaneBusy.
        """
        self.options = ControlOptions(
            hz, deadline_ms, on_miss, overlap, hold_action, keep_seconds, boundary_seconds
        )
        config = engine.config
        self.options.check(config)
        self.options.check_seed(seed)
        self.engine = engine
        self._hold = self.options.hold(config)
        dims = config.observation_dim, config.action_dim
        self._history = History(self.options.history_ticks, *dims)
        self._intake = Intake(config.observation_dim)
        self._sent = np.zeros(config.action_dim, np.float32)  # the previous action
        self._is_sent_known = False  # to the host; there is none before tick 0
        self._is_settled = True  # what the slack is for was done
        self.recorder: Recorder | None = None
        self._drive = Drive(engine, overlap)
        self._give_back = partial(self._drive.give_back, self._history)
        self.is_closed = False
        self.timing = LoopTiming(engine.stats)
        self.reset(seed)

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
        checked = self._intake.check(observation)
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
                f"it was due, {self.options.deadline_ms} ms are allowed; the loop may go on"
            )
        return action if instead is None else instead

    def executed(self, action: ArrayLike) -> None:
        """Something else than the last tick's action was executed: by a limiter, or a person.

        float32 [action_dim]; to be said before `slack`: what is planned follows on it. Raises
        SessionError when that is over, ObservationError for what is no action.
        """
        self._check_open()
        if self._is_settled:
            raise SessionError("executed: to be said after a tick, before its slack")
        self.engine.override(self._drive.lane, action)
        self._send(np.asarray(action, np.float32))
        self._history.override(self._sent)
        if self.recorder is not None:
            self.recorder.override(self._sent)

    def tick_as_recorded(self, observation: ArrayLike, executed: ArrayLike | None) -> Array:
        """A tick without a deadline, and what was executed in place of its action, if anything."""
        self._check_open()
        action = self._step(checked := self._intake.check(observation))
        self._note(checked, action)
        if executed is not None:
            self.executed(executed)
        return action

    def slack(self) -> None:
        """Do what the last tick left to be done: plan ahead, keep a boundary for `rewind`.

        To be called once the action is on its way; whatever was not given time is made up for at
        the start of the next tick, to the same bits.
        """
        if self._is_settled:
            return
        self._check_open()
        started_ns = time.perf_counter_ns()
        if self._drive.plan_ahead():
            self.timing.planning.add(time.perf_counter_ns() - started_ns)
        self._is_settled = True
        is_boundary = self._history.end % self.options.boundary_ticks == 0
        if is_boundary:
            self._keep_boundary()
        if self.recorder is not None:
            self.recorder.settled(self.engine.digest(self._drive.lane) if is_boundary else None)

    @property
    def position(self) -> int:
        """Ticks since the reset; the number of the tick to come."""
        return self._drive.schedule.tick

    @property
    def seed(self) -> int:
        """Of the noise of plans."""
        return self.engine.cursor(self._drive.lane).seed

    def digest(self) -> str:
        """128-bit value of the whole control state, as 32 hex digits."""
        self._settle()
        return self.engine.digest(self._drive.lane)

    # -- episodes, interrupts, boundaries -------------------------------------------------------

    def reset(self, seed: int = 0) -> None:
        """Begin an episode: nothing remembered, nothing promised. The noise of its plans depends on
        `seed`, in [0, 2**63), and on the tick.
        """
        self._check_open()
        self.options.check_seed(seed)
        self._drive.reset(seed)
        self._moved()
        self._record("reset", seed)

    def set_seed(self, seed: int) -> None:
        """Other noise for the plans from here on, as for a fork that is to try something else."""
        self.options.check_seed(seed)
        self._settle()
        self.engine.set_seed(self._drive.lane, seed)
        self._history.clear()
        self._record("set_seed", seed)

    def interrupt(self, keep: int = 0) -> None:
        """Drop the rest of the chunk: what comes is planned from the observations to come.

        At most `keep` more of the actions promised are executed; with 0, the next tick plans before
        it acts, which takes a plan's time.
        """
        self._settle()
        if keep < 0:
            raise SessionError(f"interrupt: keep={keep} is negative")
        if not self._history.boundaries:
            self._keep_boundary()
        self._history.cut(self._drive.cut(self.position + keep))
        self._record("interrupt", keep)

    def snapshot(self, name: str | None = None) -> Capsule:
        """Freeze the whole control state. Raises PoolFull, changing nothing, without room."""
        self._settle()
        capsule = self._with_room(name)
        self._record("snapshot", capsule=capsule)
        return capsule

    def restore(self, capsule: Capsule) -> None:
        """Continue from a capsule. `rewind` reaches back to here afterwards, not beyond.

        Raises CapsuleError for a dropped or foreign capsule; nothing has changed then.
        """
        self._check_open()
        self._drive.restore(capsule)
        self._moved()
        self._record("restore", capsule=capsule)

    def fork(self, n: int = 1, seeds: Sequence[int] | None = None) -> list[ControlLoop]:
        """`n` more loops in this one's present state, on free lanes; with `seeds`, each plans with
        its own noise. Raises LaneBusy, and makes none, when lanes are short.
        """
        self._settle()
        if seeds is not None and len(seeds) != n:
            raise SessionError(f"fork: {len(seeds)} seeds for {n} loops")
        loops: list[ControlLoop] = []
        try:
            for _ in range(n):
                loops.append(ControlLoop(self.engine, **self.options.arguments()))
        except LaneBusy:
            for loop in loops:
                loop.close()
            raise
        for i, loop in enumerate(loops):
            loop.adopt(self)
            if seeds is not None:
                loop.set_seed(seeds[i])
        return loops

    def adopt(self, other: ControlLoop) -> None:
        """Take over the present state of another loop of this engine."""
        if other.engine is not self.engine:
            raise SessionError("adopt: the other loop is another engine's")
        self._check_open()
        other._settle()
        if other is not self:
            self._drive.copy(other._drive)
            self._moved()
            if self.recorder is not None:
                self.recorder.event("restore", digest=self.digest())

    def rewind(self, seconds: float) -> None:
        """Go back in time, to the bit: the nearest boundary before, then the ticks since, told
        again. Raises SessionError, changing nothing, beyond what is kept.
        """
        self.rewind_ticks(round(seconds * self.options.hz))

    def rewind_ticks(self, ticks: int) -> None:
        """The same, by a number of ticks."""
        self._settle()
        history = self._history
        target = history.end - ticks
        if ticks < 0 or target < history.first:
            reach = history.end - history.first
            raise SessionError(
                f"rewind: {ticks} ticks, of {reach} that can be gone back "
                f"({reach / self.options.hz:.2f} s); a larger keep_seconds keeps more"
            )
        if ticks:
            start, capsule = history.at_or_before(target)
            again = [history.told(t) for t in range(start, target)]
            self._is_sent_known = False
            try:
                self._drive.restore(capsule)
                for told in again:
                    self._send(self._drive.tell_again(told))
            except BaseException:  # Ctrl-C, say: somewhere between
                self._moved()
                raise
            history.cut_back(target)
            self._record("rewind", ticks)

    # -- running --------------------------------------------------------------------------------

    def run(
        self, environment: Environment, seconds: float, rate: float | None = None, seed: int = 0
    ) -> RunReport:
        """Drive an environment for some seconds of its time; see control_run.run."""
        from flashrt.robot.run import run  # control_run imports this module

        return run(self, environment, seconds, rate, seed)

    def record(self, path: str | os.PathLike[str]) -> AbstractContextManager[Recorder]:
        """In a `with` block: what the loop is told and answers goes to a file, written whole when
        the block ends. See recording.replay. Raises RecordingError when it cannot be written.
        """
        from flashrt.robot.recording import recorded  # which imports this module

        return recorded(self, path)

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

    def _step(self, observation: Array) -> Array:
        """What every tick is: the slack of the one before, a boundary to begin with, the graphs."""
        self.slack()
        if not self._history.boundaries:
            self._keep_boundary()
        if not self._is_sent_known and self.position > 0:
            self._send(self.engine.action(self._drive.lane))  # as before a restore
        self._is_settled = False
        try:
            return self._drive.step(observation)
        except BaseException:  # Ctrl-C, say: nobody knows whether the tick has happened
            self._history.clear()
            if self.recorder is not None:
                self.recorder.event("restore", digest=self.engine.digest(self._drive.lane))
            raise

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
        if self.recorder is not None:
            self.recorder.tick(observation, action, is_late=is_late)

    def _send(self, action: Array) -> None:
        self._sent[...], self._is_sent_known = action, True

    def _moved(self) -> None:
        """The lane is somewhere else."""
        self._is_settled, self._is_sent_known = True, False
        self._history.clear()

    def _settle(self) -> None:
        self._check_open()
        self.slack()

    def _keep_boundary(self) -> None:
        """A boundary for `rewind`; without room for any, only reach is lost."""
        with contextlib.suppress(PoolFull):
            self._history.keep(self._with_room(None))

    def _with_room(self, name: str | None) -> Capsule:
        while True:
            try:
                return self.engine.snapshot(self._drive.lane, name)
            except PoolFull:
                if not self._history.forget_oldest():
                    raise

    def _record(self, what: str, value: int = 0, capsule: Capsule | None = None) -> None:
        if self.recorder is not None:
            digest = NO_DIGEST if capsule is None else capsule.digest
            self.recorder.event(what, value, digest)

    def _check_open(self) -> None:
        if self.is_closed:
            raise SessionError("the control loop is closed; make another one")
