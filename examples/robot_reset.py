"""Resetting a robot's episode: restore a capsule, or build the policy anew.

The robot of `two doors` is shown its goal for five ticks and must remember it. A capsule taken then
is an episode that has begun: the goal in memory, the first chunk of actions under way. Going back
to it is one copy; the other ways must show the robot its goal again. All give the same bits.

Needs gymnasium: pip install 'flashrt[gym]'

    python examples/robot_reset.py [POLICY] [--device cpu]
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

import flashrt
from flashrt.robot import Rollout
from flashrt.worlds.two_doors import CUE_TICKS, TwoDoors

SEED = 4
TIMES = 50


def finish(rollout: Rollout) -> np.ndarray:
    """The actions of the rest of the episode."""
    actions = []
    while not rollout.is_over:
        actions.append(rollout.step().action)
    return np.array(actions)


def median_us(action: Callable[[], object], times: int) -> float:
    """Median of `times` calls."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * 1e6


def main() -> None:
    """Three ways back to the same moment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", nargs="?", default="two-doors")
    parser.add_argument("--device", default="cpu", choices=("cpu", "simt", "cuda"))
    options = parser.parse_args()

    def build() -> Rollout:
        engine = flashrt.load_policy(options.policy, device=options.device)
        return Rollout(TwoDoors, flashrt.ControlLoop(engine, engine.config.fps))

    def show_goal(rollout: Rollout) -> Rollout:
        rollout.reset(SEED)
        for _ in range(CUE_TICKS):
            rollout.step()
        rollout.loop.slack()
        return rollout

    rollout = show_goal(build())
    begun = rollout.snapshot("knows its goal")
    first = finish(rollout)

    ways = {
        "build the policy, show the goal": lambda: show_goal(build()),
        "reset, show the goal": lambda: show_goal(rollout),
        "restore the capsule": lambda: rollout.loop.restore(begun.capsule),
    }
    print(f"{options.device}: back to tick {CUE_TICKS} of an episode, {begun.capsule.nbytes} bytes")
    for name, way in ways.items():
        print(f"  {name:34}{median_us(way, TIMES if 'restore' in name else 3):12.0f} us")

    rebuilt = finish(show_goal(build()))
    shown = finish(show_goal(rollout))
    rollout.restore(begun)
    restored = finish(rollout)
    for again in (rebuilt, shown, restored):
        assert again.tobytes() == first.tobytes()
    print(f"  the {len(first)} actions that follow are the same to the bit in all three")
    print(f"  on the way: {frozen(rollout.loop)}")


def frozen(loop: flashrt.ControlLoop) -> str:
    """Counters of a sealed engine since the loop was made."""
    stats = loop.stats()
    names = ("allocations", "captures", "compilations")
    assert not any(stats[name] for name in names)
    return ", ".join(f"{stats[name]} {name}" for name in names)


if __name__ == "__main__":
    main()
