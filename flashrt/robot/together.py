"""Control loops of one engine side by side: their ticks and slacks share replays.

IS: which loops are one replay, and what becomes of the others when one fails. IS NOT: a tick
(loop), or when to plan (schedule). Actions, states, records and what listeners hear are those of
each loop alone, to the bit; and for each loop alone an interrupted call has happened or it has not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from flashrt.base.checks import shown
from flashrt.base.errors import SessionError
from flashrt.base.locks import while_holding
from flashrt.capsule.turn import Turn, exclusive
from flashrt.engine.numbers import checked_action
from flashrt.robot.history import LoopState
from flashrt.robot.loop import ControlLoop, Took, checked_observations
from flashrt.robot.policy import Array, Observation, sharing
from flashrt.robot.schedule import run_slack_together, run_tick_together

_R = TypeVar("_R")


def tick_together(loops: Sequence[ControlLoop], observations: Sequence[Observation]) -> list[Array]:
    """`tick` of several loops of one engine, each with its own observation; the action of each,
    float32 [action_dim]. Deadlines count from this call.

    Those that have an action share one replay, those that plan first share three; slacks that were
    not given are made up for together, too. More loops than a replay takes (16, on a policy of
    flashrt) take turns. A policy of your own without the verbs of `SharedVerbs` ticks one by one.

    Raises SessionError for loops of several engines, a loop that is closed or named twice, and
    another number of observations; ObservationError as `tick` does: no loop has ticked then. What
    befalls one later (DeadlineMissed under on_miss="raise", CheckpointError for an action that is
    not finite, a listener that fails) is raised when the others have ticked, with a note of whose
    it is; `loop.engine.action(loop.lane)` is what each is to execute.
    """
    due_ns = time.perf_counter_ns()
    groups = _groups("tick_together", loops)
    if len(observations) != len(loops):
        raise SessionError(
            f"tick_together: {len(observations)} observations for {len(loops)} loops"
        )
    if not loops:
        return []
    seen = checked_observations(loops[0].engine, observations)
    if len(groups) > 1:
        for group in groups:  # what is wrong with a loop shows before any ticks
            group.prepare()
    failures: list[Exception] = []
    actions = [group.tick(seen, due_ns, failures) for group in groups]
    if failures:
        raise failures[0]
    return [action for some in actions for action in some]


def slack_together(loops: Sequence[ControlLoop]) -> None:
    """`slack` of several loops of one engine: chunks that are due share one replay or, where they
    are made in slices (overlap > 1), one for each Euler step that several are at.

    Raises SessionError for loops of several engines, and a loop that is closed or named twice. What
    befalls one later is raised when the others had their slack.
    """
    failures: list[Exception] = []
    for group in _groups("slack_together", loops):
        group.slack(failures)
    if failures:
        raise failures[0]


class _Group:
    """Loops that share replays: some of those that were named, from number `first` on."""

    def __init__(self, loops: Sequence[ControlLoop], first: int) -> None:
        self.turn: Turn = loops[0].turn
        self.lock = loops[0].lock
        self._loops = loops
        self._first = first
        self._engine = sharing(loops[0].engine) if len(loops) > 1 else None
        # In one order for every thread, that of `adopt`, so that none waits forever.
        self._locks = [loop.lock for loop in sorted(loops, key=id)]

    def prepare(self) -> None:
        """All can tick. Raises what is wrong with one."""
        self._holding(self._prepare)

    def tick(self, seen: Sequence[Array], due_ns: int, failures: list[Exception]) -> list[Array]:
        """What each executes, but for those that something befell. `seen` by all loops."""
        seen = seen[self._first : self._first + len(self._loops)]
        if self._engine is not None:
            return self._holding(lambda: self._tick(seen, due_ns, failures))
        actions: list[Array] = []
        for index, loop in enumerate(self._loops):
            try:
                actions.append(loop.tick_due(seen[index], due_ns))
            except Exception as error:
                self._note(error, index, failures)
        return actions

    def slack(self, failures: list[Exception]) -> None:
        """What the last tick of each left to be done."""
        self._holding(lambda: self._slack(failures))

    @exclusive
    def _prepare(self) -> list[LoopState]:
        if any(loop.is_slack_due for loop in self._loops):
            failures: list[Exception] = []
            self._slack(failures)
            if failures:
                raise failures[0]
        return self._ask(ControlLoop.ready)

    @exclusive
    def _tick(self, seen: Sequence[Array], due_ns: int, failures: list[Exception]) -> list[Array]:
        assert self._engine is not None
        states = self._prepare()
        for loop in self._loops:
            loop.doubt()
        found = run_tick_together(self._engine, [loop.lane for loop in self._loops], seen)
        took = Took(due_ns, due_ns, time.perf_counter_ns())
        actions: list[Array] = []
        for index, loop in enumerate(self._loops):
            try:
                action = checked_action(found[index])
                actions.append(loop.end_tick(states[index], seen[index], action, took))
            except Exception as error:  # of any kind: what befalls one is not the others'
                self._note(error, index, failures)
        return actions

    @exclusive
    def _slack(self, failures: list[Exception]) -> None:
        started_ns = time.perf_counter_ns()
        states = self._ask(ControlLoop.recovered)
        due = [index for index, state in enumerate(states) if not state.is_slack_done]
        loops = [self._loops[index] for index in due]
        if self._engine is None or len(due) < 2:
            for index, loop in zip(due, loops, strict=True):
                try:
                    loop.slack()
                except Exception as error:
                    self._note(error, index, failures)
            return
        for loop in loops:
            loop.doubt()
        lanes, overlaps = [loop.lane for loop in loops], [loop.options.overlap for loop in loops]
        is_planned = run_slack_together(self._engine, lanes, overlaps)
        spent_ns = time.perf_counter_ns() - started_ns
        for index, loop, planned in zip(due, loops, is_planned, strict=True):
            try:
                loop.end_slack(states[index], spent_ns if planned else None)
            except Exception as error:
                self._note(error, index, failures)

    def _ask(self, ask: Callable[[ControlLoop], LoopState]) -> list[LoopState]:
        """The record of each. Raises what is wrong with one."""
        states: list[LoopState] = []
        try:
            for loop in self._loops:
                states.append(ask(loop))
        except Exception as error:
            index = self._first + len(states)
            error.add_note(f"of loop {index} of those together; none has ticked")
            raise
        return states

    def _note(self, error: Exception, index: int, failures: list[Exception]) -> None:
        error.add_note(f"in loop {self._first + index} of those together; the others went on")
        failures.append(error)

    def _holding(self, work: Callable[[], _R]) -> _R:
        """`work()`, an exclusive method, while nobody else is in a call of one of the loops."""
        return work() if self.turn.is_mine() else while_holding(self._locks, work)


def _groups(what: str, loops: Sequence[ControlLoop]) -> list[_Group]:
    for index, loop in enumerate(loops):
        if not isinstance(loop, ControlLoop):
            raise SessionError(f"{what}: loop {index} is no control loop: {shown(loop)}")
        if loop.is_closed:
            raise SessionError(f"{what}: control loop {index} is closed; make another one")
        if loop.engine is not loops[0].engine:
            raise SessionError(f"{what}: loops 0 and {index} are of two engines; a replay has one")
    if len(set(map(id, loops))) < len(loops):
        raise SessionError(f"{what}: a loop is named twice; fork it first")
    shared = sharing(loops[0].engine) if loops else None
    most = 1 if shared is None else shared.most_together
    return [_Group(loops[at : at + most], at) for at in range(0, len(loops), most)]
