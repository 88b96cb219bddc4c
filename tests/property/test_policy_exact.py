"""Robot policies: capsules are the whole control state, and every way to a state gives its bits.

Against numpy to a tolerance; between plans at once and in slices, restore and never left, fork and
original, threads and schedules: to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import CapsuleError, CheckpointError, ObservationError, SessionError
from flashrt.capsule.lineage import Lane
from flashrt.core.backend import Backend
from flashrt.core.region import Region, Role
from flashrt.engine.actions import ActionEngine
from flashrt.models.flow_policy import model as policy_model
from flashrt.models.flow_policy.config import PolicyConfig
from flashrt.models.policies import policy_for
from flashrt.ops.cursor import read_cursor
from flashrt.weights.checkpoint import open_checkpoint
from flashrt.weights.random_policy import write_random_policy
from tests.policy_reference import ReferencePolicy

# float32 sums, a recurrence and an integration against float64; measured: 4e-6 over 60 ticks
ABSOLUTE = 2e-5
BACKENDS: dict[str, Callable[[], Backend]] = {
    "cpu": CpuDevice,
    "cpu-alone": lambda: CpuDevice(alone_nbytes=1 << 30),
    "simt": SimtDevice,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_policy(tmp_path_factory.mktemp("policy") / "tiny", "tiny", seed=3)


def opened(checkpoint: Path, backend: Backend, lanes: int = 3) -> ActionEngine:
    return ActionEngine(*policy_for(open_checkpoint(checkpoint)), backend, lanes=lanes)


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[ActionEngine]:
    """Three lanes: two for the test, the last for its oracle."""
    made = opened(checkpoint, BACKENDS[request.param]())
    yield made
    made.close()


def observations(engine: ActionEngine, n: int = 64, seed: int = 0) -> NDArray[np.float32]:
    shape = (n, engine.config.observation_dim)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fresh(engine: ActionEngine, index: int = 0, seed: int = 11) -> Lane:
    lane = engine.lanes[index]
    engine.reset(lane, seed)
    return lane


def step(engine: ActionEngine, lane: Lane, observation: NDArray[np.float32]) -> NDArray[np.float32]:
    """A tick of the plainest loop: plan when nothing is left, and with two rows promised."""
    if engine.cursor(lane).remaining == 0:
        engine.observe(lane, observation)
        engine.plan(lane)
        action = engine.act(lane)
    else:
        action = engine.tick(lane, observation)
    if engine.cursor(lane).remaining == 1:
        engine.plan(lane, committed=2)
    return action


def run(engine: ActionEngine, lane: Lane, stream: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack([step(engine, lane, o) for o in stream])


# -- against the reference ---------------------------------------------------------------------


def test_a_rollout_equals_the_reference(engine: ActionEngine, checkpoint: Path) -> None:
    lane, stream = fresh(engine, seed=5 << 32 | 7), observations(engine, 20)
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    reference = ReferencePolicy(engine.config, tensors, seed=5 << 32 | 7)
    for n, observation in enumerate(stream):
        engine.observe(lane, observation)
        reference.observe(observation)
        if n % 3 == 0:
            committed = min(2, engine.cursor(lane).remaining)
            engine.plan(lane, committed)
            reference.plan(committed)
        assert np.abs(engine.act(lane) - reference.act()).max() < ABSOLUTE
        for name in ("memory", "encoded", "queue", "previous"):
            wanted = getattr(reference, name)
            got = engine.lane_array(lane, name).astype(np.float64)
            assert np.abs(got - wanted).max() < ABSOLUTE, (n, name)


# -- every way to a state gives its bits ----------------------------------------------------------


def test_tick_is_observe_and_act(engine: ActionEngine) -> None:
    a, b, stream = fresh(engine, 0), fresh(engine, 1), observations(engine)
    for lane in (a, b):
        engine.observe(lane, stream[0])
        engine.plan(lane)
    for observation in stream[:3]:
        engine.observe(a, observation)
        assert np.array_equal(engine.act(a), engine.tick(b, observation))
        assert engine.digest(a) == engine.digest(b)


@pytest.mark.parametrize("ticks_between", [0, 1])
def test_a_plan_in_slices_is_the_plan(engine: ActionEngine, ticks_between: int) -> None:
    a, b, stream = fresh(engine, 0), fresh(engine, 1), observations(engine)
    for lane in (a, b):
        run(engine, lane, stream[:2])
    engine.plan(a, committed=2)
    engine.begin_plan(b, committed=2)
    later = iter(stream[2:])
    while not engine.continue_plan(b):
        if ticks_between and engine.cursor(b).tick < 3:
            engine.tick(b, next(later))
    assert np.array_equal(engine.lane_array(a, "queue"), engine.lane_array(b, "queue"))
    if not ticks_between:
        assert engine.digest(a) == engine.digest(b)


def test_promised_actions_stay_to_the_bit(engine: ActionEngine) -> None:
    lane, stream = fresh(engine), observations(engine)
    run(engine, lane, stream[:1])
    before = engine.lane_array(lane, "queue").copy()
    engine.plan(lane, committed=3)
    after, cursor = engine.lane_array(lane, "queue"), engine.cursor(lane)
    assert np.array_equal(before[:3], after[:3]) and not np.isclose(before[3:], after[3:]).all()
    assert (cursor.chunk, cursor.stop, cursor.plan_steps_left) == (0, 7, 0)
    engine.override(lane, np.array([100.0, -100.0]))
    engine.plan(lane, committed=1)
    assert np.array_equal(engine.lane_array(lane, "queue").reshape(-1)[:2], [1, -1])


def test_a_capsule_is_the_whole_state(engine: ActionEngine) -> None:
    """Taken between any two verbs, also inside a plan in slices, and brought back over poison."""
    lane, stream = fresh(engine), observations(engine)
    for n in range(4):
        for slices in range(engine.config.num_inference_steps):
            engine.reset(lane, n)
            run(engine, lane, stream[: n + 1])
            engine.begin_plan(lane, committed=1)
            for _ in range(slices):
                engine.continue_plan(lane)
            capsule = engine.snapshot(lane)
            assert capsule.digest == engine.digest(lane)
            first = _finish(engine, lane, stream[n + 1 :])
            engine.arena.poison_lane(lane.index)
            engine.arena.poison_scratch()
            engine.restore(lane, capsule)
            assert first == _finish(engine, lane, stream[n + 1 :])
            capsule.drop()


def _finish(engine: ActionEngine, lane: Lane, stream: NDArray[np.float32]) -> tuple[bytes, str]:
    cursor, promised = engine.cursor(lane), b""
    if cursor.tick < cursor.stop:  # an action of the old queue, before the plan replaces it
        promised = engine.tick(lane, stream[0]).tobytes()
    while not engine.continue_plan(lane):
        pass
    actions = run(engine, lane, stream[1:11])
    return promised + actions.tobytes(), engine.digest(lane)


@pytest.mark.parametrize("forgotten", ["memory", "queue", "flow", "cursor", "condition"])
def test_a_forgotten_region_is_noticed(
    checkpoint: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with one region outside the fixed band the test above must fail."""
    declared = policy_model._lane_regions

    def without(config: PolicyConfig) -> tuple[Region, ...]:
        return tuple(
            Region(r.name, r.shape, r.dtype, Role.IO) if r.name == forgotten else r
            for r in declared(config)
        )

    monkeypatch.setattr(policy_model, "_lane_regions", without)
    engine = opened(checkpoint, CpuDevice(alone_nbytes=1 << 30), lanes=1)
    with pytest.raises((AssertionError, CheckpointError, SessionError)):
        test_a_capsule_is_the_whole_state(engine)


