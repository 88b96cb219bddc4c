"""ACT: capsules are the whole state of a loop, and every way to a state gives its bits.

On a policy without cameras, which is small, the lives of tests/property/test_control; on one of 32
x 32 pixels what images change: observations by name, and that a loop keeps those alone that a chunk
was made from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.simt.device import SimtDevice
from flashrt.base.errors import CapsuleError, ObservationError, SessionError
from flashrt.core.region import Region, Role
from flashrt.engine.actions import ActionEngine
from flashrt.models.act import model as act_model
from flashrt.models.act.config import ActConfig
from flashrt.models.policies import policy_for
from flashrt.robot import PolicyAgent, Rollout, record, replay, run, tick_together
from flashrt.weights.checkpoint import open_checkpoint
from tests.act_policies import SETS, observation_of, write_random_act
from tests.property.test_control import LANES, Lives, walk

GOLDEN = Path(__file__).parents[1] / "golden" / "act"


def written(name: str, folder: Path) -> Path:
    config, seed = SETS[name]
    tensors = json.loads((GOLDEN / f"{name}.json").read_text())["tensors"]
    return write_random_act(folder / name, config, tensors, seed)


def forget(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A region is no state of the engines that are made from here on."""
    declared = act_model._lane_regions

    def without(config: ActConfig) -> tuple[Region, ...]:
        return tuple(
            Region(r.name, r.shape, r.dtype, Role.IO) if r.name == forgotten else r
            for r in declared(config)
        )

    monkeypatch.setattr(act_model, "_lane_regions", without)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("no-camera", tmp_path_factory.mktemp("act"))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("pre-norm", tmp_path_factory.mktemp("act"))


@pytest.fixture(params=["cpu", "simt"])
def engine(request: pytest.FixtureRequest, small: Path) -> Iterator[ActionEngine]:
    with flashrt.load_policy(small, device=request.param, lanes=3) as made:
        yield made


