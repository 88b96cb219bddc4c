"""Replaying a robot's rollout to the bit, and drawing it.

Records what the control loop takes in and what it answers, with an interrupt and a restore on the
way; then runs it all again on a policy loaded afresh, and compares every action and digest.
With --out FOLDER, the paths of twelve episodes as an SVG drawing.

Needs gymnasium: pip install 'flashrt[gym]'

    python examples/robot_replay.py [POLICY] [--device cpu] [--out FOLDER]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import flashrt
from flashrt.robot import Rollout, record, replay
from flashrt.worlds.two_doors import DOORS, GOAL_X, GOAL_Y, HALF_DOOR, TwoDoors, X, Y

COLOURS = ("#0f766e", "#b45309", "#6d28d9", "#be123c")


def path_of(robot: Rollout, seed: int) -> np.ndarray:
    """Positions of an episode, and its goal in the last row."""
    robot.reset(seed)
    world = robot.environment
    assert isinstance(world, TwoDoors)
    path = [world.get_state()[[X, Y]]]
    while not robot.is_over:
        robot.step()
        path.append(world.get_state()[[X, Y]])
    return np.array([*path, world.get_state()[[GOAL_X, GOAL_Y]]])


def drawing(paths: list[np.ndarray]) -> str:
    """An SVG of the room."""
    side, middle = DOORS + HALF_DOOR, DOORS - HALF_DOOR
    wall = f"M-1 0H{-side}M{-middle} 0H{middle}M{side} 0H1"
    shapes = [f'<path d="{wall}" stroke="#57534e" stroke-width="0.1"/>']
    for i, path in enumerate(paths):
        colour, (x, y) = COLOURS[i % len(COLOURS)], path[-1]
        points = " ".join(f"{x:.3f},{-y:.3f}" for x, y in path[:-1])
        shapes.append(
            f'<circle cx="{x:.3f}" cy="{-y:.3f}" r="0.03" fill="{colour}"/>'
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="0.012"/>'
        )
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 2 2" width="480" height="480">'
    return "\n".join([head, *shapes, "</svg>\n"])


def main() -> None:
    """Record, replay on a fresh engine, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", nargs="?", default="two-doors")
    parser.add_argument("--device", default="cpu", choices=("cpu", "simt", "cuda"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    engine = flashrt.load_policy(options.policy, device=options.device)
    robot = Rollout(TwoDoors, flashrt.ControlLoop(engine, engine.config.fps))
    robot.reset(seed=3)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rollout.safetensors"
        with record(robot.loop, file):
            for tick in range(60):
                robot.step()
                if tick == 20:
                    moment = robot.snapshot()
                if tick == 30:
                    robot.loop.interrupt()
                if tick == 40:
                    robot.restore(moment)
        again = flashrt.load_policy(options.policy, device=options.device)
        report = replay(again, file)
        size = file.stat().st_size
    assert report.first_difference is None, report.mismatch
    print(
        f"{options.device}: recorded {report.ticks} ticks, an interrupt and a restore: {size} bytes"
    )
    print(f"  a policy loaded afresh answers the same: {report.digests} digests, every action")
    if options.out is not None:
        paths = [path_of(robot, seed) for seed in range(12)]
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "two-doors.svg").write_text(drawing(paths))
        print(f"  drew {options.out / 'two-doors.svg'}")


if __name__ == "__main__":
    main()
