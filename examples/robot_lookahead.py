"""Looking ahead with forks: try eight futures, go on with the best.

One of the two doors is jammed, and the robot cannot see which. Its policy has two modes, a door
each, and the noise decides. A moment is the environment's state and a capsule; each fork continues
from it with noise of its own, in an environment of its own. What was foreseen comes true to the
bit. Futures side by side share each replay of the policy; the bits are those of each fork alone.

Needs gymnasium: pip install 'flashrt[gym]'

    python examples/robot_lookahead.py [POLICY] [--device cpu] [--episodes 8]
"""

import argparse
import time

import numpy as np

import flashrt
from flashrt.robot import Moment, Rollout, step_together
from flashrt.worlds.two_doors import TwoDoors

FUTURES = 8
EVERY = 25  # ticks between decisions
Ended = tuple[bool, list[str]]  # success; digests that were foreseen and came true


def foresee(futures: list[Rollout], moment: Moment, seeds: list[int]) -> list[tuple[float, str]]:
    """Of each noise: the return of the rest, and the policy's digest after EVERY ticks."""
    for future, seed in zip(futures, seeds, strict=True):
        future.restore(moment)
        future.loop.set_seed(seed)
    totals, digests = [0.0] * len(futures), [""] * len(futures)
    tick = 0
    while going := [i for i, future in enumerate(futures) if not future.is_over]:
        if tick == EVERY:
            for i in going:
                digests[i] = futures[i].loop.digest()
        for i, step in zip(going, step_together([futures[i] for i in going]), strict=True):
            totals[i] += step.reward
        tick += 1
    return list(zip(totals, digests, strict=True))


def episode(robot: Rollout, futures: list[Rollout], seed: int, width: int) -> Ended:
    """`width` futures are tried side by side; 0: none are."""
    robot.reset(seed)
    foreseen, kept, tick = "", list[str](), 0
    while not robot.is_over:
        if width and tick % EVERY == 0:
            if foreseen:
                assert robot.loop.digest() == foreseen
                kept.append(foreseen)
            moment = robot.snapshot()
            seeds = [robot.loop.seed, *range(1000 * tick + 1, 1000 * tick + FUTURES)]
            seen: list[tuple[float, str]] = []
            for at in range(0, FUTURES, width):
                seen += foresee(futures[at : at + width], moment, seeds[at : at + width])
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
    found, spent = {}, {}
    for width in (0, 1, FUTURES):
        began = time.perf_counter()
        found[width] = [episode(robot, futures, seed, width) for seed in range(options.episodes)]
        spent[width] = time.perf_counter() - began
    for name, width in (("no look-ahead", 0), (f"{FUTURES} forks", FUTURES)):
        reached = sum(success for success, _ in found[width])
        print(f"  {name:14} reached {reached:3} of {options.episodes}   {spent[width]:6.2f} s")
    print(f"  {sum(len(kept) for _, kept in found[FUTURES])} foreseen states came true, to the bit")
    alone, together = spent[1], spent[FUTURES]
    print(f"  {alone:.2f} s one by one, {together:.2f} s side by side: {alone / together:.1f} x")
    assert found[1] == found[FUTURES], "side by side each future is what it is alone"
    assert sum(e[0] for e in found[FUTURES]) >= sum(e[0] for e in found[0])


if __name__ == "__main__":
    main()
