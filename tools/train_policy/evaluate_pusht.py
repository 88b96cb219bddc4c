"""Success on the table of gym-pusht: the expert, LeRobot on torch, and flashrt, the same weights.

    python tools/train_policy/evaluate_pusht.py [POLICY] [--episodes 100] [--torch] [--json FILE]

Every row has the same first states, seeds from 1,000,000 on, which training never drew. LeRobot and
flashrt are given the same noise; flashrt's loop draws its own, on the device, as it does where it
is used. `--torch` needs lerobot 0.4 with its `smolvla` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from push_expert import act

import flashrt
from flashrt.robot import PolicyAgent, Rollout
from flashrt.weights.bundled_policies import policy_path
from flashrt.worlds import pusht
from flashrt.worlds.pusht import FPS, Array, PushT

FIRST_SEED = 1_000_000
FUTURES = 4
EVERY = 4  # ticks between decisions of the look-ahead
NOISE = 32  # columns: max_action_dim
Predict = Callable[[dict[str, Any], Any], Any]  # observation, noise -> chunk [rows, 2]
Episode = Callable[[int], tuple[bool, int]]  # seed -> is the T there, ticks


@dataclass(frozen=True, slots=True)
class Row:
    """What became of some episodes."""

    who: str
    episodes: int
    success: float
    ticks: float  # until the T was there, mean of the episodes where it was
    ticks_error: float  # standard error of that
    seconds: float  # of an episode, mean


def measure(who: str, episode: Episode, seeds: Sequence[int]) -> Row:
    """One row."""
    began = time.perf_counter()
    ends = [episode(seed) for seed in seeds]
    spent = time.perf_counter() - began
    ticks = np.array([n for is_there, n in ends if is_there] or [pusht.TICKS], float)
    error = float(ticks.std() / np.sqrt(len(ticks)))
    success = sum(is_there for is_there, _ in ends) / len(ends)
    row = Row(who, len(ends), success, float(ticks.mean()), error, spent / len(ends))
    print(
        f"{who:30} {success:6.1%} {row.ticks:6.1f} ± {error:.1f} ticks {row.seconds:6.2f} s",
        flush=True,
    )
    return row


def in_world(seed: int, action: Callable[[dict[str, Any], Array], Any]) -> tuple[bool, int]:
    """An episode in which `action` decides, of what is seen and of the state."""
    world = PushT()
    observation, info = world.reset(seed=seed)
    for tick in range(pusht.TICKS):
        observation, _, _, _, info = world.step(action(observation, world.get_state()))
        if info["is_success"]:
            return True, tick + 1
    return False, pusht.TICKS


def by_expert(seed: int) -> tuple[bool, int]:
    """The script, which sees the state."""
    return in_world(seed, lambda _, state: act(state))


def by_chunks(predict: Predict, rows: int, steps: int) -> Episode:
    """Chunks from given noise [rows, 32], the same for whoever predicts; `steps` of each executed:
    what LeRobot's queue does.
    """

    def episode(seed: int) -> tuple[bool, int]:
        rng = np.random.default_rng(seed)
        held: list[Array] = []

        def action(observation: dict[str, Any], _: Array) -> Any:
            if not held:
                noise = rng.standard_normal((rows, NOISE)).astype(np.float32)
                held.extend(predict(observation, noise)[:steps])
            return held.pop(0)

        return in_world(seed, action)

    return episode


def torch_predicts(folder: Path) -> Predict:
    """LeRobot's policy and its processors, in float32."""
    import torch
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    os.chdir(folder)  # the name of its VLM is a folder in there
    policy = SmolVLAPolicy.from_pretrained(".").float().eval()
    before, after = make_pre_post_processors(policy.config, ".")

    def predict(observation: dict[str, Any], noise: Any) -> Any:
        image = torch.from_numpy(observation["observation.image"])
        batch = {
            "observation.image": image.permute(2, 0, 1).float() / 255,
            "observation.state": torch.from_numpy(observation["observation.state"]),
            "task": observation["task"],
        }
        chunk = policy.predict_action_chunk(before(batch), noise=torch.from_numpy(noise)[None])
        return after(chunk)[0].numpy()

    return predict


def flashrt_predicts(engine: Any) -> Predict:
    """flashrt behind LeRobot's interface."""
    agent = PolicyAgent(flashrt.ControlLoop(engine, FPS, overlap=0))
    return lambda observation, noise: agent.predict_action_chunk(observation, noise=noise)


def by_loop(engine: Any, overlap: int) -> Episode:
    """flashrt's loop, with its own noise."""
    rollout = Rollout(PushT, flashrt.ControlLoop(engine, FPS, overlap=overlap))

    def episode(seed: int) -> tuple[bool, int]:
        rollout.reset(seed)
        tick = 0
        while not rollout.is_over:
            info = rollout.step().info
            tick += 1
        return bool(info["is_success"]), tick

    return episode


def by_forks(engine: Any) -> Episode:
    """flashrt's loop; every EVERY ticks the best of FUTURES goes on, by the world's own score."""

    def build() -> Rollout:
        return Rollout(PushT, flashrt.ControlLoop(engine, FPS, overlap=0))

    robot, future = build(), build()

    def episode(seed: int) -> tuple[bool, int]:
        robot.reset(seed)
        future.reset(seed)
        tick = 0
        while not robot.is_over:
            if tick % EVERY == 0:
                moment = robot.snapshot()
                seeds = [robot.loop.seed, *range(1000 * tick + 1, 1000 * tick + FUTURES)]
                scores = []
                for noise in seeds:
                    future.restore(moment)
                    future.loop.set_seed(noise)
                    total = 0.0
                    while not future.is_over:
                        total += future.step().reward
                    scores.append(total)
                moment.drop()
                robot.loop.set_seed(seeds[int(np.argmax(scores))])
            info = robot.step().info
            tick += 1
        return bool(info["is_success"]), tick

    return episode


def difference(one: Predict, other: Predict, rows: int) -> float:
    """The largest of the chunks of 20 first states, px."""
    worst = 0.0
    for seed in range(FIRST_SEED, FIRST_SEED + 20):
        observation, _ = PushT().reset(seed=seed)
        noise = np.random.default_rng(seed).standard_normal((rows, NOISE)).astype(np.float32)
        gap = np.abs(one(observation, noise) - other(observation, noise)).max()
        worst = max(worst, float(gap))
    return worst


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("policy", nargs="?", default="pusht")
    parser.add_argument("--device", default="cpu", choices=("cpu", "simt", "cuda"))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--torch", action="store_true", help="LeRobot too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + options.episodes)
    folder, out = policy_path(options.policy).absolute(), options.json and options.json.absolute()
    engine = flashrt.load_policy(folder, device=options.device, lanes=3, pool_bytes=64 << 20)
    chunk, steps = engine.config.chunk_size, engine.config.n_action_steps
    rows = [measure("expert, sees the state", by_expert, seeds)]
    ours = flashrt_predicts(engine)
    if options.torch:
        theirs = torch_predicts(folder)
        rows.append(measure("LeRobot on torch", by_chunks(theirs, chunk, steps), seeds))
        print(f"largest difference of a chunk: {difference(theirs, ours, chunk):.2e} px")
    rows.append(measure("flashrt, the same noise", by_chunks(ours, chunk, steps), seeds))
    rows.append(measure("flashrt's loop", by_loop(engine, 0), seeds))
    rows.append(measure("flashrt's loop, overlap 1", by_loop(engine, 1), seeds))
    few = seeds[: max(1, options.episodes // 4)]
    rows.append(measure(f"best of {FUTURES} forks", by_forks(engine), few))
    if out:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
