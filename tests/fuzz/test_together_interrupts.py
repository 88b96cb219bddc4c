"""An exception before any line of a call of several loops: of each the call has happened or not.

Red when a loop's lane, record and history disagree afterwards, when one is in a state that no loop
alone comes to, or when a lock, a lane or a block is lost. Every line is struck in the slow suite,
one in some in the quick one.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import EnvironmentFailed
from flashrt.engine.actions import ActionEngine
from flashrt.robot import slack_together, step_together, tick_together
from flashrt.robot.rollout import Rollout
from flashrt.weights.random_policy import write_random_policy
from tests.fuzz.injector import Injector, Struck
from tests.fuzz.test_loop_interrupts import OPTIONS, ROOMS, SEEN, Drift, Outcome, future, outcome

LANES = 4


class Scene:
    """Three loops in the middle of an episode: one with a chunk half made, one that an interrupt
    left without actions, one whose chunk is due. Slacks are due, and with them boundaries.
    """

    def __init__(self, engine: ActionEngine) -> None:
        self.loops = [
            flashrt.ControlLoop(engine, 50.0, seed=seed, **{**OPTIONS, "overlap": overlap})
            for seed, overlap in ((3, 3), (4, 1), (5, 1))
        ]
        for i, seen in enumerate(SEEN[:14]):
            for loop in self.loops:
                loop.tick(seen)
                if i < 13:
                    loop.slack()
        self.loops[1].interrupt()
        self.loops[0].tick(SEEN[14])
        self.loops[2].tick(SEEN[14])

    def tick(self, at: int) -> None:
        tick_together(self.loops, SEEN[at : at + 3])

    def slack(self) -> None:
        slack_together(self.loops)

    def close(self) -> None:
        for loop in self.loops:
            loop.close()


# What is struck, and the calls before it that a loop may have come to.
CALLS: dict[str, list[Callable[[Scene], None]]] = {
    "tick": [lambda s: s.tick(15)],
    "slack": [lambda s: s.slack()],
    "ticks": [lambda s: s.tick(15), lambda s: s.slack(), lambda s: s.tick(20)],
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActionEngine]:
    folder = write_random_policy(tmp_path_factory.mktemp("policy") / "tiny", "tiny", seed=3)
    made = flashrt.load_policy(folder, device="cpu", lanes=LANES)
    yield made
    made.close()


def held(locks: list[Any]) -> list[Any]:
    """Those that this thread never gave back."""

    def free(lock: Any) -> bool:
        is_free = bool(lock.acquire(blocking=False))
        if is_free:
            lock.release()
        return is_free

    with ThreadPoolExecutor(1) as other:
        return [lock for lock in locks if not other.submit(free, lock).result()]


def told(engine: ActionEngine, calls: list[Callable[[Scene], None]]) -> list[Outcome]:
    """What each loop comes to."""
    scene = Scene(engine)
    for call in calls:
        call(scene)
    found = [outcome(loop) for loop in scene.loops]
    scene.close()
    return found


def check(engine: ActionEngine, scene: Scene, expected: list[list[Outcome]]) -> None:
    assert not held([engine.turn.lock, *(loop.lock for loop in scene.loops)])
    for index, loop in enumerate(scene.loops):
        found = outcome(loop)
        assert any(found.is_like(each[index]) for each in expected), (index, found)
    engine.capsules.check_integrity()
    scene.close()
    assert engine.capsules.pool.used_nbytes == 0
    assert len(engine.free_lanes) == LANES, "no lane is lost"


def strike_all(engine: ActionEngine, name: str, n: int) -> None:
    """One line in `n`."""
    calls, injector = CALLS[name], Injector(ROOMS)
    expected = [told(engine, calls[:done]) for done in range(len(calls) + 1)]
    scene = Scene(engine)
    n_lines = injector.count(lambda: [call(scene) for call in calls])
    scene.close()
    points = range(sum(name.encode()) % n, n_lines, n)
    for at in points:
        scene = Scene(engine)
        assert injector.strike(lambda: [call(scene) for call in calls], at)  # noqa: B023
        try:
            check(engine, scene, expected)
        except BaseException as error:
            raise AssertionError(f"{name}, struck before line {at}: {injector.where}") from error
    assert len(points) > 300 // n


@pytest.mark.parametrize("name", CALLS)
def test_some_lines(engine: ActionEngine, name: str) -> None:
    strike_all(engine, name, 37)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_more_lines(engine: ActionEngine, name: str, request: pytest.FixtureRequest) -> None:
    """--stride 1 strikes every line."""
    strike_all(engine, name, max(1, request.config.getoption("--stride") // 3))


def test_a_doubt_that_is_not_declared_shows(
    engine: ActionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a lane that moves under a record that stands."""
    monkeypatch.setattr(flashrt.ControlLoop, "doubt", lambda loop: None)
    with pytest.raises(AssertionError, match="struck before line"):
        strike_all(engine, "tick", 37)
    for lane in engine.lanes:
        engine.release(lane)