def test_a_fork_is_its_original_until_the_noise_differs(engine: ActionEngine) -> None:
    a, b, stream = fresh(engine, 0), fresh(engine, 1), observations(engine)
    run(engine, a, stream[:7])
    engine.fork(a, b)
    assert engine.digest(a) == engine.digest(b)
    assert np.array_equal(run(engine, a, stream[7:20]), run(engine, b, stream[7:20]))
    engine.fork(a, b)
    engine.set_seed(b, 12)
    assert not np.allclose(run(engine, a, stream[20:40]), run(engine, b, stream[20:40]))


def test_a_capsule_file_goes_to_another_engine(
    engine: ActionEngine, checkpoint: Path, tmp_path: Path
) -> None:
    lane, stream = fresh(engine), observations(engine)
    run(engine, lane, stream[:5])
    capsule = engine.snapshot(lane, "reach")
    capsule.save(tmp_path / "reach.capsule")
    wanted = run(engine, lane, stream[5:12])
    other = opened(checkpoint, type(engine.backend)(), lanes=1)
    assert other.fingerprint == engine.fingerprint
    loaded = other.capsules.load(tmp_path / "reach.capsule")
    other.restore(other.lanes[0], loaded)
    assert loaded.digest == capsule.digest
    assert np.array_equal(run(other, other.lanes[0], stream[5:12]), wanted)
    other.close()
    with pytest.raises(CapsuleError, match="belongs to another engine"):
        engine.restore(lane, loaded)


