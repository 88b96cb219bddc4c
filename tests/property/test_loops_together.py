"""Promise: loops that share replays are, to the bit, what each is alone: actions, states, records,
what their listeners hear; and what goes wrong in one stays there.

A life is told twice by the same dice, once by each loop's own verbs and once together.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import (
    CheckpointError,
    DeadlineMissed,
    EnvironmentFailed,
    ObservationError,
    SessionError,
)
from flashrt.engine.actions import ActionEngine
from flashrt.load import load_policy
from flashrt.models.policies import policy_for
from flashrt.robot import together
from flashrt.robot.loop import ControlLoop
from flashrt.robot.policy import sharing
from flashrt.robot.rollout import Rollout, step_together
from flashrt.robot.schedule import run_slack_together, run_tick_together
from flashrt.robot.together import slack_together, tick_together
from flashrt.weights.checkpoint import open_checkpoint
from flashrt.weights.random_policy import write_random_policy
from tests.numpy_policy import NumpyLane, NumpyPolicy

LANES = 20  # more than a replay takes
SEEN = np.random.default_rng(8).normal(size=(64, 64)).astype(np.float32)
DONE = np.random.default_rng(9).uniform(-1, 1, size=(8, 16)).astype(np.float32)
OPTIONS: tuple[dict[str, Any], ...] = (  # a deadline of 0 is always missed
    {"overlap": 1}, {"overlap": 1}, {"overlap": 3}, {"overlap": 0}, {"overlap": 4}, {"overlap": 3},
    {"overlap": 1, "deadline_ms": 0, "on_miss": "hold"},
    {"overlap": 2, "deadline_ms": 0, "on_miss": "last"},
    {"overlap": 1, "deadline_ms": 0, "on_miss": "raise"},
    {"overlap": 3, "deadline_ms": 0, "on_miss": "hold", "hold_action": [0.5, -0.5]},
)  # fmt: skip


class SharedNumpyPolicy(NumpyPolicy):
    """With the verbs of several lanes, of three at most."""

    most_together = 3

    def observe_together_trusted(self, lanes: Sequence[NumpyLane], seen: Sequence[Any]) -> None:
        for lane, observation in self.pairs(lanes, seen):
            self.observe(lane, observation)

    def act_together(self, lanes: Sequence[NumpyLane]) -> list[Any]:
        return [self.act(lane) for lane, _ in self.pairs(lanes, lanes)]

    def tick_together_trusted(self, lanes: Sequence[NumpyLane], seen: Sequence[Any]) -> list[Any]:
        return [self.tick(lane, observation) for lane, observation in self.pairs(lanes, seen)]

    def plan_together(self, lanes: Sequence[NumpyLane], committed: int) -> None:
        for lane, _ in self.pairs(lanes, lanes):
            self.plan(lane, committed)

    def begin_plan_together(self, lanes: Sequence[NumpyLane], committed: Sequence[int]) -> None:
        for lane, n in self.pairs(lanes, committed):
            self.begin_plan(lane, n)

    def continue_plan_together(self, lanes: Sequence[NumpyLane]) -> bool:
        assert len({lane.state.plan_steps_left for lane in lanes}) == 1
        done = [self.continue_plan(lane) for lane, _ in self.pairs(lanes, lanes)]
        return all(done)

    def pairs(self, lanes: Sequence[NumpyLane], each: Sequence[Any]) -> list[tuple[NumpyLane, Any]]:
        assert 1 <= len(lanes) <= self.most_together and len({id(lane) for lane in lanes}) == len(
            lanes
        )
        self.log.append(("together", len(lanes)))
        return list(zip(lanes, each, strict=True))


class Heard:
    """A listener that writes down all that it hears."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def tick(self, observation: Any, action: Any, *, is_late: bool) -> None:
        self.log.append(("tick", observation.tobytes(), action.tobytes(), is_late))

    def override(self, executed: Any) -> None:
        self.log.append(("override", executed.tobytes()))

    def slack(self, digest: str | None) -> None:
        self.log.append(("slack", digest))

    def event(self, what: str, value: int = 0, digest: str | None = None) -> None:
        self.log.append((what, value, digest))


