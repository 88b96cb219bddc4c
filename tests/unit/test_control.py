"""Control loops over a numpy policy: order of verbs, boundaries, rewind, deadlines, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.base.errors import (
    CapsuleError,
    DeadlineMissed,
    LaneBusy,
    ObservationError,
    PoolFull,
    RecordingError,
    SessionError,
)
from flashrt.robot import loop as module
from flashrt.robot import timing
from flashrt.robot.lerobot import PolicyAgent
from flashrt.robot.loop import ControlLoop
from flashrt.robot.recording import record, replay
from flashrt.robot.timing import Pace, Samples
from tests.numpy_policy import NumpyPolicy

RNG = np.random.default_rng(3)
SEEN = RNG.normal(size=(400, 3)).astype(np.float32)


@pytest.fixture
def engine() -> NumpyPolicy:
    return NumpyPolicy(lanes=4)


def ticks(loop: ControlLoop, start: int, stop: int) -> list[bytes]:
    return [loop.tick(SEEN[i]).tobytes() for i in range(start, stop)]


# -- the schedule -------------------------------------------------------------------------------


def plans(engine: NumpyPolicy) -> list[Any]:
    return [entry for entry in engine.log if entry[0] in ("plan", "begin")]


def test_the_first_tick_plans_before_it_acts_and_later_plans_are_made_in_the_slack(
    engine: NumpyPolicy,
) -> None:
    loop = ControlLoop(engine)
    ticks(loop, 0, 12)
    loop.slack()
    assert plans(engine) == [("plan", 0, 0), ("plan", 3, 1), ("plan", 7, 1), ("plan", 11, 1)]
    assert engine.log.index(("plan", 3, 1)) > engine.log.index(("act", 3))
    assert engine.log.index(("plan", 3, 1)) < engine.log.index(("observe", 4))


def test_without_overlap_plans_are_made_within_ticks(engine: NumpyPolicy) -> None:
    loop = ControlLoop(engine, overlap=0)
    ticks(loop, 0, 12)
    assert plans(engine) == [("plan", 0, 0), ("plan", 4, 0), ("plan", 8, 0)]


@pytest.mark.parametrize("overlap", [2, 3, 4])
def test_a_plan_is_spread_over_the_overlap(engine: NumpyPolicy, overlap: int) -> None:
    loop = ControlLoop(engine, overlap=overlap)
    ticks(loop, 0, 4 - overlap + 1)
    per_slack = []
    for i in range(4 - overlap + 1, 5):
        before = len(engine.log)
        loop.slack()
        per_slack.append(sum(entry[0] == "step" for entry in engine.log[before:]))
        loop.tick(SEEN[i])
    assert plans(engine)[1] == ("begin", 4 - overlap, overlap)
    assert sum(per_slack) == 5 and max(per_slack) - min(per_slack) <= 1
    assert len(per_slack) == overlap


def test_committed_actions_are_executed_as_promised(engine: NumpyPolicy) -> None:
    """Whatever the overlap, a plan begun at t changes nothing before t + overlap."""
    for overlap in (1, 2, 4):
        loop = ControlLoop(engine, overlap=overlap)
        loop.tick(SEEN[0])
        promised = engine.cursor(loop.lane).queue.copy()
        executed = [loop.tick(SEEN[i]) for i in range(1, 4)]
        assert np.array_equal(executed, promised[1:4])
        loop.close()


def test_slack_may_be_given_or_not(engine: NumpyPolicy) -> None:
    given, not_given = ControlLoop(engine, overlap=2), ControlLoop(engine, overlap=2)
    for i in range(40):
        assert given.tick(SEEN[i]).tobytes() == not_given.tick(SEEN[i]).tobytes()
        given.slack()
        given.slack()
    assert given.digest() == not_given.digest()


def test_an_interrupt_drops_the_chunk(engine: NumpyPolicy) -> None:
    loop = ControlLoop(engine)
    ticks(loop, 0, 6)
    loop.interrupt()
    loop.tick(SEEN[6])
    assert plans(engine)[-1] == ("plan", 6, 0)


def test_an_interrupt_may_keep_actions_that_were_promised(engine: NumpyPolicy) -> None:
    loop = ControlLoop(engine)
    ticks(loop, 0, 5)
    loop.slack()
    promised = engine.cursor(loop.lane).queue
    loop.interrupt(keep=1)
    assert np.array_equal(loop.tick(SEEN[5]), promised[5 - 3])
    loop.slack()
    assert plans(engine)[-1] == ("plan", 5, 1), "from an observation after the interrupt"
    with pytest.raises(SessionError, match="keep=-1"):
        loop.interrupt(-1)


def test_an_interrupt_never_plans_from_what_was_seen_before(engine: NumpyPolicy) -> None:
    loop = ControlLoop(engine, overlap=3)
    for before in range(30):
        for keep in (0, 1, 2, 5):
            loop.reset(1)
            ticks(loop, 0, before)
            loop.slack()
            engine.log.clear()
            loop.interrupt(keep)
            ticks(loop, before, before + 6)
            assert all(entry[1] >= before for entry in engine.log if entry[0] != "act")


# -- going back ---------------------------------------------------------------------------------


def test_restore_continues_to_the_bit(engine: NumpyPolicy) -> None:
    loop = ControlLoop(engine, overlap=2)
    for at in range(12):
        loop.reset(7)
        ticks(loop, 0, at)
        capsule = loop.snapshot()
        expected, digest = ticks(loop, at, at + 30), loop.digest()
        loop.restore(capsule)
        assert (ticks(loop, at, at + 30), loop.digest()) == (expected, digest)
        capsule.drop()


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_rewind_to_every_tick(engine: NumpyPolicy, overlap: int) -> None:
    """Exact at boundaries and between them, through interrupts, again and again."""
    loop = ControlLoop(engine, 10.0, overlap=overlap, keep_seconds=2.0, boundary_seconds=0.7)
    digests = [loop.digest()]
    for i in range(60):
        if i % 11 == 5:
            loop.interrupt(i % 3)
        loop.tick(SEEN[i])
        digests.append(loop.digest())
    for back in [1, 3, 7, 6, 2, 1]:
        at = loop.position - back
        loop.rewind(back / 10)
        assert (loop.position, loop.digest()) == (at, digests[at])
    for i in range(40, 60):
        if i % 11 == 5:
            loop.interrupt(i % 3)
        loop.tick(SEEN[i])
        assert loop.digest() == digests[i + 1]


@pytest.mark.parametrize("n_ticks", [12, 16, 19, 24, 40])
def test_many_small_rewinds_reach_no_further_than_a_large_one(
    engine: NumpyPolicy, n_ticks: int
) -> None:
    """Red when ticks that were overwritten meanwhile count as kept, once the loop is back at a time
    when they were: to the reset, say, or to a boundary that was given up.
    """
    loop = ControlLoop(engine, 10.0, overlap=2, keep_seconds=1.0, boundary_seconds=0.5)
    digests = [loop.digest()]
    for i in range(n_ticks):
        loop.tick(SEEN[i])
        digests.append(loop.digest())
    reach = 0
    with pytest.raises(SessionError, match="of 0 that can be gone back"):
        while True:
            loop.rewind_ticks(1)
            reach += 1
            assert loop.digest() == digests[n_ticks - reach]
    assert min(n_ticks, 10) <= reach <= 15
    for i in range(n_ticks - reach, n_ticks):
        loop.tick(SEEN[i])
        assert loop.digest() == digests[i + 1]


def test_rewind_reaches_what_is_kept_and_no_more(engine: NumpyPolicy) -> None:
    loop = ControlLoop(engine, 10.0, keep_seconds=2.0, boundary_seconds=0.5)
    ticks(loop, 0, 57)
    digest = loop.digest()
    loop.rewind(2.0)
    with pytest.raises(SessionError, match="larger keep_seconds"):
        loop.rewind(10.0)
    ticks(loop, 37, 57)
    assert loop.digest() == digest
    capsule = loop.snapshot()
    loop.restore(capsule)
    assert len(engine.capsules) == 2, "boundaries are given back, but for the room of the next"
    with pytest.raises(SessionError, match="1 ticks, of 0"):
        loop.rewind_ticks(1)
    assert loop.digest() == digest


def test_when_the_pool_is_full_boundaries_give_way_but_for_one() -> None:
    """Red when the last boundary gives way: then nothing can be taken back, and no failure of an
    environment either.
    """
    engine = NumpyPolicy(room=3)
    loop = ControlLoop(engine, 10.0, keep_seconds=2.0, boundary_seconds=0.2)
    ticks(loop, 0, 30)
    first, second = loop.snapshot("first"), loop.snapshot()
    assert first.digest == second.digest and len(engine.capsules) == 3
    with pytest.raises(PoolFull):
        loop.snapshot()
    expected = []
    for i in range(30, 60):
        expected += ticks(loop, i, i + 1)
        digest = loop.digest()
        if i % 7 == 0:
            loop.tick(SEEN[i + 1])
            loop.rewind_ticks(1)
            assert loop.digest() == digest
    loop.restore(first)
    with pytest.raises(PoolFull):
        loop.snapshot()
    assert ticks(loop, 30, 60) == expected


def test_a_loop_without_room_for_a_boundary_is_not_made() -> None:
    """Red when such a loop begins: its first interruption would leave it nowhere to go back to."""
    engine = NumpyPolicy(lanes=3, room=1)
    loop = ControlLoop(engine, boundary_seconds=0.1)
    ticks(loop, 0, 8)
    for _ in range(2):
        with pytest.raises(PoolFull):
            ControlLoop(engine)
        with pytest.raises(PoolFull):
            loop.fork(1)
    assert len(engine.free) == 2
    ticks(loop, 8, 30)
    loop.rewind_ticks(2)
    loop.close()
    assert not engine.capsules
    engine.room = 3
    loop = ControlLoop(engine, boundary_seconds=0.04)
    ticks(loop, 0, 9)
    assert len(engine.capsules) == 3
    assert loop.fork(1)[0].digest() == loop.digest(), "boundaries give way to a fork's first"


def test_forks_are_twins_until_they_differ(engine: NumpyPolicy) -> None:
    loop = ControlLoop(engine)
    ticks(loop, 0, 9)
    with pytest.raises(LaneBusy):
        loop.fork(4)
    assert len(engine.free) == 3, "none was made"
    same, other, third = loop.fork(3, seeds=[0, 11, 12])
    assert ticks(same, 9, 30) == ticks(loop, 9, 30)
    assert same.digest() == loop.digest()
    other_actions = ticks(other, 9, 30)
    assert other_actions != ticks(third, 9, 30)
    loop.adopt(other)
    assert loop.digest() == other.digest()
    with pytest.raises(SessionError, match="2 seeds for 1"):
        loop.fork(1, seeds=[1, 2])
    for fork in (same, other, third):
        fork.close()
        fork.close()
    assert len(engine.free) == 3
    with pytest.raises(SessionError, match="closed"):
        third.tick(SEEN[0])
    with pytest.raises(SessionError, match="another engine"):
        loop.adopt(ControlLoop(NumpyPolicy()))


def test_a_foreign_capsule_changes_nothing(engine: NumpyPolicy) -> None:
    loop = ControlLoop(engine)
    ticks(loop, 0, 5)
    digest = loop.digest()
    foreign = ControlLoop(NumpyPolicy()).snapshot()
    with pytest.raises(CapsuleError):
        loop.restore(foreign)
    assert loop.digest() == digest
    loop.rewind_ticks(2)


# -- bad input, late actions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observation", "said"),
    [
        (np.zeros(4, np.float32), r"float32 \(4,\), expected float32 \(3,\)"),
        (np.zeros((1, 3), np.float32), r"float32 \(1, 3\), expected"),
        (np.zeros(3, np.int32), r"int32 \(3,\), expected float32"),
        (np.zeros(3, np.complex64), r"complex64 \(3,\), expected"),
        (np.array(["a", "b", "c"]), r"<U1 \(3,\), expected"),
        ([[0.0], [1.0, 2.0], 3.0], "numpy cannot read this list as an array"),
        ({"a": 0.0}, "dict, for numpy object"),
        ("1.5", "str, for numpy <U3"),
        (None, "NoneType, for numpy object"),
        ([0.0, float("nan"), 1.0], r"observation\[1\] is nan"),
        ([0.0, 1.0, 1e300], r"observation\[2\] is 1e\+300"),
    ],
)
def test_a_bad_observation_changes_nothing(
    engine: NumpyPolicy, observation: Any, said: str
) -> None:
    loop = ControlLoop(engine)
    for before in (0, 5):
        ticks(loop, loop.position, before)
        digest = loop.digest()
        engine.log.clear()
        with pytest.raises(ObservationError, match=said):
            loop.tick(observation)
        assert loop.digest() == digest and not engine.log
    loop.tick([0.1, 0.2, 0.3])  # a list of floats will do


def clock(monkeypatch: pytest.MonkeyPatch, step_ms: list[float]) -> None:
    """Time that passes by `step_ms` at each look: a tick looks twice, and once for its caller."""
    now = [0]

    def look() -> int:
        now[0] += int((step_ms.pop(0) if step_ms else 0) * 1e6)
        return now[0]

    monkeypatch.setattr(module.time, "perf_counter_ns", look)


def test_hold_executes_the_previous_action(
    engine: NumpyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = ControlLoop(engine, deadline_ms=2.0)
    for i in range(5):
        sent = loop.tick(SEEN[i])
        loop.slack()
    clock(monkeypatch, [0, 0, 3.0])
    held = loop.tick(SEEN[5])
    assert held.tobytes() == sent.tobytes() and loop.stats()["misses"] == 1
    lane = engine.cursor(loop.lane)
    assert (lane.tick, lane.previous.tobytes()) == (6, held.tobytes())
    digest = loop.digest()
    following = ticks(loop, 6, 20)
    loop.rewind_ticks(15)
    assert loop.position == 5
    loop.close()

    again = ControlLoop(engine)
    ticks(again, 0, 5)
    again.tick_as_recorded(SEEN[5], held)
    assert again.digest() == digest
    assert ticks(again, 6, 20) == following
    again.rewind_ticks(14)
    assert again.digest() == digest, "what was executed comes again"


def test_hold_executes_the_hold_action(
    engine: NumpyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = ControlLoop(engine, deadline_ms=2.0, hold_action=[0.25, -0.5])
    clock(monkeypatch, [0, 0, 3.0])
    assert loop.tick(SEEN[0]).tolist() == [0.25, -0.5], "even in the first tick"


def test_what_was_executed_can_be_said(engine: NumpyPolicy, tmp_path: Path) -> None:
    """By a limiter, say: before the slack, so that what is planned follows on it."""
    loop, plain = ControlLoop(engine), ControlLoop(engine)
    limited = []
    with record(loop, tmp_path / "r"):
        for i in range(20):
            action = np.clip(loop.tick(SEEN[i]), -0.3, 0.3)
            loop.executed(action)
            loop.slack()
            limited.append(action)
    for i in range(20):
        plain.tick_as_recorded(SEEN[i], limited[i])
    assert plain.digest() == loop.digest()
    plain.close()
    assert replay(engine, tmp_path / "r").mismatch is None
    digest = loop.digest()
    loop.rewind_ticks(5)
    for i in range(15, 20):
        loop.tick_as_recorded(SEEN[i], limited[i])
    assert loop.digest() == digest
    with pytest.raises(SessionError, match="after a tick, before its slack"):
        loop.executed(action)
    loop.reset()
    with pytest.raises(SessionError, match="after a tick"):
        loop.executed(action)


def test_last_and_raise(engine: NumpyPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    calm, late = ControlLoop(engine), ControlLoop(engine, deadline_ms=1, on_miss="last")
    strict = ControlLoop(engine, deadline_ms=1, on_miss="raise")
    clock(monkeypatch, [0] * 3 + [0, 0, 2.0] + [0, 0, 2.0])
    expected = ticks(calm, 0, 1)
    assert ticks(late, 0, 1) == expected
    with pytest.raises(DeadlineMissed, match=r"tick 0: its action came 2\.000 ms .* 1 ms are"):
        strict.tick(SEEN[0])
    assert late.stats()["misses"] == strict.stats()["misses"] == 1
    assert calm.digest() == late.digest() == strict.digest()
    assert ticks(strict, 1, 20) == ticks(calm, 1, 20)


@pytest.mark.parametrize(
    "options",
    [
        {"hz": 0.0},
        {"hz": float("nan")},
        {"deadline_ms": -1.0},
        {"deadline_ms": float("nan")},
        {"on_miss": "ignore"},
        {"overlap": 5},
        {"overlap": -1},
        {"hold_action": [1.0]},
        {"hold_action": [1.0, float("inf")]},
        {"keep_seconds": 0.0},
        {"boundary_seconds": float("inf")},
        {"seed": -1},
        {"hz": None},
        {"hz": "50"},
        {"hz": 1e12, "keep_seconds": 1e-9, "boundary_seconds": 1e-9},
        {"hz": 1e-300},
        {"deadline_ms": "2"},
        {"on_miss": None},
        {"overlap": 1.0},
        {"overlap": True},
        {"hold_action": [[1.0], [1.0, 2.0]]},
        {"hold_action": "ab"},
        {"keep_seconds": None},
        {"keep_seconds": float("nan")},
        {"boundary_seconds": "1"},
        {"seed": None},
        {"seed": 1.0},
        {"seed": True},
        {"seed": "1"},
    ],
)
def test_bad_options_take_no_lane(engine: NumpyPolicy, options: dict[str, Any]) -> None:
    """Red when an option of a wrong type or unit gets to arithmetic, as None or 1e12 Hz did."""
    with pytest.raises(SessionError, match=next(iter(options))):
        ControlLoop(engine, **options)
    assert len(engine.free) == 4


@pytest.mark.parametrize(
    "use",
    [
        lambda loop: loop.reset(None),
        lambda loop: loop.reset(1.0),
        lambda loop: loop.set_seed("1"),
        lambda loop: loop.interrupt(None),
        lambda loop: loop.interrupt(0.5),
        lambda loop: loop.rewind(float("nan")),
        lambda loop: loop.rewind(-1),
        lambda loop: loop.rewind("1"),
        lambda loop: loop.rewind_ticks(1.0),
        lambda loop: loop.rewind_ticks(None),
        lambda loop: loop.fork(-1),
        lambda loop: loop.fork(1.0),
        lambda loop: loop.fork(1, seeds=[None]),
        lambda loop: loop.fork(2, seeds=[1, -1]),
        lambda loop: loop.adopt(None),
        lambda loop: PolicyAgent(loop, seed=None),
        lambda loop: PolicyAgent(loop, seed=1).select_action([[0.0], [1.0, 2.0]]),
    ],
)
def test_bad_arguments_change_nothing(engine: NumpyPolicy, use: Callable[[Any], object]) -> None:
    """Red when a wrong type fails after something has changed, or with a TypeError."""
    loop = ControlLoop(engine, seed=1)
    ticks(loop, 0, 6)
    position, digest = loop.position, loop.digest()
    with pytest.raises(SessionError):
        use(loop)
    if loop.position:  # an agent begins its episode before it is asked
        assert (loop.position, loop.digest()) == (position, digest)
    assert len(engine.free) == 3


def test_numbers_of_numpy_are_options(engine: NumpyPolicy, tmp_path: Path) -> None:
    """Red when a seed or a rate from numpy is refused, or cannot be written into a recording."""
    options = {"hz": np.float32(20), "overlap": np.int64(2), "deadline_ms": np.float64(1e9)}
    loop = ControlLoop(engine, **options, seed=np.uint32(7), keep_seconds=np.int64(3))
    plain = ControlLoop(engine, 20.0, 1e9, overlap=2, seed=7, keep_seconds=3.0)
    with record(loop, tmp_path / "r"):
        assert ticks(loop, 0, 20) == ticks(plain, 0, 20)
        loop.rewind_ticks(np.int64(3))
        loop.reset(np.int64(9))
    assert replay(engine, tmp_path / "r").mismatch is None


def test_an_interrupted_tick_has_not_happened(
    engine: NumpyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C right after a graph. Red when the lane is believed, which is a tick ahead: the action
    of that tick was handed out to nobody.
    """
    loop, plain = ControlLoop(engine, boundary_seconds=0.06), ControlLoop(engine)
    for at in range(12):
        act = engine.act

        def interrupted(*arguments: Any, act: Any = act) -> Any:
            act(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(engine, "act", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.tick(SEEN[at])
        monkeypatch.undo()
        assert loop.position == at
        assert ticks(loop, at, at + 1) == ticks(plain, at, at + 1)
        assert loop.digest() == plain.digest()
        if at > 2:
            loop.rewind_ticks(2)
            assert loop.position == at - 1
            ticks(loop, at - 1, at + 1)
            assert loop.digest() == plain.digest()


def test_a_recording_of_an_interrupted_loop_replays(
    engine: NumpyPolicy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Red when a tick that was interrupted is in the recording, or one that was not is lost."""
    loop = ControlLoop(engine)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with record(loop, tmp_path / "r") as recorder:
        ticks(loop, 0, 5)
        with monkeypatch.context() as patched:
            patched.setattr(engine, "tick_trusted", interrupted)
            with pytest.raises(KeyboardInterrupt):
                loop.tick(SEEN[5])
        ticks(loop, 5, 9)
        with monkeypatch.context() as patched:
            patched.setattr(recorder, "tick", interrupted)  # after the change, before the word
            with pytest.raises(KeyboardInterrupt):
                loop.tick(SEEN[9])
        assert loop.position == 10
        ticks(loop, 10, 12)
    with pytest.raises(RecordingError, match="needs the capsule"):
        replay(engine, tmp_path / "r")
    with pytest.raises(KeyboardInterrupt), record(loop, tmp_path / "r"):
        loop.reset(3)
        ticks(loop, 0, 5)
        with monkeypatch.context() as patched:
            patched.setattr(engine, "tick_trusted", interrupted)
            loop.tick(SEEN[5])
    report = replay(engine, tmp_path / "r")
    assert (report.ticks, report.mismatch) == (5, None)


def test_without_a_boundary_an_interrupted_loop_says_so(
    engine: NumpyPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when such a loop goes on from whatever its lane holds."""
    loop, other = ControlLoop(engine), ControlLoop(engine)
    ticks(loop, 0, 5)
    capsule = loop.snapshot()
    loop.adopt(other)  # what it was put into is no capsule's state
    fork = engine.fork

    def interrupted(*arguments: Any) -> None:
        fork(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "fork", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.adopt(other)
    for use in (loop.digest, loop.slack, loop.snapshot, lambda: loop.tick(SEEN[0]), loop.interrupt):
        with pytest.raises(SessionError, match="its state is lost; reset it, or restore a capsule"):
            use()
    monkeypatch.undo()
    loop.restore(capsule)
    assert (loop.position, loop.digest()) == (5, capsule.digest)


def test_closed_loops_and_engines_refuse(engine: NumpyPolicy) -> None:
    """Red when a closed loop shows the next owner's position, or goes on with its lane."""
    loop, twin = ControlLoop(engine), ControlLoop(engine)
    ticks(loop, 0, 7)
    capsule = loop.snapshot()
    loop.restore(capsule)
    loop.close()
    ticks(ControlLoop(engine), 0, 3)
    assert (loop.position, loop.seed, loop.is_closed) == (7, 0, True)
    uses: list[Callable[[ControlLoop], object]] = [
        lambda loop: loop.tick(SEEN[0]), lambda loop: loop.slack(), lambda loop: loop.reset(),
        lambda loop: loop.set_seed(1), lambda loop: loop.interrupt(), lambda loop: loop.snapshot(),
        lambda loop: loop.restore(capsule), lambda loop: loop.fork(), lambda loop: loop.digest(),
        lambda loop: loop.adopt(twin), lambda loop: loop.rewind_ticks(0),
        lambda loop: loop.executed([0.0, 0.0]), lambda loop: loop.tick_as_recorded(SEEN[0], None),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(SessionError, match="the control loop is closed; make another one"):
            use(loop)
    engine.is_closed = True
    for use in uses:
        with pytest.raises(SessionError, match="the engine is closed"):
            use(twin)
    assert twin.position == 0
    twin.close()


def test_a_forgotten_loop_gives_its_lane_back(engine: NumpyPolicy) -> None:
    for _ in range(10):
        loop = ControlLoop(engine)
        ticks(loop, 0, 30)
        loop.fork(2)
    assert len(engine.free) == 3
    del loop
    ControlLoop(engine).close()
    assert len(engine.free) == 4 and not engine.capsules


# -- time ---------------------------------------------------------------------------------------


def test_quantiles_are_samples() -> None:
    samples = Samples(capacity=1000)
    assert samples.quantiles("x") == {}
    for i in range(1, 1001):
        samples.add(i * 1000)
    found = samples.quantiles("x")
    expected = {"x_p50_s": 501e-6, "x_p99_s": 991e-6, "x_p999_s": 1e-3, "x_max_s": 1e-3}
    assert found == pytest.approx(expected)
    samples.add(5_000_000)  # in place of the oldest
    assert (samples.count, len(samples.seconds)) == (1001, 1000)
    assert samples.quantiles("x")["x_max_s"] == pytest.approx(5e-3)
    samples.clear()
    assert samples.quantiles("x") == {}


def test_pace_does_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000]
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(timing.time, "sleep", lambda s: now.__setitem__(0, now[0] + round(s * 1e9)))
    pace, period = Pace(10_000_000), 10_000_000
    monkeypatch.setattr(timing, "_SPIN_NS", 0)
    starts = []
    for spent in [1, 3, 12, 1, 37, 1, 1]:  # milliseconds
        late_ns = pace.wait()
        starts.append(((pace.due_ns - 1000) / period, late_ns / 1e6))
        now[0] += spent * 1_000_000
        pace.advance()
    assert starts == [(0, 0), (1, 0), (2, 0), (3, 2), (4, 0), (7, 7), (8, 0)]


# -- LeRobot's interface ------------------------------------------------------------------------


def test_agent(engine: NumpyPolicy) -> None:
    loop, plain = ControlLoop(engine), ControlLoop(engine)
    agent = PolicyAgent(loop, seed=5)
    plain.reset(5)
    assert agent.select_action(SEEN[0]).tobytes() == plain.tick(SEEN[0]).tobytes()
    named = agent.select_action({"observation.state": SEEN[1]})
    assert named.tobytes() == plain.tick(SEEN[1]).tobytes()
    batch = agent.select_action({"observation.state": SEEN[2:3]})
    assert batch.shape == (1, 2) and batch.tobytes() == plain.tick(SEEN[2]).tobytes()
    agent.reset()
    plain.reset(6)
    assert agent.select_action(SEEN[0]).tobytes() == plain.tick(SEEN[0]).tobytes()
    with pytest.raises(ObservationError, match="batch of 2"):
        agent.select_action(SEEN[:2])
    with pytest.raises(ObservationError, match=r"takes 'observation\.state' alone"):
        agent.select_action({"observation.images.top": SEEN[0], "observation.state": SEEN[0]})
