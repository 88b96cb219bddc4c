"""Driving an environment with a control loop, in real time or as fast as it goes.

IS: pacing, episodes, and a report. IS NOT: the environment, nor saving it (environment). Called by:
control (ControlLoop.run), commands bench_policy.

Instants are absolute: a late tick delays no later one. Python's garbage collector waits meanwhile,
and gets its turn between episodes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrt.base.errors import SessionError
from flashrt.robot.rollout import Environment, command_for, in_step, observation_of
from flashrt.robot.timing import Pace

if TYPE_CHECKING:
    from flashrt.robot.loop import ControlLoop


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run came to. `returns` are sums of rewards of whole episodes; `partial` of the last
    one, if it was not over. `stats` is the loop's afterwards.
    """

    ticks: int
    returns: tuple[float, ...]
    partial: float | None
    stats: dict[str, Any]


def run(
    loop: ControlLoop, environment: Environment, seconds: float, rate: float | None, seed: int
) -> RunReport:
    """`seconds` of the environment's time, one tick each 1/hz; episodes begin with seeds `seed`,
    `seed` + 1, ..., both of the environment and of the loop.

    rate: ticks per second of wall-clock time; None is the loop's hz; 0 is as fast as it goes.
    Raises EnvironmentFailed when the environment does: the loop is then at the tick before.
    """
    hz = loop.options.hz if rate is None else rate
    if not hz >= 0:
        raise SessionError(f"run: rate={rate} is negative")
    pace = Pace(int(1e9 / hz)) if hz else None
    to_command = command_for(environment)
    returns: list[float] = []
    total: float | None = None
    n_ticks = round(seconds * loop.options.hz)
    with collector_waits():
        for _ in range(n_ticks):
            if total is None:
                with in_step("reset"):
                    observation, _ = environment.reset(seed=seed + len(returns))
                loop.reset(seed + len(returns))
                total = 0.0
                gc.collect(0)
                pace = None if pace is None else Pace(pace.period_ns)
            action = _tick(loop, observation_of(observation), pace)
            try:
                with in_step("step"):
                    result = environment.step(to_command(action))
            except BaseException:
                loop.rewind_ticks(1)  # the environment did not take the action
                raise
            observation, reward, is_over, is_cut, _ = result
            total += float(reward)
            loop.slack()
            if pace is not None:
                loop.timing.overruns += pace.advance()
            if is_over or is_cut:
                returns.append(total)
                total = None
    return RunReport(n_ticks, tuple(returns), total, loop.stats())


def _tick(loop: ControlLoop, observation: Any, pace: Pace | None) -> Any:
    if pace is None:
        return loop.tick(observation)
    loop.timing.lateness.add(pace.wait())
    return loop.tick_due(observation, pace.due_ns)


@contextmanager
def collector_waits() -> Iterator[None]:
    """Automatic garbage collection is off in the block."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
