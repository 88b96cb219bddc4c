"""ACT: what it has beside what every family promises in test_policy_families.

A temporal ensemble, and observations without a task, which an environment has by names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import flashrt
from flashrt.robot import Rollout, run
from tests.policy_families import ACT_ENSEMBLE, ACT_SEEING, FAMILIES


def test_an_interrupt_begins_the_average_anew(tmp_path: Path) -> None:
    """Fault: what was averaged before stays in force."""
    family = FAMILIES[ACT_ENSEMBLE]
    with flashrt.load_policy(family.write(tmp_path), device="cpu", lanes=2) as engine:
        loop, fresh = (flashrt.ControlLoop(engine, overlap=0) for _ in range(2))
        for at in range(5):
            loop.tick(family.seen(at))
        going_on = loop.predict_chunk(family.seen(6))
        loop.interrupt()
        anew = fresh.predict_chunk(family.seen(6))
        assert np.array_equal(loop.predict_chunk(family.seen(6)), anew)
        assert not np.allclose(going_on, anew)


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


def test_a_rollout_goes_by_names(tmp_path: Path) -> None:
    """Fault: parts are taken in the environment's order, or images from 0 to 255."""
    policy = FAMILIES[ACT_SEEING].write(tmp_path)
    with flashrt.load_policy(policy, device="cpu", lanes=3) as engine:
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