def tick_each(loops: Sequence[ControlLoop], seen: Sequence[Any]) -> list[Any]:
    """What `tick_together` stands for."""
    actions, missed = [], None
    for loop, observation in zip(loops, seen, strict=True):
        try:
            actions.append(loop.tick(observation))
        except DeadlineMissed as error:
            missed = missed or error
    if missed is not None:
        raise missed
    return actions


def slack_each(loops: Sequence[ControlLoop]) -> None:
    for loop in loops:
        loop.slack()


Verbs = tuple[Callable[..., Any], Callable[..., Any]]
ALONE: Verbs = (tick_each, slack_each)
TOGETHER: Verbs = (tick_together, slack_together)


def life(engine: Any, verbs: Verbs, seed: int, steps: int, n_loops: int = 18) -> list[Any]:
    """All that shows of some loops, thrown by dice."""
    rng, (tick, slack) = np.random.default_rng(seed), verbs
    loops: list[ControlLoop] = []
    heard: list[Heard] = []

    def some(high: int) -> int:
        return int(rng.integers(high))

    def add(loop: ControlLoop) -> None:
        loops.append(loop)
        heard.append(Heard())
        loop.listener = heard[-1]

    for i in range(n_loops):
        options = OPTIONS[i % len(OPTIONS)]
        add(ControlLoop(engine, 20.0, seed=i, keep_seconds=1, boundary_seconds=0.35, **options))
    log: list[Any] = []
    dim, act = engine.config.observation_dim, engine.config.action_dim
    for _ in range(steps):
        group = [loops[i] for i in rng.permutation(len(loops))[: 1 + some(len(loops))]]
        for _ in range(1 + some(5)):
            seen = [SEEN[some(64), :dim] for _ in group]
            if some(2):
                seen = [each.astype(np.float64) for each in seen]
            try:
                log.append([action.tobytes() for action in tick(group, seen)])
            except DeadlineMissed as error:
                log.append(type(error))
            log.append([engine.action(loop.lane).tobytes() for loop in group])
            if some(4) == 0:
                group[0].executed(DONE[some(8), :act])
            if some(3):
                slack(group if some(3) else group[::2])
        loop, other = loops[some(len(loops))], loops[some(len(loops))]
        match some(8):
            case 0:
                loop.interrupt(some(5))
            case 1:
                loop.set_seed(some(99))
            case 2:
                loop.rewind_ticks(min(some(9), loop._state.end - loop._state.first))
            case 3:
                capsule = loop.snapshot()
                log.append(capsule.digest)
                other.restore(capsule)
                capsule.drop()
            case 4 if len(loops) < len(engine.lanes):
                add(loop.fork(1, [some(99)])[0])
            case 5 if len(loops) > 2:
                gone = some(len(loops))
                loops.pop(gone).close()
                log.append(heard.pop(gone).log)
            case 6:
                loop.adopt(other)
            case 7:
                loop.reset(some(99))
        log.append(
            [(each.position, each.stats()["ticks"], each.stats()["misses"]) for each in loops]
        )
        if some(3) == 0:
            log.append([each.digest() for each in loops])
    log.append([(each.digest(), h.log) for each, h in zip(loops, heard, strict=True)])
    for each in loops:
        each.close()
    return log


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_policy(tmp_path_factory.mktemp("policy") / "tiny", "tiny", seed=3)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[ActionEngine]:
    made = load_policy(checkpoint, device="cpu", lanes=LANES)
    yield made
    made.close()


def replays(engine: ActionEngine, call: Callable[[], object]) -> int:
    before = engine.stats()["replays"]
    call()
    return int(engine.stats()["replays"] - before)


@pytest.mark.parametrize("seed", range(4))
def test_lives_together_are_lives_alone(engine: ActionEngine, seed: int) -> None:
    """Fault: a loop's action, deadline, boundary, record or listener is another's, or lost."""
    logs: list[list[Any]] = []
    alone = replays(engine, lambda: logs.append(life(engine, ALONE, seed, 40)))
    shared = replays(engine, lambda: logs.append(life(engine, TOGETHER, seed, 40)))
    assert logs[0] == logs[1]
    assert shared < alone * 2 / 3
    engine.arena.check_guards()
    engine.capsules.check_integrity()
    assert engine.stats()["pool_used_bytes"] == 0


