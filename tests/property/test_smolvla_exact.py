"""SmolVLA: capsules are the whole state of a loop, and every way to a state gives its bits.

The lives of tests/property/test_control on a tiny policy of two cameras and a task; and what is its
own: rows of an observation that are made once, shared by capsules, and brought back by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import CapsuleError, ObservationError
from flashrt.core.region import Region, Role
from flashrt.engine.actions import ActionEngine
from flashrt.engine.numbers import Given
from flashrt.models.actions import PLAN
from flashrt.models.policies import policy_for
from flashrt.models.prefix import LOOK, READ, READ_STATE
from flashrt.models.vla import policy as vla_policy
from flashrt.robot import PolicyAgent, record, replay, tick_together
from flashrt.weights.checkpoint import open_checkpoint
from tests.property.test_control import LANES, Lives, walk
from tests.smolvla_policies import SETS, noise_of, observation_of, write_random_smolvla

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
CONFIG = SETS["tiny"][0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, vlm, seed = SETS["tiny"]
    folder = tmp_path_factory.mktemp("smolvla") / "tiny"
    return write_random_smolvla(folder, config, vlm, seed)


def seen(at: int) -> dict[str, Any]:
    """Observations that share images with others, or all but the state, or nothing; in some a
    camera is missing.
    """
    whole: dict[str, Any] = observation_of(CONFIG, at // 8)
    whole[STATE] = observation_of(CONFIG, at % 4)[STATE]
    if at % 8 == 5:
        del whole[WRIST]
    return whole


def made(engine: ActionEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Phases of rows that the engine replays from here on."""
    phases: list[str] = []
    replayed = engine.replay

    def noted(phase: str, *rest: Any) -> None:
        phases.extend([phase] * (phase in (LOOK, READ, READ_STATE)))
        replayed(phase, *rest)

    monkeypatch.setattr(engine, "replay", noted)
    return phases


def plan(engine: ActionEngine, lane: Any, observation: dict[str, Any], **rest: Any) -> bytes:
    engine.observe(lane, observation)
    engine.plan(lane, **rest)
    return engine.chunk(lane).tobytes()


@pytest.mark.parametrize("overlaps", [0, 1, 3])
def test_a_long_life(tiny: Path, overlaps: int) -> None:
    """Fault: a bit that depends on what a lane planned before, where, or in which slices."""

    class LongLives(Lives):
        engine = flashrt.load_policy(tiny, device="cpu", lanes=LANES)
        overlap = overlaps

        def seen(self, at: int) -> Any:
            return seen(at)

    walk(LongLives, 60, seed=overlaps)
    LongLives.engine.close()


def whole_state(engine: ActionEngine) -> None:
    """Capsules between any two verbs, inside a plan too, are brought back over poison."""
    lane = engine.lanes[0]

    def go_on() -> tuple[bytes, str]:
        taken = b""
        if engine.cursor(lane).plan_steps_left:
            taken += engine.tick(lane, seen(4)).tobytes()
            while not engine.continue_plan(lane):
                taken += engine.tick(lane, seen(5)).tobytes()
        taken += engine.tick(lane, seen(3)).tobytes() + plan(engine, lane, seen(3), committed=1)
        return taken + engine.act(lane).tobytes(), engine.digest(lane)

    for is_planning in (False, True):
        engine.reset(lane)
        plan(engine, lane, seen(2))
        engine.tick(lane, seen(9))
        if is_planning:
            engine.observe(lane, seen(3))
            engine.begin_plan(lane, committed=1)
            engine.continue_plan(lane)
        capsule = engine.snapshot(lane)
        assert capsule.digest == engine.digest(lane)
        first = go_on()
        engine.poison_lane(lane)
        engine.arena.poison_scratch()
        engine.restore(lane, capsule)
        assert go_on() == first
        capsule.drop()


def test_a_capsule_is_the_whole_state(tiny: Path) -> None:
    with flashrt.load_policy(tiny, device="cpu") as engine:
        whole_state(engine)


