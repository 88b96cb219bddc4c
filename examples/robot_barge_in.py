"""Barging in: the goal changes in the middle of a chunk of actions.

The robot has promised itself a chunk of eight actions; two ticks into it the goal moves. The new
cue is one more observation, written into the same io region that every tick writes: nothing is
captured again. Left alone, the policy finishes its chunk first; `interrupt` drops the rest of it,
and the next tick plans before it acts. Both continue from one capsule.

Needs gymnasium: pip install 'flashrt[gym]'

    python examples/robot_barge_in.py [POLICY] [--device cpu]
"""

import argparse
import math

import flashrt
from flashrt.robot import Moment, Rollout
from flashrt.worlds.two_doors import FPS, REACHED, TICKS, VX, TwoDoors, X, Y

INTO_CHUNK = 2  # ticks
LIMIT = 2 * TICKS
EPISODES = 8


def go_on(robot: Rollout, moment: Moment, goal: tuple[float, float], interrupt: bool) -> list[int]:
    """Ticks until the robot was commanded towards the new goal, and until it was there."""
    robot.restore(moment)
    world = robot.environment
    assert isinstance(world, TwoDoors)
    observation = world.move_goal(*goal)
    if interrupt:
        robot.loop.interrupt()
    turned = reached = LIMIT
    for tick in range(LIMIT):
        action = robot.loop.tick(observation)
        state = world.get_state()
        bearing = math.atan2(goal[1] - state[Y], goal[0] - state[X])
        off = math.remainder(math.atan2(action[1], action[0]) - bearing, 2 * math.pi)
        observation, _, _, _, info = world.step(action)
        if turned == LIMIT and abs(off) < math.pi / 4:
            turned = tick
        if reached == LIMIT and info["distance"] < REACHED:
            reached = tick + 1
        if reached < LIMIT:
            break
    return [turned, reached]


def main() -> None:
    """Some episodes, each continued in both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", nargs="?", default="two-doors")
    parser.add_argument("--device", default="cpu", choices=("cpu", "simt", "cuda"))
    options = parser.parse_args()
    engine = flashrt.load_policy(options.policy, device=options.device)
    robot = Rollout(TwoDoors, flashrt.ControlLoop(engine, engine.config.fps))

    waits, barges = [], []
    for seed in range(EPISODES):
        robot.reset(seed)
        barge_at = 3 * engine.config.n_action_steps + INTO_CHUNK
        for _ in range(barge_at):
            robot.step()
        world = robot.environment
        assert isinstance(world, TwoDoors)
        state = world.get_state()
        goal = (-0.7 if state[X] + state[VX] / 2 > 0 else 0.7, 0.35)
        moment = robot.snapshot()
        waits.append(go_on(robot, moment, goal, interrupt=False))
        barges.append(go_on(robot, moment, goal, interrupt=True))
        moment.drop()

    ms = 1000 / FPS
    print(f"{options.device}: the goal moves {INTO_CHUNK} ticks into a chunk; {EPISODES} episodes")
    for name, runs in (("finishes its chunk", waits), ("interrupted", barges)):
        turned, reached = (sum(run[i] for run in runs) / EPISODES for i in (0, 1))
        print(f"  {name:20} turns after {turned * ms:5.0f} ms, is there after {reached * ms:5.0f}")
    assert sum(b[1] for b in barges) < sum(w[1] for w in waits)
    stats = robot.loop.stats()
    counts = {name: stats[name] for name in ("captures", "allocations", "compilations")}
    assert not any(counts.values())
    print("  meanwhile " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