@pytest.mark.parametrize("policy", [NumpyPolicy, SharedNumpyPolicy])
def test_policies_of_your_own_with_the_shared_verbs_and_without(policy: type[NumpyPolicy]) -> None:
    """Fault: a policy without them is asked for them, or one with them is not."""
    alone, shared = policy(lanes=9, room=400), policy(lanes=9, room=400)
    is_sharing = policy is SharedNumpyPolicy
    assert (sharing(shared) is not None) == is_sharing
    assert life(alone, ALONE, 5, 60, 7) == life(shared, TOGETHER, 5, 60, 7)
    sizes = {entry[1] for entry in shared.log if entry[0] == "together"}
    assert sizes == ({1, 2, 3} if is_sharing else set())


def test_lives_together_on_simt(checkpoint: Path) -> None:
    """On the raw CUDA kernels, under a random schedule of their threads."""
    engine = ActionEngine(*policy_for(open_checkpoint(checkpoint)), SimtDevice(seed=3), lanes=4)
    assert life(engine, ALONE, 2, 4, 3) == life(engine, TOGETHER, 2, 4, 3)
    engine.arena.check_guards()
    engine.close()


def rolled(engine: Any, lanes: Any, seen: Any) -> Any:
    return run_tick_together(engine, lanes, [*seen[1:], seen[0]])


def swapped(engine: Any, lanes: Any, seen: Any) -> Any:
    return run_tick_together(engine, lanes, seen)[::-1]


def one_overlap(engine: Any, lanes: Any, overlaps: Any) -> Any:
    return run_slack_together(engine, lanes, [overlaps[0]] * len(overlaps))


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (together, "run_tick_together", rolled),
        (together, "run_tick_together", swapped),
        (together, "run_slack_together", one_overlap),
        (together, "run_slack_together", lambda engine, lanes, overlaps: [False] * len(lanes)),
    ],
)
def test_negative_controls(
    engine: ActionEngine, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any
) -> None:
    """What is broken on purpose is found."""
    expected = life(engine, ALONE, 1, 20)
    monkeypatch.setattr(owner, name, wrong)
    assert life(engine, TOGETHER, 1, 20) != expected


# -- how many replays ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "first", "going", "plan"),
    [(1, 3, 1, 1), (0, 3, 1, 0), (3, 3, 1, None)],
)
def test_eight_loops_take_the_replays_of_one(
    engine: ActionEngine, overlap: int, first: int, going: int, plan: int | None
) -> None:
    """Fault: a verb goes lane by lane."""
    loops = [ControlLoop(engine, overlap=overlap, seed=i) for i in range(8)]
    one = ControlLoop(engine, overlap=overlap)
    dim = engine.config.observation_dim
    for n in range(9):
        seen = list(SEEN[8 * n % 56 :][:8, :dim])
        ticks = replays(engine, lambda: tick_together(loops, seen))  # noqa: B023
        assert ticks == replays(engine, lambda: one.tick(seen[0]))  # noqa: B023
        assert ticks == (first if n == 0 or (overlap == 0 and n % 4 == 0) else going)
        slacks = replays(engine, lambda: slack_together(loops))
        assert slacks == replays(engine, one.slack)
        if plan is not None:
            assert slacks == (plan if n % 4 == 3 else 0)
    loops[5].interrupt()
    assert replays(engine, lambda: tick_together(loops, SEEN[:8, :dim])) == 4
    for loop in [*loops, one]:
        loop.close()


# -- refusals, and what befalls one --------------------------------------------------------------


@pytest.fixture
def loops(engine: ActionEngine) -> Iterator[list[ControlLoop]]:
    made = [ControlLoop(engine, seed=i) for i in range(18)]
    dim = engine.config.observation_dim
    for n in range(3):
        tick_together(made, SEEN[18 * n : 18 * (n + 1), :dim])
    yield made
    for loop in made:
        loop.close()


