"""SmolVLA: what it has beside what every family promises in test_policy_families.

The state's row is apart from those of images and task, so capsules of one scene share these; and
real-time chunking, which the other small policies have off.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import ObservationError
from flashrt.engine.actions import ActionEngine
from flashrt.robot import PolicyAgent
from tests.policy_families import FAMILIES, SMOLVLA

FAMILY = FAMILIES[SMOLVLA]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILY.write(tmp_path_factory.mktemp("smolvla"))


@pytest.fixture
def engine(policy: Path) -> Iterator[ActionEngine]:
    with flashrt.load_policy(policy, device="cpu") as made:
        yield made


def test_capsules_of_one_scene_share_its_rows(engine: ActionEngine) -> None:
    """Fault: each state of the robot stores all rows of the images again."""
    lane, sizes = engine.lanes[0], []
    for at in range(3):  # other states
        engine.observe(lane, FAMILY.seen(at))
        engine.plan(lane)
        sizes.append(engine.snapshot(lane).nbytes - engine.capsules.fixed_nbytes)
    block = sizes[0] - sizes[1]
    assert sizes[1] == sizes[2] and block > 0
    engine.capsules.check_integrity()


def test_simt_is_near_the_cpu(policy: Path) -> None:
    """With a camera that is missing and a chunk that is guided, which no golden set has there."""
    chunks = []
    for device in ("cpu", "simt"):
        with flashrt.load_policy(policy, device=device, precision="high") as engine:
            lane = engine.lanes[0]
            engine.observe(lane, FAMILY.seen(4))
            engine.plan(lane)
            engine.tick(lane, FAMILY.seen(5))
            engine.plan(lane, committed=2)
            chunks.append(engine.chunk(lane))
    assert np.abs(chunks[0] - chunks[1]).max() < 1e-4


def test_rows_left_over_guide_a_chunk(engine: ActionEngine) -> None:
    """As LeRobot's policies are given them; and what does not fit is named."""
    agent, whole = PolicyAgent(flashrt.ControlLoop(engine, overlap=0)), FAMILY.observation(2)
    noise, left = FAMILY.noise(1), np.zeros((5, 2), np.float32)
    given: dict[str, Any] = {"noise": noise, "inference_delay": 1, "execution_horizon": 4}
    guided = agent.predict_action_chunk(whole, prev_chunk_left_over=left, **given)
    assert not np.allclose(guided, agent.predict_action_chunk(whole, noise=noise))
    before = agent.loop.digest()
    for wrong, said in (
        ({"prev_chunk_left_over": left[:, :1]}, r"expected float32 \(n, 2\)"),
        ({"inference_delay": -1, "prev_chunk_left_over": left}, "delay is -1"),
    ):
        with pytest.raises(ObservationError, match=said):
            agent.predict_action_chunk(whole, **wrong)
    assert agent.loop.digest() == before
