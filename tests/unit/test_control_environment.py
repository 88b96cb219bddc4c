"""Environments beside control loops: saved, restored and forked together; closed ones refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flashrt.base.errors import (
    CapsuleError,
    DeadlineMissed,
    EnvironmentFailed,
    LaneBusy,
    ObservationError,
    PoolFull,
    SessionError,
)
from flashrt.robot.environment import PlainState, command_for, layers, observation_of
from flashrt.robot.loop import ControlLoop
from flashrt.robot.rollout import Rollout
from flashrt.robot.run import run
from tests.numpy_policy import NumpyPolicy

gymnasium = pytest.importorskip("gymnasium")

SIZES = {
    "Pendulum-v1": (3, 1),
    "CartPole-v1": (4, 2),
    "MountainCarContinuous-v0": (2, 1),
    "Acrobot-v1": (6, 3),
    "FrozenLake-v1": (1, 4),
}
NAMES = list(SIZES)


def make(name: str) -> Callable[[], Any]:
    return lambda: gymnasium.make(name, max_episode_steps=60)


def rollout(name: str, lanes: int = 4) -> Rollout:
    n_seen, n_done = SIZES[name]
    engine = NumpyPolicy(lanes=lanes, observation_dim=n_seen, action_dim=n_done)
    return Rollout(make(name), ControlLoop(engine))


def walk(rolled: Rollout, n: int) -> list[tuple[bytes, bytes, float, bool]]:
    """Up to n steps: all that can be seen of them."""
    steps = []
    for _ in range(n):
        if rolled.is_over:
            break
        t = rolled.step()
        steps.append((t.following.tobytes(), t.action.tobytes(), t.reward, t.is_over))
    return steps


@pytest.mark.parametrize("name", NAMES)
def test_a_moment_is_both_halves(name: str) -> None:
    with rollout(name) as rolled:
        rolled.reset(seed=3)
        walk(rolled, 1)
        moment = rolled.snapshot("early")
        expected, digest = walk(rolled, 100), rolled.loop.digest()
        assert rolled.is_over and expected
        with pytest.raises(EnvironmentFailed, match="the episode is over"):
            rolled.step()
        for _ in range(2):  # the moment is not used up
            rolled.restore(moment)
            assert not rolled.is_over
            assert (walk(rolled, 100), rolled.loop.digest()) == (expected, digest)


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1", "FrozenLake-v1"])
def test_a_fork_forks_both(name: str) -> None:
    with rollout(name) as rolled:
        rolled.reset(seed=5)
        walk(rolled, 3)
        same, other = rolled.fork(2, seeds=[5, 77])
        moment = same.snapshot()
        futures = [walk(branch, 50) for branch in (same, other)]
        assert walk(rolled, 50) == futures[0]
        if name == "Pendulum-v1":
            assert futures[1] != futures[0]
        rolled.restore(moment)  # a fork's moment, taken over
        assert walk(rolled, 50) == futures[0]
        with pytest.raises(LaneBusy):
            rolled.fork(2)
        same.close()
        other.close()


def test_saved_states_are_copies() -> None:
    environment = gymnasium.make("CartPole-v1")
    environment.reset(seed=1)
    state = PlainState(environment)
    saved = state.save_state()
    for _ in range(2):
        seen = [environment.step(1)[0].tolist() for _ in range(5)]
        draws = environment.unwrapped.np_random.random(3).tolist()
        state.load_state(saved)
        assert [environment.step(1)[0].tolist() for _ in range(5)] == seen
        assert environment.unwrapped.np_random.random(3).tolist() == draws
        state.load_state(saved)
    elapsed = [vars(layer).get("_elapsed_steps") for layer in layers(environment)]
    assert 0 in elapsed, "the time limit's counter was put back, too"
    with pytest.raises(EnvironmentFailed, match="not one of an environment of"):
        state.load_state([{}])


def test_an_environment_with_state_elsewhere_is_refused() -> None:
    class Simulator:
        pass

    class Odd:
        def __init__(self) -> None:
            self.data, self.t = Simulator(), 0

    with pytest.raises(EnvironmentFailed, match=r"because of data \(Simulator\); give Rollout an"):
        PlainState(Odd()).save_state()


class Breakable:
    """Fails when it is told to."""

    def __init__(self) -> None:
        self.x, self.is_broken, self.is_closed = np.zeros(3), False, False

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.x = np.full(3, 0.01 * (seed or 0))
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.is_broken or self.is_closed:
            raise RuntimeError("no connection to the robot")
        self.x = self.x + 0.1 * action[0]
        return self.x.copy(), 1.0, False, False, {}

    def close(self) -> None:
        self.is_closed = True


def test_a_failing_environment_leaves_the_loop_where_it_was() -> None:
    rolled = Rollout(Breakable, ControlLoop(NumpyPolicy()))
    with pytest.raises(EnvironmentFailed, match="call reset first"):
        rolled.step()
    rolled.reset(1)
    for _ in range(3):
        walk(rolled, 5)
        digest = rolled.loop.digest()
        rolled.environment.is_broken = True
        with pytest.raises(EnvironmentFailed, match=r"failed in step: RuntimeError.*no connection"):
            rolled.step()
        assert rolled.loop.digest() == digest
        rolled.environment.is_broken = False
    twin = Rollout(Breakable, ControlLoop(NumpyPolicy()))
    twin.reset(1)
    walk(twin, 15)
    assert twin.loop.digest() == rolled.loop.digest()
    loop = rolled.loop
    rolled.close()
    rolled.close()
    for use in (rolled.step, rolled.reset, rolled.snapshot, rolled.fork):
        with pytest.raises(EnvironmentFailed, match="is closed; make another rollout"):
            use()
    assert loop.is_closed
    twin.environment.close()  # by somebody else
    digest = twin.loop.digest()
    with pytest.raises(EnvironmentFailed):
        twin.step()
    assert twin.loop.digest() == digest


def test_a_missed_deadline_leaves_loop_and_environment_in_step() -> None:
    """Red when on_miss="raise" leaves the loop a tick ahead of an environment that did not act."""
    loop = ControlLoop(NumpyPolicy(), deadline_ms=0, on_miss="raise")
    twin = Rollout(Breakable, ControlLoop(NumpyPolicy()))
    rolled = Rollout(Breakable, loop)
    for each in (rolled, twin):
        each.reset(1)
    for _ in range(3):
        with pytest.raises(DeadlineMissed):
            rolled.step()
        assert (loop.position, rolled.environment.x.tolist()) == (0, [0.01] * 3)
    with pytest.raises(DeadlineMissed):
        run(loop, rolled.environment, seconds=1, rate=0, seed=1)
    assert (loop.position, loop.digest()) == (0, twin.loop.digest())


def test_with_a_full_pool_a_failing_environment_leaves_the_loop_where_it_was() -> None:
    """Red when no boundary is left to take the tick back from."""
    rolled = Rollout(Breakable, ControlLoop(NumpyPolicy(room=4), 10.0, boundary_seconds=0.3))
    rolled.reset(1)
    walk(rolled, 5)
    with pytest.raises(PoolFull):
        while True:
            rolled.loop.snapshot()
    for _ in range(8):
        position, digest = rolled.loop.position, rolled.loop.digest()
        rolled.environment.is_broken = True
        with pytest.raises(EnvironmentFailed, match="failed in step"):
            rolled.step()
        assert (rolled.loop.position, rolled.loop.digest()) == (position, digest)
        rolled.environment.is_broken = False
        walk(rolled, 1)


class Fussy(PlainState):
    """Fails where it is told to, after it has changed something."""

    fails = False

    def load_state(self, state: object) -> None:
        super().load_state(state)
        if self.fails:
            Fussy.fails = False
            raise EnvironmentFailed("the simulator does not take this state")


def test_a_state_that_cannot_be_loaded_leaves_both_where_they_were() -> None:
    """Red when the loop is restored before the environment refuses."""
    rolled = Rollout(Breakable, ControlLoop(NumpyPolicy()), Fussy)
    rolled.reset(1)
    walk(rolled, 3)
    early = rolled.snapshot()
    walk(rolled, 6)
    here, digest, x = rolled.snapshot(), rolled.loop.digest(), rolled.environment.x.copy()
    expected = walk(rolled, 4)
    rolled.restore(here)
    Fussy.fails = True
    with pytest.raises(EnvironmentFailed, match="does not take this state"):
        rolled.restore(early)
    assert rolled.loop.digest() == digest and rolled.environment.x.tolist() == x.tolist()
    early.drop()
    with pytest.raises(CapsuleError):
        rolled.restore(early)
    with pytest.raises(SessionError, match="is not a moment"):
        rolled.restore(None)  # type: ignore[arg-type]
    assert rolled.environment.x.tolist() == x.tolist()
    assert walk(rolled, 4) == expected


def test_a_rollout_that_was_interrupted_in_a_step_says_so() -> None:
    """Red when it goes on with an environment that may have moved."""
    rolled = Rollout(Breakable, ControlLoop(NumpyPolicy()))
    rolled.reset(1)
    walk(rolled, 3)
    moment, expected = rolled.snapshot(), walk(rolled, 4)
    step = rolled.environment.step

    def interrupted(action: np.ndarray) -> None:
        step(action)
        raise KeyboardInterrupt

    rolled.environment.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        rolled.step()
    rolled.environment.step = step
    for use in (rolled.step, rolled.snapshot, rolled.fork, lambda: rolled.observation):
        with pytest.raises(EnvironmentFailed, match="reset the rollout, or restore a moment"):
            use()
    rolled.restore(moment)
    assert walk(rolled, 4) == expected


OLD_STEP = (np.zeros(3), 1.0, False, {})  # of gym before 0.26
SEEN = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (OLD_STEP, "a tuple of 4 values: an old gym environment"),
        (np.zeros(3), "step returned one ndarray; needed are five values"),
        (None, "step returned one NoneType"),
        ((SEEN, None, False, False, {}), "reward is None; a finite number"),
        ((SEEN, float("nan"), False, False, {}), "reward is nan"),
        ((SEEN, "1.0", False, False, {}), r"reward is '1\.0'"),
        ((SEEN, np.zeros(2), False, False, {}), r"reward is array\(\[0\., 0\.\]\)"),
        ((SEEN, 1.0, np.zeros(2), False, {}), "failed in step: ValueError"),
        ((None, 1.0, False, False, {}), "observation: a NoneType that holds more than numbers"),
        (("1.5", 1.0, False, False, {}), "observation: a str that holds more"),
        (([[0.0], [1.0, 2.0]], 1.0, False, False, {}), "numpy cannot read this list"),
        (({"a": {"b": 1.0}}, 1.0, False, False, {}), r"observation\['a'\]: a dict that holds more"),
    ],
)
def test_a_step_that_is_no_step_leaves_the_loop_where_it_was(result: Any, said: str) -> None:
    """Red when a step is unpacked outside of the guarded part: the loop was a tick ahead then."""
    rolled = Rollout(Breakable, ControlLoop(NumpyPolicy()))
    rolled.reset(1)
    walk(rolled, 5)
    position, digest = rolled.loop.position, rolled.loop.digest()
    environment, step = rolled.environment, rolled.environment.step
    environment.step = lambda action: result
    with pytest.raises((EnvironmentFailed, ObservationError), match=said):
        rolled.step()
    assert (rolled.loop.position, rolled.loop.digest()) == (position, digest)
    environment.step = step
    walk(rolled, 1)

    left = iter(range(5))
    environment.step = lambda action: result if next(left, None) is None else step(action)
    with pytest.raises((EnvironmentFailed, ObservationError), match=said):
        run(rolled.loop, environment, seconds=1, rate=0, seed=1)
    assert (rolled.loop.position, rolled.loop.digest()) == (position, digest)


@pytest.mark.parametrize("result", [np.zeros(3), [0.0, 1.0], (SEEN, 1.0), (SEEN, {}, 1), None])
def test_a_reset_that_returns_no_pair_is_refused(result: Any) -> None:
    """Red when an observation of two numbers is taken for (observation, info)."""
    rolled = Rollout(Breakable, ControlLoop(NumpyPolicy()))
    rolled.reset(1)
    walk(rolled, 5)
    digest = rolled.loop.digest()
    rolled.environment.reset = lambda seed=None: result
    with pytest.raises(EnvironmentFailed, match=r"a pair \(observation, info\) is needed"):
        rolled.reset(2)
    with pytest.raises(EnvironmentFailed, match=r"a pair \(observation, info\) is needed"):
        run(rolled.loop, rolled.environment, 1, rate=0)
    for seed in (None, 1.0, True, -1):
        with pytest.raises(SessionError, match="seed="):
            rolled.reset(seed)  # type: ignore[arg-type]
    assert rolled.loop.digest() == digest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seconds": -1}, "seconds=-1 is not"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"seconds": float("inf")}, "seconds=inf"),
        ({"seconds": None}, "seconds=None"),
        ({"seconds": 1, "rate": 1e12}, r"rate=1000000000000\.0 is not"),
        ({"seconds": 1, "rate": float("nan")}, "rate=nan"),
        ({"seconds": 1, "rate": -1}, "rate=-1"),
        ({"seconds": 1, "rate": "0"}, "rate='0'"),
        ({"seconds": 1, "seed": None}, "seed=None"),
        ({"seconds": 1, "seed": 0.0}, r"seed=0\.0"),
    ],
)
def test_run_refuses_what_makes_no_sense(options: dict[str, Any], said: str) -> None:
    """Red when seconds=-1 reports -50 ticks, or rate=1e12 divides by zero after the first tick."""
    loop = ControlLoop(NumpyPolicy())
    loop.tick(SEEN)
    digest = loop.digest()
    with pytest.raises(SessionError, match=said):
        run(loop, Breakable(), **options)
    assert (loop.position, loop.digest()) == (1, digest)


def test_run_counts_episodes() -> None:
    engine = NumpyPolicy(observation_dim=3, action_dim=1)
    loop = ControlLoop(engine, 20.0)
    report = run(loop, make("Pendulum-v1")(), seconds=8.0, rate=0, seed=4)
    assert report.ticks == 160 and len(report.returns) == 2 and report.partial is not None
    assert run(loop, make("Pendulum-v1")(), seconds=8.0, rate=0, seed=4).returns == report.returns
    assert report.stats["ticks"] == 160 and "lateness_p50_s" not in report.stats


def test_run_keeps_pace() -> None:
    loop = ControlLoop(NumpyPolicy(), 200.0)
    report = run(loop, Breakable(), seconds=0.25)
    assert report.ticks == 50 and report.returns == () and report.partial == 50.0
    assert report.stats["lateness_p50_s"] >= 0
    assert report.stats["latency_max_s"] > 0


def test_run_stops_where_the_environment_fails() -> None:
    loop, environment = ControlLoop(NumpyPolicy()), Breakable()
    step, count = environment.step, iter(range(100))
    environment.step = lambda action: step(action) if next(count) < 9 else step(None)
    with pytest.raises(EnvironmentFailed):
        run(loop, environment, seconds=1.0, rate=0)
    assert loop.position == 9


def test_commands_and_observations() -> None:
    n = np.array([-1.0, 0.5, 0.2], np.float32)
    assert command_for(gymnasium.make("Acrobot-v1"))(n) == 1
    box = command_for(gymnasium.make("Pendulum-v1"))
    assert box(n[:1]).tolist() == [-1.0]
    assert box(np.array([2.1], np.float32)).tolist() == [2.0], "no action leaves the space"
    named = {"observation.state": [1.0, 2.0], "goal": np.array([[3.0]])}
    assert observation_of(named).tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(EnvironmentFailed, match="Box or Discrete"):
        odd = gymnasium.make("CartPole-v1")
        odd.action_space = gymnasium.spaces.MultiBinary(3)
        command_for(odd)


def test_gymnasium_is_not_imported() -> None:
    code = "import sys, flashrt, flashrt.robot; print('gymnasium' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == "False", result.stderr
