"""pi0.5: capsules are the whole state of a lane, and every way to a state gives its bits.

On a policy of one camera: restores inside a plan and between, forks, plans in slices, lanes
together; and which rows are made anew when a state, an image or a task is another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.backends.cpu.device import CpuDevice
from flashrt.core.region import Region, Role
from flashrt.engine.actions import ActionEngine
from flashrt.models.policies import policy_for
from flashrt.models.prefix import LOOK, READ
from flashrt.models.vla import policy as vla_policy
from flashrt.robot import record, replay, tick_together
from flashrt.weights.checkpoint import open_checkpoint
from tests.act_policies import random_statistics
from tests.pi05_policies import SETS, observation_of, write_random_pi05

NAME = "one-camera"
STREAM = [observation_of(NAME, seed) for seed in range(12)]
CAMERA, STATE = "observation.images.top", "observation.state"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_pi05(NAME, tmp_path_factory.mktemp("pi05"))


@pytest.fixture(scope="module")
def engine(policy: Path) -> Iterator[ActionEngine]:
    with flashrt.load_policy(policy, device="cpu", lanes=6) as made:
        yield made


def whole_state(engine: ActionEngine, ticks: int = 7) -> None:
    """Capsules between any two verbs, inside a plan too, are brought back over poison; `ticks` that
    follow are compared.
    """
    lane = engine.lanes[0]

    def go_on() -> tuple[bytes, str]:
        taken = b""
        if engine.cursor(lane).plan_steps_left:
            taken += engine.tick(lane, STREAM[4]).tobytes()
            while not engine.continue_plan(lane):
                pass
        for observation in STREAM[5 : 5 + ticks]:
            if not engine.cursor(lane).remaining:
                engine.observe(lane, observation)
                engine.plan(lane)
            taken += engine.tick(lane, observation).tobytes()
        return taken, engine.digest(lane)

    for is_planning in (False, True):
        engine.reset(lane)
        engine.observe(lane, STREAM[0])
        engine.plan(lane)
        for observation in STREAM[1:3]:
            engine.tick(lane, observation)
        if is_planning:
            engine.observe(lane, STREAM[3])
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


@pytest.mark.parametrize("device", ["cpu", "simt"])
def test_a_capsule_is_the_whole_state(policy: Path, device: str) -> None:
    with flashrt.load_policy(policy, device=device) as engine:
        whole_state(engine, 7 if device == "cpu" else 3)


@pytest.mark.parametrize("forgotten", ["cursor", "queue", "kept", "flow"])
def test_a_forgotten_region_is_noticed(
    policy: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: with one region outside the fixed band the test above must fail."""
    declared = vla_policy._lane_regions

    def without(*arguments: Any) -> tuple[Region, ...]:
        return tuple(
            Region(r.name, r.shape, r.dtype, Role.IO) if r.name == forgotten else r
            for r in declared(*arguments)
        )

    monkeypatch.setattr(vla_policy, "_lane_regions", without)
    engine = ActionEngine(
        *policy_for(open_checkpoint(policy)), CpuDevice(alone_nbytes=1 << 30), lanes=1
    )
    with pytest.raises((AssertionError, flashrt.FlashrtError)):
        whole_state(engine)


def test_slices_and_forks_have_the_bits_of_the_whole(engine: ActionEngine) -> None:
    """Fault: a step of a plan reads what only the plan at once has, or a fork lacks a row."""
    whole, sliced, forked = engine.lanes[:3]
    for lane in (whole, sliced):
        engine.reset(lane, seed=5)
        engine.observe(lane, STREAM[1])
        engine.plan(lane)
        engine.tick(lane, STREAM[2])
    engine.plan(whole, committed=2)
    engine.begin_plan(sliced, committed=2)
    engine.continue_plan(sliced)
    engine.fork(sliced, forked)
    engine.tick(sliced, STREAM[3])  # which is not planned from
    for lane in (sliced, forked):
        while not engine.continue_plan(lane):
            pass
    queue = engine.lane_array(whole, "queue")
    assert np.array_equal(engine.lane_array(sliced, "queue"), queue)
    assert engine.digest(forked) == engine.digest(whole)


def test_rows_that_are_there_are_not_made_again(
    engine: ActionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another state or task is another text, and makes the block anew; an image that is as it was
    is not looked at again. To the bit what an empty lane makes. Fault: rows of another observation
    stand, or all is made each time.
    """
    made: list[str] = []
    run = engine._run

    def spied(phase: str, *rest: Any) -> None:
        made.append(phase)
        run(phase, *rest)

    assert engine._prefixes is not None
    monkeypatch.setattr(engine._prefixes, "_run", spied)
    lane, fresh = engine.lanes[:2]
    statistics = random_statistics(STATE, (2,), SETS[NAME][2])
    first = {**STREAM[0], STATE: statistics["mean"]}
    others = (
        (first, [LOOK, READ]),
        (first, []),
        ({**first, STATE: statistics["mean"] + statistics["std"] / 2}, [READ]),
        ({**first, STATE: statistics["q99"] + 1}, [READ]),
        ({**first, STATE: statistics["q99"] + 2}, []),  # both beyond the last bin
        ({**first, "task": "let go"}, [READ]),
        ({**first, CAMERA: STREAM[1][CAMERA]}, [LOOK, READ]),
    )
    engine.poison_lane(lane)
    engine.reset(lane, seed=9)
    for seen, phases in others:
        made.clear()
        engine.observe(lane, seen)
        engine.plan(lane)
        assert made == phases
        engine.poison_lane(fresh)
        engine.reset(fresh, seed=9)
        engine.observe(fresh, seen)
        engine.plan(fresh)
        assert engine.digest(lane) == engine.digest(fresh)


@pytest.mark.parametrize("overlap", [0, 2])
def test_lanes_together_are_lanes_alone(engine: ActionEngine, overlap: int) -> None:
    """Fault: what lanes share, in ticks or in plans, changes a bit of one."""
    together, alone = (
        [flashrt.ControlLoop(engine, overlap=overlap) for _ in range(2)] for _ in range(2)
    )
    for tick in range(6):
        row = [STREAM[tick], STREAM[tick + 5]]
        shared = tick_together(together, row)
        each = [loop.tick(seen) for loop, seen in zip(alone, row, strict=True)]
        assert [a.tobytes() for a in shared] == [a.tobytes() for a in each]
    assert [loop.digest() for loop in together] == [loop.digest() for loop in alone]
    for loop in (*together, *alone):
        loop.close()


def test_a_loop_comes_back_to_the_bit(engine: ActionEngine, tmp_path: Path) -> None:
    """Rewind, restore, fork, a recording: nothing changes a bit."""
    loop = flashrt.ControlLoop(engine, hz=20, overlap=0, boundary_seconds=0.25)
    with record(loop, tmp_path / "run.recording"):
        first = [loop.tick(seen).tobytes() for seen in STREAM]
        loop.slack()
    digest = loop.digest()
    loop.rewind_ticks(7)
    capsule = loop.snapshot()
    for again in (loop, loop.fork()[0]):
        assert [again.tick(o).tobytes() for o in STREAM[5:]] == first[5:]
        assert again.digest() == digest
        again.restore(capsule)
        again.close()
    assert replay(engine, tmp_path / "run.recording").mismatch is None
