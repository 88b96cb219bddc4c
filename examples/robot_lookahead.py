"""Looking ahead with forks: try eight futures, go on with the best.

One of the two doors is jammed, and the robot cannot see which. Its policy has two modes, a door
each, and the noise decides. A moment is the environment's state and a capsule; each fork continues
from it with noise of its own, in an environment of its own. What was foreseen comes true to the
bit.

Needs gymnasium: pip install 'flashrt[gym]'

    python examples/robot_lookahead.py [POLICY] [--device cpu] [--episodes 8]
"""

import argparse
import time

import numpy as np

import flashrt
from flashrt.robot import Moment, Rollout
from flashrt.worlds.two_doors import TwoDoors

FUTURES = 8
EVERY = 25  # ticks between decisions


def foresee(future: Rollout, moment: Moment, seed: int) -> tuple[float, str]:
    """Return of the rest with this noise, and the policy's digest after EVERY ticks."""
    future.restore(moment)
    future.loop.set_seed(seed)
    total, digest = 0.0, ""
    tick = 0
    while not future.is_over:
        if tick == EVERY:
            digest = future.loop.digest()
        total += future.step().reward
        tick += 1
    return total, digest


def episode(robot: Rollout, futures: list[Rollout], seed: int) -> tuple[bool, int]:
    """Whether it ends at the goal, and how many moments were foreseen and came true."""
    robot.reset(seed)
    foreseen, kept, tick = "", 0, 0
    while not robot.is_over:
        if futures and tick % EVERY == 0:
            if foreseen:
                assert robot.loop.digest() == foreseen
                kept += 1
            moment = robot.snapshot()
            seeds = [robot.loop.seed, *range(1000 * tick + 1, 1000 * tick + FUTURES)]
            seen = [foresee(f, moment, s) for f, s in zip(futures, seeds, strict=True)]
            best = int(np.argmax([value for value, _ in seen]))
            robot.loop.set_seed(seeds[best])
            foreseen = seen[best][1]
            moment.drop()
        info = robot.step().info
        tick += 1
    return bool(info["is_success"]), kept


def main() -> None:
    """The same episodes without and with look-ahead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", nargs="?", default="two-doors")
    parser.add_argument("--device", default="cpu", choices=("cpu", "simt", "cuda"))
    parser.add_argument("--episodes", type=int, default=8)
    options = parser.parse_args()
    engine = flashrt.load_policy(options.policy, device=options.device, lanes=1 + FUTURES)

    def build() -> Rollout:
        return Rollout(
            lambda: TwoDoors(jammed=True), flashrt.ControlLoop(engine, engine.config.fps)
        )

    robot, futures = build(), [build() for _ in range(FUTURES)]
    print(f"{options.device}: one door of two is jammed, unseen; {options.episodes} episodes")
    solved = {}
    for name, forks in (("no look-ahead", []), (f"{FUTURES} forks", futures)):
        began = time.perf_counter()
        results = [episode(robot, forks, seed) for seed in range(options.episodes)]
        seconds = time.perf_counter() - began
        solved[name] = sum(success for success, _ in results)
        print(f"  {name:14} reached {solved[name]:3} of {options.episodes}   {seconds:6.2f} s")
    print(f"  {sum(kept for _, kept in results)} foreseen states came true, to the bit")
    assert solved[f"{FUTURES} forks"] >= solved["no look-ahead"]


if __name__ == "__main__":
    main()
