"""A robot that sees and reads: reset, rewind, look-ahead and barge-in, policy and world together.

gym-pusht's table, 96 x 96 pixels of it; a small SmolVLA, cloned from a script; "push the T to the
left", "up", ... The state of the loop is some kilobytes of the arena, the world's is twelve
numbers: a moment is both, and what follows from it is the same to the bit.

Needs gym-pusht: pip install 'flashrt[pusht]'

    python examples/robot_pixels.py [POLICY] [--device cpu]
"""

import argparse
import time

import numpy as np

import flashrt
from flashrt.robot import Moment, Rollout
from flashrt.worlds.pusht import FPS, PushT

SEED = 4
FUTURES = 4
EPISODES = 3
BARGE_AT = 6  # ticks: within a chunk
POOL = 64 << 20  # bytes, for capsules


def finish(robot: Rollout) -> tuple[list[bytes], float, bool]:
    """The rest of an episode: the actions' bits, the return, whether the T got there."""
    steps = []
    while not robot.is_over:
        steps.append(robot.step())
    actions = [step.action.tobytes() for step in steps]
    return actions, sum(step.reward for step in steps), bool(steps[-1].info["is_success"])


def look_ahead(robot: Rollout, moment: Moment) -> list[tuple[list[bytes], float, bool]]:
    """What becomes of a moment with other noise, each future in a fork of policy and world."""
    robot.restore(moment)
    futures = robot.fork(FUTURES, seeds=range(FUTURES))
    seen = [finish(future) for future in futures]
    for future in futures:
        future.close()
    return seen


def told(robot: Rollout, moment: Moment, words: str) -> list[float]:
    """Another place is named at a moment; the T's way from it, px, until it is there."""
    robot.restore(moment)
    world = robot.environment
    assert isinstance(world, PushT)
    observation, gaps, is_over = world.instruct(words), list[float](), False
    robot.loop.interrupt()
    while not is_over:
        observation, _, is_there, is_late, info = world.step(robot.loop.tick(observation))
        gaps.append(info["distance"])
        is_over = is_there or is_late
    return gaps


def main() -> None:
    """All four, with numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", nargs="?", default="pusht")
    parser.add_argument("--device", default="cpu", choices=("cpu", "simt", "cuda"))
    options = parser.parse_args()
    engine = flashrt.load_policy(
        options.policy, device=options.device, lanes=1 + FUTURES, pool_bytes=POOL
    )
    robot = Rollout(PushT, flashrt.ControlLoop(engine, FPS))

    robot.reset(SEED)
    start = robot.snapshot("start")
    first = finish(robot)
    began = time.perf_counter()
    robot.restore(start)
    spent = time.perf_counter() - began
    assert finish(robot) == first
    print(f"{options.device}: reset by restore in {1e6 * spent:.0f} us")

    robot.restore(start)
    for _ in range(BARGE_AT):
        robot.step()
    middle = robot.snapshot("middle")
    finish(robot)
    robot.restore(middle)  # the rewind of a policy and its world
    assert finish(robot)[0] == first[0][BARGE_AT:]
    print(f"  rewound to tick {BARGE_AT}: {len(first[0]) - BARGE_AT} actions again, to the bit")

    alone, best = [], []
    for seed in range(SEED, SEED + EPISODES):
        robot.reset(seed)
        moment = robot.snapshot()
        alone.append(finish(robot)[1])
        seen = look_ahead(robot, moment)
        choice = int(np.argmax([total for _, total, _ in seen]))
        robot.loop.set_seed(choice)
        assert finish(robot) == seen[choice], "what was foreseen comes true"
        best.append(seen[choice][1])
        moment.drop()
    means = f"mean return {np.mean(alone):.2f} -> {np.mean(best):.2f}"
    print(f"  looking ahead by {FUTURES} forks: {means}")

    for words in ("left", "right", "up", "down"):
        gaps = told(robot, middle, words)
        way = f"{gaps[0]:4.0f} px -> {gaps[-1]:3.0f} in {len(gaps)} ticks"
        print(f"  told {words:5} at tick {BARGE_AT}: {way}")


if __name__ == "__main__":
    main()