@pytest.mark.parametrize(
    "forgotten", ["cursor", "queue", "kept", "flow", "target", "keys", "cross_values"]
)
def test_a_forgotten_region_is_noticed(
    tiny: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with one region that is no state the test above must fail."""
    declared = vla_policy._lane_regions

    def without(*arguments: Any) -> tuple[Region, ...]:
        return tuple(
            Region(r.name, r.shape, r.dtype, Role.IO)
            if r.name == forgotten and r.role is Role.FIXED
            else r
            for r in declared(*arguments)
        )

    monkeypatch.setattr(vla_policy, "_lane_regions", without)
    engine = ActionEngine(
        *policy_for(open_checkpoint(tiny)), CpuDevice(alone_nbytes=1 << 30), lanes=1
    )
    if forgotten in ("keys", "cross_values"):  # rows cannot be other than rows: they are lost
        slot, restore = engine.arena.lane(0).rows.slot(forgotten), engine.restore

        def without_rows(lane: Any, capsule: Any) -> None:
            restore(lane, capsule)
            engine.set_lane_array(lane, forgotten, np.full(slot.region.shape, np.nan, np.float32))

        monkeypatch.setattr(engine, "restore", without_rows)
    with pytest.raises((AssertionError, flashrt.FlashrtError)):
        whole_state(engine)


def test_rows_are_made_when_what_they_are_of_has_changed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And else not, to the bits of a lane that makes all. Fault: rows that are made twice, or not
    anew.
    """
    base = observation_of(CONFIG, 1)
    other_state = {**base, STATE: observation_of(CONFIG, 2)[STATE]}
    other_wrist = {**base, WRIST: observation_of(CONFIG, 2)[WRIST]}
    other_task = {**base, "task": "lift it"}
    no_wrist = {name: part for name, part in base.items() if name != WRIST}
    chunks = set()
    with flashrt.load_policy(tiny, device="cpu", lanes=2) as engine:
        lane, fresh = engine.lanes
        phases = made(engine, monkeypatch)
        for observation, wanted in (
            (base, [LOOK, LOOK, READ, READ_STATE]),
            (base, []),
            (other_state, [READ_STATE]),
            (base, [READ_STATE]),
            (other_wrist, [LOOK, READ, READ_STATE]),
            (other_task, [LOOK, READ, READ_STATE]),
            (no_wrist, [READ, READ_STATE]),
            (base, [READ, READ_STATE]),
        ):
            phases.clear()
            engine.cut(lane)  # nothing guides
            chunk = plan(engine, lane, observation)
            assert phases == wanted
            engine.poison_lane(fresh)
            engine.reset(fresh)
            assert plan(engine, fresh, observation) == chunk
            chunks.add(chunk)
        assert len(chunks) == 5


def test_rows_that_a_capsule_brings_back_are_not_made_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this lane and in another; fault: a restore that leaves rows that nobody knows."""
    with flashrt.load_policy(tiny, device="cpu", lanes=2) as engine:
        lane, other = engine.lanes
        engine.reset(lane)
        first = plan(engine, lane, seen(0))
        capsule = engine.snapshot(lane)
        plan(engine, lane, seen(30))
        phases = made(engine, monkeypatch)
        for target in (lane, other):
            engine.restore(target, capsule)
            engine.observe(target, seen(0))
            engine.plan(target, given=Given(noise_of(CONFIG, 3)))
            assert engine.chunk(target).tobytes() != first
        assert phases == []
        assert engine.chunk(lane).tobytes() == engine.chunk(other).tobytes()


def test_capsules_of_one_scene_share_its_rows(tiny: Path) -> None:
    """Fault: each state of the robot stores all rows of the images again."""
    with flashrt.load_policy(tiny, device="cpu") as engine:
        lane, sizes = engine.lanes[0], []
        for at in range(3):  # other states
            plan(engine, lane, seen(at))
            sizes.append(engine.snapshot(lane).nbytes - engine.capsules.fixed_nbytes)
        block = sizes[0] - sizes[1]
        assert sizes[1] == sizes[2] and block > 0
        engine.capsules.check_integrity()


def test_slices_are_a_plan_at_once(tiny: Path) -> None:
    with flashrt.load_policy(tiny, device="cpu", lanes=2) as engine:
        for lane, is_sliced in zip(engine.lanes, (False, True), strict=True):
            engine.observe(lane, seen(7))
            if is_sliced:
                engine.begin_plan(lane)
                while not engine.continue_plan(lane):
                    engine.observe(lane, seen(9))  # does not touch the plan in the making
                engine.observe(lane, seen(7))
            else:
                engine.plan(lane)
        first, second = (engine.digest(lane) for lane in engine.lanes)
        assert first == second


def test_promised_actions_stay_to_the_bit(tiny: Path) -> None:
    with flashrt.load_policy(tiny, device="cpu") as engine:
        lane = engine.lanes[0]
        plan(engine, lane, seen(0))
        before = engine.lane_array(lane, "queue").copy()
        engine.tick(lane, seen(1))
        engine.plan(lane, committed=3)
        after = engine.lane_array(lane, "queue")
        assert np.array_equal(before[:3], after[:3]) and not np.isclose(before[3:], after[3:]).all()
        assert engine.cursor(lane).stop == 7


def test_lanes_together_are_lanes_alone(tiny: Path) -> None:
    """Fault: what lanes share, in ticks or in plans, changes a bit of one."""
    with flashrt.load_policy(tiny, device="cpu", lanes=4) as engine:
        together, alone = (
            [flashrt.ControlLoop(engine, overlap=1) for _ in range(2)] for _ in range(2)
        )
        for at in range(0, 20, 2):
            shared = tick_together(together, [engine.pack(seen(at + i)) for i in range(2)])
            each = [loop.tick(seen(at + i)) for i, loop in enumerate(alone)]
            assert [a.tobytes() for a in shared] == [a.tobytes() for a in each]
        assert [loop.digest() for loop in together] == [loop.digest() for loop in alone]


@pytest.mark.parametrize(
    "makers",
    [(lambda: CpuDevice(1), lambda: CpuDevice(3)), (SimtDevice, lambda: SimtDevice(seed=9))],
    ids=["cpu", "simt"],
)
def test_threads_and_schedules_change_no_bit(
    tiny: Path, makers: tuple[Callable[[], Any], ...]
) -> None:
    digests = set()
    for make in makers:
        with ActionEngine(*policy_for(open_checkpoint(tiny)), make(), lanes=1) as engine:
            plan(engine, engine.lanes[0], seen(4))
            digests.add(engine.digest(engine.lanes[0]))
    assert len(digests) == 1


def test_simt_is_near_the_cpu(tiny: Path) -> None:
    chunks = []
    for device in ("cpu", "simt"):
        with flashrt.load_policy(tiny, device=device, precision="high") as engine:
            plan(engine, engine.lanes[0], seen(4))
            engine.tick(engine.lanes[0], seen(5))
            plan(engine, engine.lanes[0], seen(5), committed=2)
            chunks.append(engine.chunk(engine.lanes[0]))
    assert np.abs(chunks[0] - chunks[1]).max() < 1e-4


# -- loops ------------------------------------------------------------------------------------


@pytest.fixture
def engine(tiny: Path) -> Iterator[ActionEngine]:
    with flashrt.load_policy(tiny, device="cpu", lanes=3) as made:
        yield made


def test_a_loop_comes_back_to_the_bit(engine: ActionEngine, tmp_path: Path) -> None:
    """Rewind, restore, fork, a chunk that is looked at, a recording: nothing changes a bit. The
    recording has numbers where the loop had images as they came.
    """
    stream = [seen(at) for at in range(0, 24, 2)]
    loop = flashrt.ControlLoop(engine, hz=20, overlap=0, boundary_seconds=0.25)
    with record(loop, tmp_path / "run.recording"):
        first = [loop.tick(observation).tobytes() for observation in stream]
        loop.slack()
    digest = loop.digest()
    loop.rewind_ticks(7)
    capsule = loop.snapshot()
    assert not np.allclose(loop.predict_chunk(stream[9]), loop.predict_chunk(stream[2]))
    for again in (loop, loop.fork()[0]):
        assert [again.tick(o).tobytes() for o in stream[5:]] == first[5:]
        assert again.digest() == digest
        again.restore(capsule)
    loop.close()
    assert replay(engine, tmp_path / "run.recording").mismatch is None


@pytest.mark.parametrize("phase", [LOOK, READ, READ_STATE, PLAN])
@pytest.mark.parametrize("is_done", [False, True])
def test_an_exception_while_rows_are_made_is_survived(
    engine: ActionEngine, phase: str, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a replay, or after it and before its rows are known. Fault: rows that a lane is said
    to have, or a camera that the tower is said to have seen.
    """
    loop, fresh = (flashrt.ControlLoop(engine, overlap=0) for _ in range(2))
    stream = [seen(at) for at in (0, 1, 2, 3, 14, 15)]
    for observation in stream[:4]:
        assert loop.tick(observation).tobytes() == fresh.tick(observation).tobytes()
    replayed = engine.replay

    def failing(asked: str, *rest: Any) -> None:
        if asked != phase or is_done:
            replayed(asked, *rest)
        if asked == phase:
            monkeypatch.setattr(engine, "replay", replayed)
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "replay", failing)
    with pytest.raises(KeyboardInterrupt):
        loop.tick(stream[4])
    for observation in stream[4:]:
        assert loop.tick(observation).tobytes() == fresh.tick(observation).tobytes()
    assert loop.digest() == fresh.digest()


