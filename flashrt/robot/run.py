"""Driving an environment with a control loop, in real time or as fast as it goes.

IS: pacing, episodes, and a report. IS NOT: the environment, nor saving it (environment).

Instants are absolute: a late tick delays no later one. Python's garbage collector waits meanwhile,
and gets its turn between episodes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flashrt.base.checks import as_number
from flashrt.robot.environment import (
    Environment,
    command_for,
    reset_environment,
    step_environment,
)
from flashrt.robot.loop import ControlLoop
from flashrt.robot.options import checked_hz, checked_seconds, checked_seed
from flashrt.robot.policy import Array, packing
from flashrt.robot.timing import Pace


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
    loop: ControlLoop,
    environment: Environment,
    seconds: float,
    rate: float | None = None,
    seed: int = 0,
) -> RunReport:
    """`seconds` of the environment's time, one tick each 1/hz; episodes begin with seeds `seed`,
    `seed` + 1, ..., both of the environment and of the loop.

    rate: ticks per second of wall-clock time; None is the loop's hz; 0 is as fast as it goes.
    Raises SessionError for arguments out of range; EnvironmentFailed when the environment fails,
    ObservationError for an observation that the policy cannot take, and DeadlineMissed where the
    loop is to raise it: the loop is then at the tick before.
    """
    n_ticks = round(checked_seconds("run: seconds", seconds) * loop.options.hz)
    seed = checked_seed(seed)
    pace = _pace(loop.options.hz if rate is None else rate)
    to_command, pack = command_for(environment), packing(loop.engine)
    returns: list[float] = []
    total: float | None = None
    with collector_waits():
        for _ in range(n_ticks):
            if total is None:
                episode_seed = checked_seed(seed + len(returns))
                observation = reset_environment(environment, episode_seed, pack)
                loop.reset(episode_seed)
                total = 0.0
                gc.collect(0)
                pace = None if pace is None else Pace(pace.period_ns)
            position = loop.position
            try:
                action = _tick(loop, observation, pace)
                result = step_environment(environment, to_command, action, pack)
            except BaseException:
                if loop.position > position:
                    loop.rewind_ticks(1)  # the environment did not take the action
                raise
            observation = result.observation
            total += result.reward
            loop.slack()
            if pace is not None:
                loop.timing.overruns += pace.advance()
            if result.is_over:
                returns.append(total)
                total = None
    return RunReport(n_ticks, tuple(returns), total, loop.stats())


def _pace(rate: float) -> Pace | None:
    """None for a rate of 0: as fast as it goes."""
    return None if as_number(rate) == 0 else Pace(int(1e9 / checked_hz("run: rate", rate)))


def _tick(loop: ControlLoop, observation: Array, pace: Pace | None) -> Array:
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
