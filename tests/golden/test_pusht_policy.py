"""The bundled policy that sees and reads, in closed loop on gym-pusht's table.

A few episodes, on seeds that were not trained on; tools/train_policy/evaluate_pusht.py does more.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import flashrt
from flashrt.engine.actions import ActionEngine
from flashrt.robot import Rollout

pytest.importorskip("gym_pusht")
from flashrt.worlds import pusht
from flashrt.worlds.pusht import FPS, PushT

FIRST_SEED = 1_000_000
EPISODES, ENOUGH = 10, 7


@pytest.fixture(scope="module")
def engine() -> Iterator[ActionEngine]:
    engine = flashrt.load_policy("pusht", device="cpu", lanes=4, pool_bytes=64 << 20)
    yield engine
    engine.close()


@pytest.fixture
def robot(engine: ActionEngine) -> Iterator[Rollout]:
    with Rollout(PushT, flashrt.ControlLoop(engine, FPS)) as robot:
        yield robot


def table_of(robot: Rollout) -> PushT:
    assert isinstance(robot.environment, PushT)
    return robot.environment


def finish(robot: Rollout) -> list[bytes]:
    """Bits of all that is done, and of the table after it, in the rest of an episode."""
    bits = []
    while not robot.is_over:
        action = robot.step().action
        bits.append(action.tobytes() + table_of(robot).get_state().tobytes())
    return bits


def test_the_t_gets_where_words_say(robot: Rollout) -> None:
    """Red when the policy sees, reads or acts wrongly: by chance nearly none succeeds."""
    reached = 0
    for seed in range(FIRST_SEED, FIRST_SEED + EPISODES):
        robot.reset(seed)
        while not robot.is_over:
            info = robot.step().info
        reached += bool(info["is_success"])
    assert reached >= ENOUGH


def test_a_moment_and_forks_of_it_go_on_to_the_bit(robot: Rollout) -> None:
    """Red when anything of the policy or of the table stays behind in a restore or a fork."""
    robot.reset(FIRST_SEED)
    for _ in range(5):  # into a chunk, and into the T
        robot.step()
    moment = robot.snapshot()
    first = finish(robot)
    assert len(first) > 4
    robot.restore(moment)
    futures = robot.fork(2, seeds=[robot.loop.seed, 77])
    same, other = (finish(future) for future in futures)
    for future in futures:
        future.close()
    assert same == first
    assert other != first, "other noise, other actions"
    assert finish(robot) == first


def test_other_words_at_one_moment_take_the_t_elsewhere(robot: Rollout) -> None:
    """Red when the task of an observation does not reach the policy."""
    robot.reset(FIRST_SEED + 1)
    for _ in range(5):
        robot.step()
    moment = robot.snapshot()
    world = table_of(robot)
    ends = {}
    for words in ("left", "right"):
        robot.restore(moment)
        observation = world.instruct(words)
        robot.loop.interrupt()
        for _ in range(30):
            observation, *_ = world.step(robot.loop.tick(observation))
        ends[words] = world.get_state()[pusht.T_X]
    assert ends["right"] - ends["left"] > 60