# -- environments beside them ---------------------------------------------------------------------


class Paired:
    """Rollouts in the middle of an episode, a tick apart."""

    def __init__(self, engine: ActionEngine) -> None:
        self.rollouts = [Rollout(Drift, flashrt.ControlLoop(engine, 50.0, **OPTIONS)) for _ in "ab"]
        for seed, rollout in enumerate(self.rollouts):
            rollout.reset(seed)
            for _ in range(8 + seed):
                rollout.step()

    def step(self) -> None:
        step_together(self.rollouts)

    def close(self) -> None:
        for rollout in self.rollouts:
            rollout.close()


def strike_pairs(engine: ActionEngine, n: int) -> None:
    """One line in `n`."""
    injector, expected = Injector(ROOMS), []
    for steps in range(2):
        pair = Paired(engine)
        for _ in range(steps):
            pair.step()
        expected.append([future(rollout) for rollout in pair.rollouts])
        pair.close()
    pair = Paired(engine)
    n_lines = injector.count(pair.step)
    pair.close()
    n_apart, points = 0, range(3, n_lines, n)
    for at in points:
        pair = Paired(engine)
        assert injector.strike(pair.step, at)
        is_apart = []
        try:
            for index, rollout in enumerate(pair.rollouts):
                try:
                    assert future(rollout) in [each[index] for each in expected]
                except EnvironmentFailed as error:
                    assert "reset the rollout, or restore a moment" in f"{error}"
                    is_apart.append(index)
            assert len(is_apart) < 2, "one environment moves at a time"
            assert not held([engine.turn.lock, *(each.lock for each in pair.rollouts)])
        except BaseException as error:
            raise AssertionError(f"struck before line {at}: {injector.where}") from error
        n_apart += len(is_apart)
        pair.close()
        assert engine.capsules.pool.used_nbytes == 0
    assert n_apart < len(points) // 2


def test_some_lines_beside_environments(engine: ActionEngine) -> None:
    strike_pairs(engine, 29)


@pytest.mark.slow
def test_more_lines_beside_environments(
    engine: ActionEngine, request: pytest.FixtureRequest
) -> None:
    strike_pairs(engine, max(1, request.config.getoption("--stride") // 3))


# -- signals --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signals_at_any_instant(engine: ActionEngine) -> None:
    """Real ones, which fall where the interpreter looks for them: after calls and in loops."""
    rng, calls = np.random.default_rng(5), CALLS["ticks"]
    expected = [told(engine, calls[:done]) for done in range(len(calls) + 1)]

    def strike(number: int, frame: object) -> None:
        raise Struck("a signal")

    before, n_struck = signal.signal(signal.SIGALRM, strike), 0
    try:
        for _ in range(300):
            scene = Scene(engine)
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-3))
                for call in calls:
                    call(scene)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Struck:
                n_struck += 1
            check(engine, scene, expected)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert n_struck > 30