def test_what_is_refused_changes_no_loop(engine: ActionEngine, loops: list[ControlLoop]) -> None:
    """Fault: a loop ticks, or replays, before the last of all loops was looked at."""
    other, closed = ControlLoop(NumpyPolicy()), ControlLoop(engine)
    closed.close()
    good = SEEN[:18, : engine.config.observation_dim]
    nan = good.copy()
    nan[17, 1] = np.nan
    slack_together(loops)
    before, log = [loop.digest() for loop in loops], []
    count = engine.stats()["replays"]
    for some, seen, error, match in (
        (loops, nan, ObservationError, r"observation\[1\] is nan"),
        (loops, [*good[:17], good[0, :2]], ObservationError, "expected float32"),
        (loops, [*good[:17], good[0].astype(int)], ObservationError, "int64"),
        (loops, good[:17], SessionError, "17 observations for 18 loops"),
        ([*loops[:17], loops[0]], good, SessionError, "named twice"),
        ([*loops[:17], other], good, SessionError, "two engines"),
        ([*loops[:17], closed], good, SessionError, "loop 17 is closed"),
        ([*loops[:17], engine], good, SessionError, "loop 17 is no control loop"),
    ):  # fmt: skip
        with pytest.raises(error, match=match) as caught:
            tick_together(some, seen)
        log.append(caught.value)
        if error is SessionError and len(seen) == 18:
            with pytest.raises(error, match=match):
                slack_together(some)
    assert "17 of 18" in log[0].__notes__[0]
    assert tick_together([], []) == [] and slack_together([]) is None
    assert (engine.stats()["replays"], [loop.position for loop in loops]) == (count, [3] * 18)
    assert [loop.digest() for loop in loops] == before


def test_a_broken_lane_is_nobody_elses(engine: ActionEngine, loops: list[ControlLoop]) -> None:
    """Fault: one NaN in a queue stops the others, or comes into their actions."""
    dim, twins = engine.config.observation_dim, [loops[0].fork(1)[0]]
    expected = twins[0].tick(SEEN[0, :dim]).tobytes()
    queue = engine.lane_array(loops[7].lane, "queue")
    engine.set_lane_array(loops[7].lane, "queue", np.full_like(queue, np.nan))
    with pytest.raises(CheckpointError, match=r"the action is .*nan") as caught:
        tick_together(loops, SEEN[:18, :dim])
    assert "in loop 7 of those together; the others went on" in caught.value.__notes__
    assert [loop.position for loop in loops] == [3 if i == 7 else 4 for i in range(18)]
    assert engine.action(loops[0].lane).tobytes() == expected
    assert np.isfinite([engine.action(loop.lane) for loop in loops if loop is not loops[7]]).all()
    twins[0].close()