@pytest.mark.parametrize(
    "make", [lambda: CpuDevice(1), lambda: SimtDevice(seed=4)], ids=["cpu", "simt"]
)
def test_threads_and_schedules_change_no_bit(checkpoint: Path, make: Callable[[], Backend]) -> None:
    def rollout(backend: Backend) -> tuple[bytes, str]:
        engine = opened(checkpoint, backend, lanes=1)
        lane = fresh(engine)
        return run(engine, lane, observations(engine, 12)).tobytes(), engine.digest(lane)

    backend = make()
    others = {"cpu": (CpuDevice(3), CpuDevice(2)), "simt": (SimtDevice(seed=9), SimtDevice())}
    wanted = rollout(backend)
    for other in others[backend.name]:
        assert rollout(other) == wanted


# -- refusals ----------------------------------------------------------------------------------


def test_what_is_refused_changes_nothing(engine: ActionEngine) -> None:
    lane, good = fresh(engine), observations(engine)[0]
    empty = engine.digest(lane)
    nan, inf = good.copy(), good.astype(np.float64)
    nan[3], inf[1] = np.nan, 1e300
    for bad, match in (
        (good[:-1], "expected float32"), (good[None], "expected float32"),
        (good.astype(complex), "complex"), (nan, r"observation\[3\] is nan, which is not finite"),
        (inf, r"observation\[1\] is 1e\+300"), (["a"] * len(good), "expected float32"),
    ):  # fmt: skip
        for verb in (engine.observe, engine.tick):
            with pytest.raises(ObservationError, match=match):
                verb(lane, bad)
    for order in (
        lambda: engine.act(lane), lambda: engine.tick(lane, good), lambda: engine.plan(lane),
        lambda: engine.begin_plan(lane), lambda: engine.continue_plan(lane),
        lambda: engine.reset(lane, -1), lambda: engine.set_seed(lane, 1 << 64),
    ):  # fmt: skip
        with pytest.raises(SessionError):
            order()
    assert engine.digest(lane) == empty
    run(engine, lane, good[None])
    after = engine.digest(lane)
    for committed in (-1, 5, 8):
        with pytest.raises(SessionError, match="committed"):
            engine.plan(lane, committed)
    with pytest.raises(ObservationError):
        engine.override(lane, [1.0])
    assert engine.digest(lane) == after


def test_holding_and_cutting(engine: ActionEngine) -> None:
    lane, stream = fresh(engine), observations(engine)
    offset = engine.act(lane, hold=True)  # nothing executed yet: the middle of the range
    assert engine.cursor(lane).held == 1 and np.array_equal(engine.action(lane), offset)
    action = run(engine, lane, stream[:1])[0]
    engine.begin_plan(lane, committed=1)
    engine.cut(lane)
    cursor = engine.cursor(lane)
    assert (cursor.remaining, cursor.observed, cursor.plan_steps_left) == (0, -1, 0)
    with pytest.raises(SessionError, match="observe first"):
        engine.plan(lane)
    with pytest.raises(SessionError, match="no chunk is in the making"):
        engine.continue_plan(lane)
    assert np.array_equal(engine.tick(lane, stream[1], hold=True), action)
    engine.override(lane, action + 0.25)
    assert np.array_equal(engine.action(lane), action + np.float32(0.25))


def test_nothing_is_made_after_loading(engine: ActionEngine) -> None:
    lane, stream = fresh(engine), observations(engine, 64)
    made = ("allocations", "compilations", "captures")
    before = engine.stats()
    engine.observe(lane, stream[0])
    engine.plan(lane)
    for observation in stream[1:5]:
        engine.tick(lane, observation)
    after = engine.stats()
    assert [before[name] for name in made] == [after[name] for name in made]
    assert after["replays"] - before["replays"] == 6
    engine.arena.check_guards()


# -- random histories against an oracle -----------------------------------------------------------


VERBS = ("tick", "tick", "tick", "plan", "begin", "continue", "cut", "override", "seed", "snapshot",
         "restore", "fork", "hold")  # fmt: skip
ORACLE = 2