def test_another_task_is_an_interrupt_away(engine: ActionEngine) -> None:
    """Fault: a task that is kept from the plan before."""
    loop, fresh = (flashrt.ControlLoop(engine, overlap=0) for _ in range(2))
    for _ in range(2):
        loop.tick(seen(0))
        fresh.tick({**seen(0), "task": "wait"})
    other = {**seen(0), "task": "stop now"}
    going_on = loop.predict_chunk(seen(0))
    for each in (loop, fresh):
        each.interrupt()
    assert np.array_equal(loop.predict_chunk(other), fresh.predict_chunk(other))
    assert not np.allclose(loop.predict_chunk(other), going_on)


def test_the_interface_of_lerobots_policies(engine: ActionEngine) -> None:
    """Batches of one, given noise, real-time chunking; and what is wrong is named."""
    whole: dict[str, Any] = observation_of(CONFIG, 2)
    batch: dict[str, Any] = {
        name: (whole[name].transpose(2, 0, 1)[None] / np.float32(255)).astype(np.float32)
        for name in (TOP, WRIST)
    }
    batch |= {STATE: whole[STATE][None], "task": [whole["task"]]}
    agent = PolicyAgent(flashrt.ControlLoop(engine, overlap=0))
    noise = noise_of(CONFIG, 1)
    chunk = agent.predict_action_chunk(batch, noise=noise[None])
    assert chunk.shape == (1, 8, 2) and agent.loop.position == 0
    assert np.array_equal(agent.predict_action_chunk(whole, noise=noise), chunk[0])
    left = np.zeros((5, 2), np.float32)
    guided = agent.predict_action_chunk(
        whole, noise=noise, inference_delay=1, prev_chunk_left_over=left, execution_horizon=4
    )
    assert not np.allclose(guided, chunk[0])
    actions = [agent.select_action(batch) for _ in range(4)]
    assert np.stack(actions, 1).shape == (1, 4, 2)
    before = agent.loop.digest()
    for wrong, said in (
        ({**whole, "task": 3}, "task is 3, expected a text"),
        ({TOP: whole[TOP], "task": "go"}, "lacks observation.state"),
        ({STATE: whole[STATE], "task": "go"}, "one of which is needed at least"),
        ({**whole, "observation.images.side": whole[TOP]}, "which the policy does not take"),
        ({**whole, TOP: whole[TOP][:-1]}, r"uint8 \(15, 16, 3\), expected an image"),
        ({**whole, TOP: whole[TOP] * np.float32(np.nan)}, "some pixels are not finite"),
        ({**whole, STATE: whole[STATE][:2]}, r"observation.state: float32 \(2,\)"),
        (np.zeros(engine.config.observation_dim, np.float32), "expected bits of 2 cameras"),
    ):
        with pytest.raises(ObservationError, match=said):
            agent.select_action(wrong)
    for given, said in (
        ({"noise": noise[:3]}, r"noise: float32 \(3, 6\), expected float32 \(8, 6\)"),
        ({"noise": noise * np.float32(np.inf)}, "not finite"),
        ({"prev_chunk_left_over": left[:, :1]}, r"expected float32 \(n, 2\)"),
        ({"inference_delay": -1, "prev_chunk_left_over": left}, "delay is -1"),
    ):
        with pytest.raises(ObservationError, match=said):
            agent.predict_action_chunk(whole, **given)
    assert agent.loop.digest() == before


def test_a_capsule_file_goes_to_another_engine(
    tiny: Path, engine: ActionEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = flashrt.ControlLoop(engine)
    for at in range(3):
        loop.tick(seen(at))
    loop.snapshot().save(tmp_path / "reach.capsule")
    following = loop.tick(seen(6))
    with flashrt.load_policy(tiny, device="cpu") as other:
        again = flashrt.ControlLoop(other)
        again.restore(other.load_capsule(tmp_path / "reach.capsule"))
        assert np.array_equal(again.tick(seen(6)), following)
        monkeypatch.setattr(other.policy, "most_prefix_rows", 2)
        with pytest.raises(CapsuleError, match="an observation has 2 at most"):
            other.load_capsule(tmp_path / "reach.capsule")
