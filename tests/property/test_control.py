"""Random lives of control loops against an oracle that runs each history on an empty lane.

The oracle knows no loop: it calls the engine's verbs one by one, looks at the cursor before each,
and plans in slices always. On the numpy policy a capsule is a deepcopy, so that the loop is tested
without the mechanism; on cpu and simt both are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import SessionError
from flashrt.engine.actions import ActionEngine
from flashrt.load import load_policy
from flashrt.models.policies import policy_for
from flashrt.ops.cursor import read_cursor
from flashrt.robot import loop as loop_module
from flashrt.robot import schedule
from flashrt.robot.history import NO_CUT, History, LoopState, PastTick
from flashrt.robot.loop import ControlLoop
from flashrt.weights.checkpoint import open_checkpoint
from flashrt.weights.random_policy import write_random_policy
from tests.numpy_policy import NumpyPolicy

LANES = 4  # the last one is the oracle's
HZ, KEEP = 20.0, 20  # ticks per second, ticks that can be gone back
SEEDS = st.sampled_from([0, 1, 77, (1 << 63) - 1])
CHOICE = st.integers(0, 5)
Event = tuple[Any, ...]  # ("tick", observation, executed or None) or ("cut", keep) and the like
SEEN = np.random.default_rng(8).normal(size=(64, 64)).astype(np.float32)
DONE = np.random.default_rng(9).uniform(-1, 1, size=(8, 16)).astype(np.float32)


def tell(engine: Any, lane: Any, history: list[Event], overlap: int) -> list[bytes]:
    """The actions of a history on a lane."""
    actions = []
    for what, *values in history:
        c = engine.cursor(lane)
        if what == "reset":
            engine.reset(lane, values[0])
        elif what == "set_seed":
            engine.set_seed(lane, values[0])
        elif what == "cut":
            engine.cut(lane, min(c.stop, c.tick + values[0]))
        else:
            engine.observe(lane, values[0])
            if c.tick >= c.stop:
                engine.begin_plan(lane, 0)
                while not engine.continue_plan(lane):
                    pass
            actions.append(engine.act(lane).tobytes())
            if values[1] is not None:
                engine.override(lane, values[1])
            tell_slack(engine, lane, overlap)
    return actions


def tell_slack(engine: Any, lane: Any, overlap: int) -> None:
    c = engine.cursor(lane)
    is_idle = not c.plan_steps_left and c.observed == c.tick - 1
    if is_idle and c.observed < c.stop <= c.observed + overlap:
        engine.begin_plan(lane, c.stop - c.observed)
    c = engine.cursor(lane)
    if c.plan_steps_left:
        slacks = range(c.tick - 1, c.stop)  # after these ticks
        for _ in range(-(-c.plan_steps_left // len(slacks))):
            engine.continue_plan(lane)


class Lives(RuleBasedStateMachine):
    """What each loop was told is kept as a list; its state must be that of a cold lane told it."""

    engine: Any = None
    overlap = 1

    @staticmethod
    def load() -> Any:
        """The engine of all runs."""
        return NumpyPolicy(lanes=LANES, room=40)

    @initialize(seed=SEEDS)
    def start(self, seed: int) -> None:
        kind = type(self)
        if kind.engine is None:
            kind.engine = kind.load()
        self.lane = self.engine.take_lane(self)
        self.frozen: dict[Any, list[Event]] = {}
        self.told: dict[ControlLoop, list[Event]] = {}
        self.reach: dict[ControlLoop, int] = {}  # ticks since the loop was put where it is
        self.far: dict[ControlLoop, int] = {}  # the most that ever was
        self.base: dict[ControlLoop, int] = {}  # events until then
        first = ControlLoop(
            self.engine, HZ, overlap=self.overlap, seed=seed,
            keep_seconds=KEEP / HZ, boundary_seconds=0.35,
        )  # fmt: skip
        self.put(first, [("reset", seed)])

    # -- what happens to loops; `i` and `j` choose among those that live ------------------------

    @rule(
        i=CHOICE,
        keep=st.one_of(st.none(), st.integers(0, 5)),
        seen=st.lists(st.integers(0, 63), max_size=12),
        slack=st.booleans(),
    )
    def tick(self, i: int, keep: int | None, seen: list[int], slack: bool) -> None:
        """An interrupt, perhaps, and ticks."""
        loop = self.loop(i)
        if keep is not None:
            loop.interrupt(keep)
            self.told[loop].append(("cut", keep))
        for at in seen:
            loop.tick(self.seen(at))
            self.ticked(loop, ("tick", self.seen(at), None))
            if slack:
                loop.slack()

    @rule(i=CHOICE, at=st.integers(0, 63), done=st.integers(0, 7))
    def tick_late(self, i: int, at: int, done: int) -> None:
        """A deadline was missed, and something else executed."""
        loop = self.loop(i)
        executed = DONE[done, : self.engine.config.action_dim]
        loop.tick_as_recorded(self.seen(at), executed)
        self.ticked(loop, ("tick", self.seen(at), executed))

    @rule(i=CHOICE, seed=SEEDS)
    def reset(self, i: int, seed: int) -> None:
        loop = self.loop(i)
        loop.reset(seed)
        self.put(loop, [("reset", seed)])

    @rule(i=CHOICE, seed=SEEDS)
    def set_seed(self, i: int, seed: int) -> None:
        loop = self.loop(i)
        loop.set_seed(seed)
        self.put(loop, [*self.told[loop], ("set_seed", seed)])

    @rule(i=CHOICE, back=st.one_of(st.integers(1, 9), st.integers(0, KEEP + 4)))
    def rewind(self, i: int, back: int) -> None:
        loop = self.loop(i)
        told, reach, digest = self.told[loop], self.reach[loop], loop.digest()
        try:
            loop.rewind(back / HZ)
        except SessionError:
            assert reach - back < max(0, self.far[loop] - KEEP)
            assert loop.digest() == digest
            return
        assert back <= reach
        self.reach[loop] -= back
        for _ in range(back):
            while told.pop()[0] != "tick":
                pass
        while back and len(told) > self.base[loop] and told[-1][0] == "cut":
            told.pop()
        self.compare(i, [])

    @rule(i=CHOICE)
    def snapshot(self, i: int) -> None:
        if len(self.frozen) < 6:
            capsule = self.loop(i).snapshot()
            self.frozen[capsule] = list(self.told[self.loop(i)])
            assert capsule.digest == self.loop(i).digest()

    @precondition(lambda self: self.frozen)
    @rule(i=CHOICE, j=CHOICE, is_poisoned=st.booleans())
    def restore(self, i: int, j: int, is_poisoned: bool) -> None:
        loop, capsule = self.loop(i), self.capsule(j)
        if is_poisoned and isinstance(self.engine, ActionEngine):
            self.engine.arena.poison_scratch()
            self.engine.poison_lane(loop.lane)
        loop.restore(capsule)
        self.put(loop, self.frozen[capsule])
        self.compare(i, [])

    @precondition(lambda self: len(self.told) < LANES - 1)
    @rule(i=CHOICE, seed=st.one_of(st.none(), SEEDS))
    def fork(self, i: int, seed: int | None) -> None:
        loop = self.loop(i)
        (other,) = loop.fork(1, None if seed is None else [seed])
        extra = [] if seed is None else [("set_seed", seed)]
        self.put(other, [*self.told[loop], *extra])

    @rule(i=CHOICE, j=CHOICE)
    def adopt(self, i: int, j: int) -> None:
        loop, other = self.loop(i), self.loop(j)
        loop.adopt(other)
        if loop is not other:
            self.put(loop, self.told[other])

    @precondition(lambda self: self.frozen)
    @rule(j=CHOICE)
    def drop(self, j: int) -> None:
        capsule = self.capsule(j)
        del self.frozen[capsule]
        capsule.drop()

    @precondition(lambda self: len(self.told) > 1)
    @rule(i=CHOICE)
    def close(self, i: int) -> None:
        loop = self.loop(i)
        loop.close()
        del self.told[loop]

    # -- what has to be -------------------------------------------------------------------------

    @rule(i=CHOICE, following=st.lists(st.integers(0, 63), max_size=10))
    def compare(self, i: int, following: list[int]) -> None:
        """The state, and what it goes on with."""
        loop = self.loop(i)
        tell(self.engine, self.lane, self.told[loop], self.overlap)
        assert loop.digest() == self.engine.digest(self.lane)
        ticks = [("tick", self.seen(at), None) for at in following]
        expected = tell(self.engine, self.lane, ticks, self.overlap)
        assert [loop.tick(self.seen(at)).tobytes() for at in following] == expected
        self.ticked(loop, *ticks)

    @precondition(lambda self: self.frozen)
    @rule(j=CHOICE)
    def compare_capsule(self, j: int) -> None:
        tell(self.engine, self.lane, self.frozen[self.capsule(j)], self.overlap)
        assert self.capsule(j).digest == self.engine.digest(self.lane)

    # -- inside ---------------------------------------------------------------------------------

    def loop(self, i: int) -> ControlLoop:
        return list(self.told)[i % len(self.told)]

    def capsule(self, j: int) -> Any:
        return list(self.frozen)[j % len(self.frozen)]

    def seen(self, at: int) -> Any:
        return SEEN[at, : self.engine.config.observation_dim]

    def put(self, loop: ControlLoop, told: list[Event]) -> None:
        self.told[loop] = list(told)
        self.reach[loop], self.far[loop], self.base[loop] = 0, 0, len(told)

    def ticked(self, loop: ControlLoop, *ticks: Event) -> None:
        self.told[loop] += ticks
        self.reach[loop] += len(ticks)
        self.far[loop] = max(self.far[loop], self.reach[loop])

    @invariant()
    def the_host_knows_the_cursor(self) -> None:
        """Red when a rule of engine.cursors is not what the kernel does."""
        for loop in getattr(self, "told", {}):
            if isinstance(self.engine, ActionEngine):
                words = self.engine.lane_array(loop.lane, "cursor").tolist()
                assert self.engine.cursor(loop.lane) == read_cursor(words)
            assert loop.position == sum(e[0] == "tick" for e in self.told[loop])
        if isinstance(self.engine, ActionEngine):
            self.engine.capsules.check_integrity()

    def teardown(self) -> None:
        for loop in list(getattr(self, "told", {})):
            loop.close()
        for capsule in list(getattr(self, "frozen", {})):
            capsule.drop()
        if self.engine is not None:
            self.engine.release(self.lane)
        if isinstance(self.engine, ActionEngine):
            assert self.engine.stats()["pool_used_bytes"] == 0
            self.engine.arena.check_guards()


def limits(max_examples: int, steps: int) -> settings:
    return settings(
        max_examples=max_examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_policy(tmp_path_factory.mktemp("policy") / "tiny", "tiny", seed=3)


@pytest.mark.parametrize("overlaps", [0, 1, 3])
def test_lives_of_a_numpy_policy(overlaps: int) -> None:
    class NumpyLives(Lives):
        engine = None
        overlap = overlaps

    run_state_machine_as_test(NumpyLives, settings=limits(30, 30))


@pytest.mark.parametrize("overlaps", [0, 1, 2, 4])
def test_lives_on_cpu(checkpoint: Path, overlaps: int) -> None:
    class CpuLives(Lives):
        engine = None
        overlap = overlaps

        @staticmethod
        def load() -> ActionEngine:
            return load_policy(checkpoint, device="cpu", lanes=LANES)

    run_state_machine_as_test(CpuLives, settings=limits(40, 30))
    CpuLives.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("overlaps", "seed"), [(1, 1), (3, 2)])
def test_lives_on_simt(checkpoint: Path, overlaps: int, seed: int) -> None:
    """On the raw CUDA kernels, under random schedules of their threads."""

    class SimtLives(Lives):
        engine = ActionEngine(
            *policy_for(open_checkpoint(checkpoint)), SimtDevice(seed=seed), lanes=LANES
        )
        overlap = overlaps

    walk(SimtLives, 30, seed)
    SimtLives.engine.close()


def walk(kind: type[Lives], n: int, seed: int) -> None:
    """A long random life, seeded: more that depends on more than hypothesis would think of."""
    rng, lives = np.random.default_rng(seed), kind()
    lives.start(seed=3)

    def some(high: int) -> int:
        return int(rng.integers(high))

    for _ in range(n):
        keep = None if rng.random() < 0.6 else some(6)
        seen = [some(64) for _ in range(some(13))]
        lives.tick(i=some(6), keep=keep, seen=seen, slack=rng.random() < 0.5)
        match some(12):
            case 0 | 1:
                lives.tick_late(i=some(6), at=some(64), done=some(8))
            case 2 | 3 | 4 | 5:
                lives.rewind(i=some(6), back=some(12))
            case 6:
                lives.snapshot(i=some(6))
            case 7 if lives.frozen:
                lives.restore(i=some(6), j=some(6), is_poisoned=rng.random() < 0.5)
            case 8 if len(lives.told) < LANES - 1:
                lives.fork(i=some(6), seed=None if rng.random() < 0.5 else some(9))
            case 9:
                lives.adopt(i=some(6), j=some(6))
            case 10 if len(lives.told) > 1 and len(lives.frozen) > 3:
                lives.close(i=some(6))
                lives.drop(j=some(6))
            case 11:
                (lives.reset if rng.random() < 0.5 else lives.set_seed)(i=some(6), seed=some(9))
        lives.the_host_knows_the_cursor()
    for i in range(len(lives.told)):
        lives.compare(i=i, following=[1, 2, 3])
    lives.teardown()


@pytest.mark.parametrize("overlaps", [0, 1, 2, 4])
def test_a_long_life(checkpoint: Path, overlaps: int) -> None:
    class LongLives(Lives):
        engine = load_policy(checkpoint, device="cpu", lanes=LANES)
        overlap = overlaps

    walk(LongLives, 100, seed=overlaps)
    LongLives.engine.close()


def test_a_long_life_of_a_numpy_policy() -> None:
    """What the negative controls below go through, unbroken."""

    class LongLives(Lives):
        engine = NumpyPolicy(lanes=LANES, room=40)
        overlap = 3

    walk(LongLives, 300, seed=1)


def forgets_overrides(history: History, tick: int) -> PastTick:
    return PAST_TICK(history, tick)._replace(executed=None)


def forgets_interrupts(history: History, tick: int) -> PastTick:
    return PAST_TICK(history, tick)._replace(cut=NO_CUT)


PAST_TICK = History.past_tick


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (History, "past_tick", forgets_overrides),
        (History, "past_tick", forgets_interrupts),
        (LoopState, "first", property(lambda state: state.end)),
        (LoopState, "bases", lambda state, tick: iter(state.boundaries[:1])),
        (schedule, "committed_rows", lambda cursor, overlap: 0),  # plans too late
        (schedule, "euler_steps_due", lambda cursor: cursor.plan_steps_left),
        (loop_module, "run_slack", lambda engine, lane, overlap: False),
    ],
)
def test_negative_controls(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, wrong: Any
) -> None:
    """What is broken on purpose is found."""
    monkeypatch.setattr(owner, name, wrong)

    class BrokenLives(Lives):
        engine = NumpyPolicy(lanes=LANES, room=40)
        overlap = 3

    with pytest.raises((AssertionError, SessionError)):
        walk(BrokenLives, 300, seed=1)
