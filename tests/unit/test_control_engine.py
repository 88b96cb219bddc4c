"""Control loops on a real engine: what a tick reads, writes and checks, and what a fork touches."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import CapsuleError, ObservationError, PoolFull, SessionError
from flashrt.capsule.eviction import Budgets
from flashrt.engine import actions
from flashrt.engine.actions import ActionEngine
from flashrt.ops.cursor import read_cursor
from flashrt.robot import loop as loops
from flashrt.weights.random_policy import write_random_policy

SEEN = np.random.default_rng(4).normal(size=(60, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_policy(tmp_path_factory.mktemp("policy") / "tiny", "tiny", seed=3)


@pytest.fixture
def engine(folder: Path) -> Iterator[ActionEngine]:
    made = flashrt.load_policy(folder, device="cpu", lanes=3)
    yield made
    made.close()


class Counted:
    """How often a function is called, and what it does is done."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        return self.function(*arguments, **options)


def cursor_on_device(engine: ActionEngine, loop: flashrt.ControlLoop) -> object:
    return read_cursor(engine.lane_array(loop.lane, "cursor").tolist())


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_a_tick_reads_the_action_and_nothing_else(
    engine: ActionEngine, monkeypatch: pytest.MonkeyPatch, overlap: int
) -> None:
    """Red when a verb asks the device for its cursor: two more reads a tick, one more a plan."""
    loop = flashrt.ControlLoop(engine, overlap=overlap)
    read = Counted(engine.backend.read)
    monkeypatch.setattr(engine.backend, "read", read)
    for i, seen in enumerate(SEEN):
        loop.tick(seen)
        loop.slack()
        assert read.count == i + 1
    loop.interrupt(1)
    loop.set_seed(3)
    assert read.count == len(SEEN)
    assert engine.cursor(loop.lane) == cursor_on_device(engine, loop)