def apply(engine: ActionEngine, lane: Lane, verb: str, n: int) -> None:
    """A verb with an argument; what the state does not allow is refused, and changes nothing."""
    stream = observations(engine)
    try:
        if verb == "tick":
            engine.tick(lane, stream[n % 64])
        elif verb == "hold":
            engine.tick(lane, stream[n % 64], hold=True)
        elif verb == "plan":
            engine.observe(lane, stream[n % 64])
            engine.plan(lane, n % 4)
        elif verb == "begin":
            engine.begin_plan(lane, n % 4)
        elif verb == "continue":
            engine.continue_plan(lane)
        elif verb == "cut":
            engine.cut(lane, n)
        elif verb == "override":
            engine.override(lane, stream[n % 64, :2])
        elif verb == "seed":
            engine.set_seed(lane, n)
    except SessionError:
        pass


@pytest.mark.parametrize("name", ["cpu-alone", "simt"])
def test_random_histories_equal_their_replay(name: str, checkpoint: Path) -> None:
    engine = opened(checkpoint, BACKENDS[name]())
    history = st.lists(st.tuples(st.sampled_from(VERBS), st.integers(0, 1), st.integers(0, 99)))

    @settings(
        max_examples=60 if name == "cpu-alone" else 4, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(history)
    def check(steps: list[tuple[str, int, int]]) -> None:
        told: list[list[tuple[str, int]]] = [[], []]
        kept = []
        for lane in engine.lanes:
            engine.reset(lane, 1)
        for verb, index, n in steps:
            lane = engine.lanes[index]
            if verb == "snapshot":
                kept.append((engine.snapshot(lane), list(told[index])))
            elif verb == "restore" and kept:
                capsule, past = kept[n % len(kept)]
                engine.restore(lane, capsule)
                told[index] = list(past)
            elif verb == "fork":
                engine.fork(engine.lanes[1 - index], lane)
                told[index] = list(told[1 - index])
            else:
                apply(engine, lane, verb, n)
                told[index].append((verb, n))
            engine.arena.poison_scratch()
            # Red when a rule of engine.cursors is not what the kernel does.
            words = engine.lane_array(lane, "cursor").tolist()
            assert engine.cursor(lane) == read_cursor(words)
        oracle = engine.lanes[ORACLE]
        for index, past in enumerate(told):
            engine.reset(oracle, 1)
            for verb, n in past:
                apply(engine, oracle, verb, n)
            assert engine.digest(oracle) == engine.digest(engine.lanes[index])
        for capsule, _ in kept:
            capsule.drop()

    check()
    engine.capsules.check_integrity()
    engine.arena.check_guards()
    engine.close()


def test_lanes_tick_and_plan_together(engine: ActionEngine) -> None:
    """Fault: a lane's scratch, queue, noise or observation is another's, where they share a replay;
    or what one lane cannot do changes the others.
    """
    seen = observations(engine, 3 * 20).reshape(20, 3, -1)
    lanes, committed = engine.lanes, 1
    alone: list[tuple[list[bytes], str]] = []
    for i, lane in enumerate(lanes):
        engine.reset(lane, seed=i)
        taken = []
        for tick, observation in enumerate(seen[:20, i]):
            if tick % 3 == 0:
                engine.observe(lane, observation)
                engine.plan(lane, committed=committed if tick else 0)
                taken.append(engine.act(lane).tobytes())
            else:
                taken.append(engine.tick(lane, observation).tobytes())
        alone.append((taken, engine.digest(lane)))
    for i, lane in enumerate(lanes):
        engine.reset(lane, seed=i)
    got: list[list[bytes]] = [[] for _ in lanes]
    order = [2, 0, 1]
    for tick in range(20):
        group = [lanes[i] for i in order]
        if tick % 3 == 0:
            for i in order:
                engine.observe(lanes[i], seen[tick, i])
            engine.plan_together(group, committed=committed if tick else 0)
            actions = [engine.act(lane) for lane in group]
        else:
            actions = engine.tick_together(group, [seen[tick, i] for i in order])
        for i, action in zip(order, actions, strict=True):
            got[i].append(action.tobytes())
        order = order[1:] + order[:1]
    assert [(got[i], engine.digest(lane)) for i, lane in enumerate(lanes)] == alone
    before = [engine.digest(lane) for lane in lanes]
    bad = seen[0].copy()
    bad[1, 0] = np.nan
    with pytest.raises(ObservationError):
        engine.tick_together(lanes, bad)
    engine.reset(lanes[2])
    before[2] = engine.digest(lanes[2])
    with pytest.raises(SessionError, match="no action"):
        engine.tick_together(lanes, seen[0])
    for wrong in ([], [lanes[0]] * 2):
        with pytest.raises(SessionError, match="together"):
            engine.plan_together(wrong)
    assert [engine.digest(lane) for lane in lanes] == before
    engine.arena.check_guards()
