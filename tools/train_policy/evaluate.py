"""Closed-loop figures of a trained policy, by flashrt itself, on episodes nobody trained on.

    python tools/train_policy/evaluate.py CHECKPOINT [--episodes 100] [--write]

The expert, the policy, the policy without its memory, and the policy with look-ahead by forks, each
from the same first states. `--write` puts the table into the checkpoint's README.md, its card.
Needs gymnasium, not torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from card import write_card
from tasks import TASKS, Array, expert_returns, state_of

import flashrt
from flashrt.engine.actions import ActionEngine
from flashrt.robot import ControlLoop, Moment, Rollout
from flashrt.worlds.robots import make

FIRST_SEED = 1_000_000  # training draws its states from other generators
FUTURES = 8  # of a look-ahead
LOOK_AT = {"two_doors": (0,), "pendulum": (0,), "mountain_car": (0,)}  # ticks
LOOK_AHEAD = {"two_doors": 75, "pendulum": 40, "mountain_car": 120}  # ticks


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of the table."""

    what: str
    returns: Array  # [episodes]
    solved: float  # share of them

    def __str__(self) -> str:
        mean = self.returns.mean()
        error = self.returns.std() / np.sqrt(len(self.returns))
        return f"{self.what:44} return {mean:8.2f} +- {error:5.2f}   solved {self.solved:6.1%}"


class Episodes:
    """Episodes of one policy in one environment; keeps the loops between them."""

    def __init__(self, engine: ActionEngine, overlap: int, count: int, **options: object) -> None:
        self._engine, self._count = engine, count
        self._name = str(engine.config.card["environment"])
        self._task = TASKS[self._name]

        def build() -> Rollout:
            loop = ControlLoop(engine, engine.config.fps, overlap=overlap)
            return Rollout(lambda: make(self._name, **options), loop)

        self.main = build()
        self._futures = [build() for _ in range(len(engine.lanes) - 1)]

    def close(self) -> None:
        """Give the lanes back."""
        for rollout in (self.main, *self._futures):
            rollout.close()

    def measure(self, what: str, before_tick: Callable[[int], None] | None = None) -> Figure:
        """All episodes; `before_tick` may change `main` before each of their ticks."""
        returns, solved = [], []
        for seed in range(FIRST_SEED, FIRST_SEED + self._count):
            self.main.reset(seed)
            total, tick = 0.0, 0
            while not self.main.is_over:
                if before_tick is not None:
                    before_tick(tick)
                total += self.main.step().reward
                tick += 1
            returns.append(total)
            solved.append(self._is_solved())
        return Figure(what, np.array(returns), float(np.mean(solved)))

    def expert(self) -> Figure:
        """The expert from the same first states."""
        start = []
        for seed in range(FIRST_SEED, FIRST_SEED + self._count):
            self.main.reset(seed)
            start.append(state_of(self._task, self.main.environment))
        ticks = self._task.shape.episode_ticks
        returns, solved = expert_returns(self._task, np.concatenate(start), ticks)
        return Figure("expert, sees everything", returns, float(solved.mean()))

    def forget(self) -> None:
        """Restore all of the control state except the recurrent memory."""
        capsule = self.main.loop.snapshot()
        self.main.loop.restore(capsule)
        lane = self.main.loop.lane
        memory = self._engine.lane_array(lane, "memory")
        self._engine.set_lane_array(lane, "memory", np.zeros_like(memory))
        capsule.drop()

    def look_ahead(self, tick: int) -> None:
        """Try FUTURES noises for a while, each in a fork of environment and policy; go on
        with the best. The present noise is one of them.
        """
        if tick not in LOOK_AT[self._name]:
            return
        moment = self.main.snapshot()
        seeds = [self.main.loop.seed, *range(tick + 1, tick + FUTURES)]
        values = [
            self._value(future, moment, seed)
            for future, seed in zip(self._futures, seeds, strict=True)
        ]
        self.main.loop.set_seed(seeds[int(np.argmax(values))])
        moment.drop()

    def _value(self, future: Rollout, moment: Moment, seed: int) -> float:
        future.restore(moment)
        future.loop.set_seed(seed)
        total = 0.0
        for _ in range(LOOK_AHEAD[self._name]):
            if future.is_over:
                break
            total += future.step().reward
        return total

    def _is_solved(self) -> bool:
        state = state_of(self._task, self.main.environment)
        if self._name == "mountain_car":
            return bool(state[0, 0] >= 0.45)
        return bool(self._task.is_success(state)[0])


def figures(checkpoint: Path, count: int, device: str) -> list[Figure]:
    """All rows, printed as they come."""
    rows: list[Figure] = []

    def add(figure: Figure) -> None:
        rows.append(figure)
        print(figure, flush=True)

    engine = flashrt.load_policy(checkpoint, device=device, lanes=1 + FUTURES)
    name = str(engine.config.card["environment"])
    forget_at = TASKS[name].shape.forget_at
    episodes = Episodes(engine, 1, count)
    add(episodes.expert())
    add(episodes.measure("policy, plans while it acts (overlap 1)"))
    add(episodes.measure("memory lost at every tick", lambda tick: episodes.forget()))
    add(
        episodes.measure(
            f"memory lost once, before tick {forget_at}",
            lambda tick: episodes.forget() if tick == forget_at else None,
        )
    )
    add(episodes.measure(f"look-ahead, {FUTURES} forks", episodes.look_ahead))
    episodes.close()
    episodes = Episodes(engine, 0, count)
    add(episodes.measure("policy, plans within the tick (overlap 0)"))
    episodes.close()
    if name == "two_doors":
        episodes = Episodes(engine, 1, count, jammed=True)
        add(episodes.measure("one door jammed, unseen"))
        add(episodes.measure(f"one door jammed, look-ahead, {FUTURES} forks", episodes.look_ahead))
        episodes.close()
    engine.close()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="write the checkpoint's README.md")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    rows = figures(options.checkpoint, options.episodes, options.device)
    print(f"{time.monotonic() - began:.0f} s")
    if options.write:
        write_card(options.checkpoint, [(r.what, r.returns, r.solved) for r in rows])


if __name__ == "__main__":
    main()