def test_a_tick_checks_its_observation_once(
    engine: ActionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the engine checks again what the loop let in."""
    loop = flashrt.ControlLoop(engine)
    checked = Counted(actions.checked_vector)
    for module in (actions, loops):
        monkeypatch.setattr(module, "checked_vector", checked)
    for i, seen in enumerate(SEEN):
        loop.tick(seen)
        loop.slack()
        assert checked.count == i + 1


def test_verbs_of_the_engine_check_at_their_own_door(engine: ActionEngine) -> None:
    lane = engine.take_lane(engine)
    engine.reset(lane)
    digest = engine.digest(lane)
    for verb in (engine.observe, engine.tick):
        for bad in ([[0.0], [1.0, 2.0]], None, "12345", {"a": 1}, np.zeros(4), [np.nan] * 5):
            with pytest.raises(ObservationError, match="observation"):
                verb(lane, bad)  # type: ignore[operator]
    engine.observe(lane, SEEN[0])
    for committed in (None, 1.0, True, -1):
        with pytest.raises(SessionError, match="committed="):
            engine.plan(lane, committed)  # type: ignore[arg-type]
    for seed in (None, 1.0, True, "1", 1 << 64):
        with pytest.raises(SessionError, match="seed="):
            engine.reset(lane, seed)  # type: ignore[arg-type]
    with pytest.raises(CapsuleError, match="is not a capsule"):
        engine.restore(lane, "reach.capsule")  # type: ignore[arg-type]
    engine.reset(lane)
    assert engine.digest(lane) == digest


@pytest.mark.parametrize("phase", ["tick", "plan", "plan_step"])
def test_an_interrupted_graph_is_made_good(
    engine: ActionEngine, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Ctrl-C right after a graph. Red when the host keeps the words of before the graph, or the
    loop a lane that is ahead.
    """
    loop, twin = flashrt.ControlLoop(engine, overlap=3), flashrt.ControlLoop(engine, overlap=3)
    replay, n_interrupted = engine.replay, 0

    def interrupted(name: str, *arguments: Any) -> None:
        replay(name, *arguments)
        if name == phase:
            raise KeyboardInterrupt

    for at, seen in enumerate(SEEN[:20]):
        with monkeypatch.context() as patched:
            patched.setattr(engine, "replay", interrupted)
            try:
                loop.tick(seen)
                loop.slack()
            except KeyboardInterrupt:
                n_interrupted += 1
                assert engine.cursor(loop.lane) == cursor_on_device(engine, loop)
        if loop.position == at:
            loop.tick(seen)
        assert loop.position == at + 1
        twin.tick(seen)
        assert loop.digest() == twin.digest()
        assert engine.cursor(loop.lane) == cursor_on_device(engine, loop)
    assert n_interrupted > 0


def test_a_boundary_outlives_the_tick_that_it_was_kept_for(
    engine: ActionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the repair after an exception takes the boundary back, as what nobody has yet: the
    loop, put where no capsule leads to, has no other.
    """
    loop, other = flashrt.ControlLoop(engine), flashrt.ControlLoop(engine, seed=8)
    for seen in SEEN[:9]:
        other.tick(seen)
    loop.adopt(other)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "replay", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.tick(SEEN[9])
    assert (loop.position, loop.digest()) == (9, other.digest())
    assert loop.tick(SEEN[9]).tobytes() == other.tick(SEEN[9]).tobytes()
    engine.capsules.check_integrity()


def test_boundaries_of_a_loop_that_is_gone_make_room(engine: ActionEngine) -> None:
    """Red when they fill the pool until somebody takes their lane."""
    loop, kept = flashrt.ControlLoop(engine), flashrt.ControlLoop(engine, boundary_seconds=0.02)
    for seen in SEEN:
        kept.tick(seen)
    assert engine.stats()["capsules"] > 50
    del kept
    n_made = 0
    with pytest.raises(PoolFull):
        while True:
            loop.snapshot()
            n_made += 1
    pool = engine.capsules.pool
    assert n_made == pool.nbytes // engine.capsules.fixed_nbytes - 1
    loop.tick(SEEN[0])
    loop.rewind_ticks(1)


def test_boundaries_stay_on_the_device(engine: ActionEngine) -> None:
    """Red when the room of a loop's boundary is given to others by an eviction."""
    engine.budgets = Budgets(host_bytes=1 << 30)
    loop = flashrt.ControlLoop(engine)
    for seen in SEEN[:9]:
        loop.tick(seen)
    n_made = engine.capsules.pool.nbytes // engine.capsules.fixed_nbytes + 5
    made = [loop.snapshot() for _ in range(n_made)]
    assert {c.tier for c in made} == {"device", "host"}
    assert {c.tier for c in engine.kept_boundaries(loop.lane)} == {"device"}
    loop.restore(made[0])
    assert loop.digest() == made[0].digest


def test_a_closed_engine_is_refused_by_its_loops(engine: ActionEngine) -> None:
    """Red when a loop's call reads or writes memory that was given back."""
    loop = flashrt.ControlLoop(engine)
    for seen in SEEN[:9]:
        loop.tick(seen)
    capsule = loop.snapshot()
    engine.close()
    for use in (
        lambda: loop.tick(SEEN[9]), loop.slack, loop.digest, loop.reset, loop.interrupt, loop.fork,
        loop.snapshot, lambda: loop.restore(capsule), lambda: loop.set_seed(2),
        lambda: loop.rewind_ticks(1), lambda: flashrt.ControlLoop(engine),
    ):  # fmt: skip
        with pytest.raises(SessionError, match="the engine is closed"):
            use()
    assert (loop.position, loop.seed) == (9, 0)
    loop.close()
    assert loop.position == 9


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads change places between any two instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def lived(engine: ActionEngine, seed: int) -> list[str]:
    """Digests along a life with all that a loop does."""
    found: list[str] = []
    with flashrt.ControlLoop(engine, overlap=3, seed=seed, boundary_seconds=0.1) as loop:
        for i in range(6):
            for seen in SEEN[5 * i : 5 * i + 9]:
                loop.tick(seen)
                loop.slack()
            capsule = loop.snapshot()
            loop.rewind_ticks(4)
            found += [capsule.digest, loop.digest()]
            loop.interrupt(1)
            loop.restore(capsule)
            loop.set_seed(seed + i)
            capsule.drop()
    return found


def test_loops_of_several_threads_take_turns(engine: ActionEngine, hasty: None) -> None:
    """Red when the books of capsules, or what is known of a cursor, is changed by two at once."""
    expected = {seed: lived(engine, seed) for seed in range(3)}
    found: dict[int, list[list[str]]] = {}

    def live(seed: int) -> None:
        found[seed] = [lived(engine, seed) for _ in range(3)]

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [expected[seed]] * 3 for seed in range(3)}
    engine.capsules.check_integrity()
    assert engine.stats()["pool_used_bytes"] == 0


def test_threads_may_share_loops(engine: ActionEngine, hasty: None) -> None:
    """Red when one enters a loop while the other's kernel runs: the tick would be made again under
    it; or when two that adopt from each other wait forever.
    """
    loops = [flashrt.ControlLoop(engine, seed=seed) for seed in range(2)]
    n_ticks = 150

    def live(which: int) -> None:
        for i in range(n_ticks):
            loops[which].tick(SEEN[0])
            if i % 10 == which:
                loops[which].adopt(loops[1 - which])
                loops[1 - which].adopt(loops[which])

    def tick_both() -> None:
        for _ in range(n_ticks):
            for loop in loops:
                loop.tick(SEEN[0])

    threads = [threading.Thread(target=live, args=(which,)) for which in range(2)]
    threads.append(threading.Thread(target=tick_both))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert all(loop.timing.ticks == 2 * n_ticks for loop in loops)
    for loop in loops:
        loop.reset(4)
        for seen in SEEN[:9]:
            loop.tick(seen)
    assert loops[0].digest() == loops[1].digest()
    engine.capsules.check_integrity()


def test_a_fork_clears_nothing(engine: ActionEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red when the lane of a fork is reset before the copy that overwrites all of it."""
    loop = flashrt.ControlLoop(engine)
    for seen in SEEN[:9]:
        loop.tick(seen)
    fill = Counted(engine.backend.fill)
    monkeypatch.setattr(engine.backend, "fill", fill)
    other = loop.fork()[0]
    assert fill.count == 0
    assert other.digest() == loop.digest()
    assert other.tick(SEEN[9]).tobytes() == loop.tick(SEEN[9]).tobytes()
    flashrt.ControlLoop(engine)
    assert fill.count > 0, "a new loop does clear its lane: the count can be red"


def test_what_a_test_overwrites_is_known(engine: ActionEngine) -> None:
    """Red when the host still believes in the cursor that an experiment overwrote."""
    loop = flashrt.ControlLoop(engine)
    for seen in SEEN[:9]:
        loop.tick(seen)
    words = engine.lane_array(loop.lane, "cursor").copy()
    words[0] += 1
    engine.set_lane_array(loop.lane, "cursor", words)
    assert engine.cursor(loop.lane).tick == 10
    engine.poison_lane(loop.lane)
    assert engine.cursor(loop.lane).tick == -1