def test_a_listener_that_fails_is_nobody_elses(
    engine: ActionEngine, loops: list[ControlLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the loops after it are taken back, or their listeners hear nothing."""
    heard = [Heard() for _ in loops]
    for loop, listener in zip(loops, heard, strict=True):
        loop.listener = listener

    def full(*args: object, **options: object) -> None:
        raise OSError("no space left")

    seen = SEEN[:18, : engine.config.observation_dim]
    with monkeypatch.context() as patch:
        patch.setattr(heard[17], "slack", full)  # of the tick before: none ticks without it
        with pytest.raises(OSError, match="no space") as caught:
            tick_together(loops, seen)
    assert "in loop 17" in caught.value.__notes__[0]
    assert [loop.position for loop in loops] == [3] * 18
    monkeypatch.setattr(heard[2], "tick", full)
    monkeypatch.setattr(heard[3], "slack", full)
    with pytest.raises(OSError, match="no space") as caught:
        tick_together(loops, seen)
    assert "in loop 2" in caught.value.__notes__[0]
    assert [loop.position for loop in loops] == [4] * 18
    with pytest.raises(OSError, match="no space"):
        slack_together(loops)
    monkeypatch.undo()
    tick_together(loops, seen)
    assert [entry[0] for entry in heard[17].log] == ["tick", "slack", "tick"]
    assert [entry[0] for entry in heard[2].log] == ["slack", "restore", "tick"]


def test_threads_that_name_the_same_loops_take_turns(engine: ActionEngine) -> None:
    """Fault: locks are taken in the order of the argument, and two threads wait for each other."""
    loops, alone = [ControlLoop(engine) for _ in range(4)], ControlLoop(engine)
    seen = SEEN[:4, : engine.config.observation_dim].copy()
    seen[:] = seen[0]

    def go_on(named: list[ControlLoop]) -> None:
        for _ in range(100):
            tick_together(named, seen)
            slack_together(named)

    orders = (loops, loops[::-1], [loops[i] for i in (2, 0, 3, 1)])
    threads = [threading.Thread(target=go_on, args=(each,), daemon=True) for each in orders]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a thread waits for ever"
    finally:
        sys.setswitchinterval(before)
    for _ in range(300):
        alone.tick(seen[0])
    assert [loop.digest() for loop in loops] == [alone.digest()] * 4
    for loop in [*loops, alone]:
        loop.close()


# -- environments beside them ---------------------------------------------------------------------


class Drift:
    """An environment that forgets nothing, fails when it is told to, and ends after ten steps."""

    def __init__(self) -> None:
        self.x, self.t, self.is_broken = np.zeros(5), 0, False

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.x, self.t = np.full(5, 0.1 * (seed or 0)), 0
        return self.x.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.is_broken:
            raise RuntimeError("no connection to the robot")
        self.x, self.t = 0.9 * self.x + 0.2 * np.resize(action, 5) + 0.01, self.t + 1
        return self.x.copy(), float(self.x.sum()), self.t == 10, False, {"t": self.t}

    def close(self) -> None:
        pass


def rollouts(engine: Any, n: int = 4) -> list[Rollout]:
    made = [Rollout(Drift, ControlLoop(engine, overlap=i % 3)) for i in range(n)]
    for seed, rollout in enumerate(made):
        rollout.reset(seed)
    return made


def shown(steps: Sequence[Any]) -> list[Any]:
    return [
        (s.observation.tobytes(), s.action.tobytes(), s.reward, s.following.tobytes(), s.is_over)
        for s in steps
    ]


def digests(rollouts: Sequence[Rollout]) -> list[tuple[str, list[float]]]:
    return [(r.loop.digest(), r.environment.x.tolist()) for r in rollouts]


def test_rollouts_step_together(engine: ActionEngine) -> None:
    """Fault: a transition or a state differs, or one failing environment stops the others."""
    alone, shared = rollouts(engine), rollouts(engine)
    for _ in range(4):
        expected = shown([each.step() for each in alone])
        assert shown(step_together(shared)) == expected
    assert digests(shared) == digests(alone)
    shared[1].environment.is_broken = True
    with pytest.raises(EnvironmentFailed, match="no connection") as caught:
        step_together(shared)
    assert "in rollout 1 of step_together; the others have stepped" in caught.value.__notes__
    for i in (0, 2, 3):
        alone[i].step()
    assert digests(shared) == digests(alone)
    shared[1].environment.is_broken = False
    assert shown(step_together([shared[1]])) == shown([alone[1].step()])
    assert shown(step_together(shared)) == shown([each.step() for each in alone])
    while not shared[0].is_over:
        step_together(shared)
    before = digests(shared)
    with pytest.raises(EnvironmentFailed, match="the episode is over"):
        step_together(shared)
    shared[0].reset(1)
    before[0] = digests(shared)[0]
    for some, error, match in (
        (shared, EnvironmentFailed, "the episode is over"),
        ([shared[0], shared[0]], SessionError, "named twice"),
        ([shared[0], shared[0].loop], SessionError, "is not a rollout"),
    ):
        with pytest.raises(error, match=match):
            step_together(some)
        assert digests(shared) == before
    assert step_together([]) == []
    for each in (*alone, *shared):
        each.close()


def test_a_missed_deadline_leaves_all_rollouts_in_step() -> None:
    """Fault: a loop is a tick ahead of an environment that did not act."""
    engine = SharedNumpyPolicy(lanes=4, observation_dim=5)
    made = rollouts(engine, 2)
    made += [Rollout(Drift, ControlLoop(engine, deadline_ms=0, on_miss="raise"))]
    made[2].reset(2)
    before = digests(made)
    with pytest.raises(DeadlineMissed):
        step_together(made)
    assert digests(made) == before
    assert [each.loop.position for each in made] == [0, 0, 0]
    step_together(made[:2])
    assert [each.loop.position for each in made] == [1, 1, 0]