def seen(n: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((n, 9)).astype(np.float32)


@pytest.mark.parametrize("overlaps", [0, 1, 3])
def test_a_long_life(small: Path, overlaps: int) -> None:
    class LongLives(Lives):
        engine = flashrt.load_policy(small, device="cpu", lanes=LANES)
        overlap = overlaps

    walk(LongLives, 100, seed=overlaps)
    LongLives.engine.close()


@pytest.mark.parametrize("overlaps", [0, 1])
def test_a_life_of_averages(overlaps: int, tmp_path: Path) -> None:
    """Every tick makes a chunk. Fault: an average, or what it is of, that is no state or outlives
    an interrupt.
    """

    class Averaging(Lives):
        engine = flashrt.load_policy(written("ensemble", tmp_path), device="cpu", lanes=LANES)
        overlap = overlaps

    walk(Averaging, 40, seed=overlaps)
    Averaging.engine.close()


@pytest.mark.parametrize("forgotten", ["average", "counts"])
def test_a_forgotten_average_is_noticed(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    forget(forgotten, monkeypatch)
    with pytest.raises((AssertionError, flashrt.FlashrtError)):
        test_a_life_of_averages(0, tmp_path)


def test_an_interrupt_begins_the_average_anew(tmp_path: Path) -> None:
    policy, stream = written("ensemble", tmp_path), np.tile(seen(12), (1, 1))[:, :8]
    with flashrt.load_policy(policy, device="cpu", lanes=2) as engine:
        loop, fresh = (flashrt.ControlLoop(engine, overlap=0) for _ in range(2))
        for observation in stream[:5]:
            loop.tick(observation)
        going_on = loop.predict_chunk(stream[5])
        loop.interrupt()
        assert np.array_equal(loop.predict_chunk(stream[5]), fresh.predict_chunk(stream[5]))
        assert not np.allclose(going_on, fresh.predict_chunk(stream[5]))


@pytest.mark.slow
def test_a_life_on_simt(small: Path) -> None:
    class SimtLives(Lives):
        engine = ActionEngine(*policy_for(open_checkpoint(small)), SimtDevice(seed=3), lanes=LANES)
        overlap = 2

    walk(SimtLives, 20, seed=3)
    SimtLives.engine.close()


def whole_state(engine: ActionEngine) -> None:
    """Capsules between any two verbs, inside a plan too, are brought back over poison."""
    lane, stream = engine.lanes[0], seen(12)

    def go_on() -> tuple[bytes, str]:
        taken = b""
        if engine.cursor(lane).plan_steps_left:
            taken += engine.tick(lane, stream[4]).tobytes()
            engine.continue_plan(lane)
        for observation in stream[5:]:
            if not engine.cursor(lane).remaining:
                engine.observe(lane, observation)
                engine.plan(lane)
            taken += engine.tick(lane, observation).tobytes()
        return taken, engine.digest(lane)

    for is_planning in (False, True):
        engine.reset(lane)
        engine.observe(lane, stream[0])
        engine.plan(lane)
        for observation in stream[1:3]:
            engine.tick(lane, observation)
        if is_planning:
            engine.observe(lane, stream[3])
            engine.begin_plan(lane, committed=1)
        capsule = engine.snapshot(lane)
        assert capsule.digest == engine.digest(lane)
        first = go_on()
        engine.arena.poison_lane(lane.index)
        engine.arena.poison_scratch()
        engine.restore(lane, capsule)
        assert go_on() == first
        capsule.drop()


def test_a_capsule_is_the_whole_state(engine: ActionEngine) -> None:
    whole_state(engine)


@pytest.mark.parametrize("forgotten", ["cursor", "queue", "kept", "chunk"])
def test_a_forgotten_region_is_noticed(
    small: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with one region outside the fixed band the test above must fail."""
    forget(forgotten, monkeypatch)
    engine = ActionEngine(
        *policy_for(open_checkpoint(small)), CpuDevice(alone_nbytes=1 << 30), lanes=1
    )
    with pytest.raises((AssertionError, flashrt.FlashrtError)):
        whole_state(engine)


def test_an_observation_is_no_state(engine: ActionEngine) -> None:
    """A plan from elsewhere observes first; red where it would take what another state saw."""
    a, b, _ = engine.lanes
    engine.reset(a)
    engine.observe(a, seen(1)[0])
    capsule, digest = engine.snapshot(a), engine.digest(a)
    engine.fork(a, b)
    for lane in (a, b):
        if lane is a:
            engine.restore(a, capsule)
        with pytest.raises(SessionError, match=r"the observation of tick 0 is not here.*observe"):
            engine.plan(lane)
        assert engine.digest(lane) == digest
        engine.observe(lane, seen(1)[0])
        engine.plan(lane)
    assert engine.digest(a) == engine.digest(b) != digest


def test_promised_actions_stay_to_the_bit(engine: ActionEngine) -> None:
    lane, (first, second) = engine.lanes[0], seen(2)
    engine.reset(lane)
    engine.observe(lane, first)
    engine.plan(lane)
    before = engine.lane_array(lane, "queue").copy()
    engine.tick(lane, second)
    engine.plan(lane, committed=3)
    after = engine.lane_array(lane, "queue")
    assert np.array_equal(before[:3], after[:3]) and not np.isclose(before[3:], after[3:]).all()
    assert engine.cursor(lane).stop == 7


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_lanes_together_are_lanes_alone(small: Path, overlap: int) -> None:
    """Fault: what lanes share, in ticks or in plans, changes a bit of one."""
    engine, stream = flashrt.load_policy(small, device="cpu", lanes=6), seen(30).reshape(10, 3, 9)
    together, alone = (
        [flashrt.ControlLoop(engine, overlap=overlap) for _ in range(3)] for _ in range(2)
    )
    for row in stream:
        shared = tick_together(together, list(row))
        each = [loop.tick(seen) for loop, seen in zip(alone, row, strict=True)]
        assert [a.tobytes() for a in shared] == [a.tobytes() for a in each]
    assert [loop.digest() for loop in together] == [loop.digest() for loop in alone]
    engine.close()


@pytest.mark.parametrize(
    "makers",
    [(lambda: CpuDevice(1), lambda: CpuDevice(3)), (SimtDevice, lambda: SimtDevice(seed=9))],
    ids=["cpu", "simt"],
)
def test_threads_and_schedules_change_no_bit(
    seeing: Path, makers: tuple[Callable[[], Any], ...]
) -> None:
    config, _ = SETS["pre-norm"]
    digests = set()
    for make in makers:
        engine = ActionEngine(*policy_for(open_checkpoint(seeing)), make(), lanes=1)
        engine.observe(engine.lanes[0], observation_of(config, 4))
        engine.plan(engine.lanes[0])
        digests.add(engine.digest(engine.lanes[0]))
        engine.close()
    assert len(digests) == 1


# -- with a camera ----------------------------------------------------------------------------


def test_a_loop_with_a_camera_comes_back_to_the_bit(seeing: Path, tmp_path: Path) -> None:
    """Rewind, restore, fork, a chunk that is looked at, a recording: nothing changes a bit. And of
    ticks that no chunk was made from the loop keeps no image.
    """
    config, _ = SETS["pre-norm"]
    stream = [observation_of(config, seed) for seed in range(12)]
    with flashrt.load_policy(seeing, device="cpu", lanes=2) as engine:
        loop = flashrt.ControlLoop(engine, hz=20, overlap=0, boundary_seconds=0.25)
        with record(loop, tmp_path / "run.recording"):
            first = [loop.tick(observation).tobytes() for observation in stream]
            loop.slack()
        digest = loop.digest()
        kept = [loop._history.past_tick(tick).observation.size for tick in range(len(stream))]
        assert [size > 0 for size in kept] == [tick % 4 == 0 for tick in range(len(stream))]
        loop.rewind_ticks(7)
        capsule = loop.snapshot()
        assert not np.allclose(loop.predict_chunk(stream[9]), loop.predict_chunk(stream[2]))
        for again in (loop, loop.fork()[0]):
            assert [again.tick(o).tobytes() for o in stream[5:]] == first[5:]
            assert again.digest() == digest
            again.restore(capsule)
        loop.close()
        assert replay(engine, tmp_path / "run.recording").mismatch is None


class Follower:
    """An environment of arrays by name; its image is what the last action painted."""

    def __init__(self) -> None:
        self.image = np.zeros((32, 32, 3), np.uint8)

    def reset(self, *, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.image[:] = np.random.default_rng(seed).integers(0, 256, self.image.shape, np.uint8)
        return self._seen(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.image += np.uint8(1 + 50 * abs(float(action[0])))
        return self._seen(), float(action.sum()), False, False, {}

    def close(self) -> None:
        pass

    def _seen(self) -> dict[str, Any]:
        """Not in the policy's order, and in a buffer that changes with the next step."""
        numbers = self.image[:4, 0, 0] / 255
        return {"observation.images.top": self.image, "observation.environment_state": numbers}


def test_a_rollout_goes_by_names(seeing: Path) -> None:
    """Fault: parts are taken in the environment's order, or images from 0 to 255."""
    with flashrt.load_policy(seeing, device="cpu", lanes=3) as engine:
        robot = Rollout(Follower, flashrt.ControlLoop(engine))
        robot.reset(seed=3)
        steps = [robot.step() for _ in range(6)]
        alone, world = flashrt.ControlLoop(engine), Follower()
        alone.reset(3)
        observation, _ = world.reset(seed=3)
        for step in steps:
            action = alone.tick(observation)
            assert action.tobytes() == step.action.tobytes()
            alone.slack()
            observation, *_ = world.step(action)
        (future,) = robot.fork()
        assert future.step().action.tobytes() == alone.tick(observation).tobytes()
        report = run(alone, Follower(), seconds=6 / 50, rate=0, seed=3)
        assert report.partial == sum(step.reward for step in steps)


def test_the_interface_of_lerobots_policies(seeing: Path) -> None:
    """Batches of one, a queue, a chunk that promises nothing; and what is wrong is named."""
    config, _ = SETS["pre-norm"]
    seen = observation_of(config, 2)
    camera, environment = "observation.images.top", "observation.environment_state"
    batch = {
        camera: (seen[camera].transpose(2, 0, 1)[None] / np.float32(255)).astype(np.float32),
        environment: seen[environment][None],
    }
    with flashrt.load_policy(seeing, device="cpu") as engine:
        agent = PolicyAgent(flashrt.ControlLoop(engine, overlap=0))
        chunk = agent.predict_action_chunk(batch)
        assert chunk.shape == (1, 9, 2) and agent.loop.position == 0
        actions = [agent.select_action(batch) for _ in range(4)]
        assert np.allclose(np.stack(actions, 1), chunk[:, :4], atol=1e-6)
        before = agent.loop.digest()
        for wrong, said in (
            ({environment: seen[environment]}, "lacks observation.images.top"),
            ({**seen, "observation.state": seen[environment]}, "has observation.state, which"),
            ({**seen, camera: seen[camera][:-1]}, r"uint8 \(31, 32, 3\), expected an image"),
            ({**seen, camera: seen[camera].astype(np.int32)}, "int32; uint8 from 0 to 255"),
            ({**seen, camera: seen[camera] * np.float32(np.nan)}, "some pixels are not finite"),
            ({**seen, environment: seen[environment][:2]}, r"environment_state: float32 \(2,\)"),
            ({name: np.concatenate([v, v]) for name, v in batch.items()}, "a batch of 2"),
            (seen[environment], r"float32 \(4,\), expected float32 \(3076,\)"),
        ):
            with pytest.raises(ObservationError, match=said):
                agent.select_action(wrong)
        assert agent.loop.digest() == before


def test_a_capsule_file_goes_to_another_engine(small: Path, seeing: Path, tmp_path: Path) -> None:
    with flashrt.load_policy(small, device="cpu") as engine:
        loop = flashrt.ControlLoop(engine)
        for observation in seen(5):
            loop.tick(observation)
        capsule = loop.snapshot()
        capsule.save(tmp_path / "reach.capsule")
        following = loop.tick(seen(1, seed=7)[0])
    with flashrt.load_policy(small, device="cpu") as engine:
        loop = flashrt.ControlLoop(engine)
        loop.restore(engine.load_capsule(tmp_path / "reach.capsule"))
        assert np.array_equal(loop.tick(seen(1, seed=7)[0]), following)
    with flashrt.load_policy(seeing, device="cpu") as engine, pytest.raises(CapsuleError):
        engine.load_capsule(tmp_path / "reach.capsule")
