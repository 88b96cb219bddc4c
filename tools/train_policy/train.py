"""Train a bundled policy: behaviour cloning with DAgger rounds, then write the checkpoint.

    python tools/train_policy/train.py two_doors [--run runs/two_doors] [--out FOLDER]

Needs the `train` extra (torch, gymnasium). One thread and minutes of CPU; each step draws its batch
and noise from (seed, step) alone, so an interrupted run goes on from its last saved state to the
same weights. Episodes of the DAgger rounds (Ross et al. 2011) are kept in the run folder.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demonstrations import Demonstrations, demonstrate, denormalise, labels
from export import export
from network import Policy, Rollout
from tasks import TASKS, Task, check, expert_returns

EPISODES = 400  # by the disturbed expert, before the first step
ROUND_EPISODES = 100  # by the policy, labelled by the expert
ROUNDS = 6  # evenly over the first three quarters of the run
BATCH = 32  # episodes
TICKS_PER_SEGMENT = 0.32  # share of the ticks whose chunk is trained on
LEARNING_RATE = 2e-3
WARM_UP = 100  # steps
AVERAGE = 0.998  # of the weights: what acts and what is exported is their moving average
GRADIENT_NORM = 1.0
SAVE_EVERY = 250  # steps
REPORT_EVERY = 50
JUDGED_EPISODES = 128


@dataclass(slots=True)
class Run:
    """State of a training run; `save` and `resume` are all that an interruption needs."""

    task: Task
    folder: Path
    seed: int
    policy: Policy
    average: Policy
    optimiser: torch.optim.Optimizer
    step: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0

    def save(self) -> None:
        """Replace the run's state file in one move."""
        state = {
            "policy": self.policy.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "cpu_s": self.cpu_s,
        }
        torch.save(state, self.folder / "state.new")
        (self.folder / "state.new").replace(self.folder / "state.pt")

    def resume(self) -> None:
        """Go on from the state file, if there is one."""
        if not (path := self.folder / "state.pt").exists():
            return
        state = torch.load(path, weights_only=True)
        self.policy.load_state_dict(state["policy"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        self.cpu_s = state["cpu_s"]
        print(f"resumed at step {self.step}")


def start(task: Task, folder: Path, seed: int, steps: int) -> Run:
    """A new run, or the one that `folder` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    policy = Policy(task.shape)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    run = Run(task, folder, seed, policy, copy.deepcopy(policy), optimiser)
    run.resume()
    return run


def round_steps(steps: int) -> list[int]:
    """Steps before which the policy's own episodes are added."""
    return [round(steps * 0.75 * (i + 1) / ROUNDS) for i in range(ROUNDS)]


def episodes(run: Run, number: int) -> Demonstrations:
    """Episodes of a round: the expert's for 0, else the policy's; drawn once, then read."""
    path = run.folder / f"round-{number}.npz"
    if path.exists():
        return Demonstrations.load(path)
    rng = np.random.default_rng([run.seed, 1, number])
    if number == 0:
        drawn = demonstrate(run.task, rng, EPISODES, None)
    else:
        overlap = (0, 1, 2)[number % 3]
        acting = Rollout(run.average, ROUND_EPISODES, run.seed + number, overlap)
        drawn = demonstrate(run.task, rng, ROUND_EPISODES, acting)
    drawn.save(path)
    return drawn


def train_step(run: Run, data: Demonstrations, steps: int) -> tuple[float, float]:
    """One batch of episodes, segment by segment; the memory is carried, its gradient is cut."""
    shape, policy = run.task.shape, run.policy
    rng = np.random.default_rng([run.seed, 2, run.step])
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + run.step)
    rows = rng.integers(len(data.observation), size=BATCH)
    observation, executed, chunk, hidden = (
        a[rows] for a in (data.observation, data.executed, data.chunk, data.privileged)
    )
    previous = np.concatenate((np.zeros_like(executed[:, :1]), executed[:, :-1]), axis=1)
    e = policy.encode(torch.from_numpy(observation), torch.from_numpy(previous))
    memory = torch.zeros(1, BATCH, shape.width)
    n_segments = math.ceil(shape.ticks / shape.backprop_ticks)
    losses = []
    for begin in range(0, shape.ticks, shape.backprop_ticks):
        end = min(begin + shape.backprop_ticks, shape.ticks)
        h, memory = policy.memory(e[:, begin:end], memory.detach())
        tick = rng.integers(begin, end, (BATCH, round((end - begin) * TICKS_PER_SEGMENT)))
        committed = rng.integers(0, shape.chunk_size - shape.n_action_steps + 1, tick.shape)
        committed[:, ::2] = 0
        target = labels(executed, chunk, tick, committed)
        row = np.arange(BATCH)[:, None]
        losses.append(
            policy.loss(
                e[row, tick].flatten(0, 1), h[row, tick - begin].flatten(0, 1),
                torch.from_numpy(target).flatten(0, 1), torch.from_numpy(committed).flatten(),
                torch.from_numpy(hidden[row, tick]).flatten(0, 1), generator,
            )
        )  # fmt: skip
    rate = min(1.0, (run.step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * run.step / steps))
    for group in run.optimiser.param_groups:
        group["lr"] = LEARNING_RATE * rate
    run.optimiser.zero_grad()
    (sum(loss.total for loss in losses) / n_segments).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), GRADIENT_NORM)
    run.optimiser.step()
    keep = min(AVERAGE, (1 + run.step) / (10 + run.step))
    with torch.no_grad():
        for mean, new in zip(run.average.parameters(), policy.parameters(), strict=True):
            mean.lerp_(new, 1 - keep)
    flow = sum(loss.flow.item() for loss in losses) / n_segments
    return flow, sum(loss.privileged.item() for loss in losses) / n_segments


def judge(run: Run) -> str:
    """The averaged policy against the expert on undisturbed episodes, by torch: to steer by."""
    task, seed = run.task, 777
    start = task.initial(np.random.default_rng(seed), JUDGED_EPISODES)
    truth, solved = expert_returns(task, start, task.shape.ticks)
    line = [f"expert {truth.mean():.1f} ({solved.mean():.0%})"]
    for name, overlap, forget_at in (
        ("policy", 0, None),
        ("overlap 2", 2, None),
        ("forgot", 0, task.shape.forget_at),
    ):
        acting = Rollout(run.average, JUDGED_EPISODES, seed, overlap, forget_at)
        state, total = start, np.zeros(JUDGED_EPISODES)
        for _ in range(task.shape.ticks):
            action = denormalise(task, acting(task.observe(state)).astype(np.float64))
            after = task.advance(state, action)
            total += task.reward(state, action, after)
            state = after
        line.append(f"{name} {total.mean():.1f} ({task.is_success(state).mean():.0%})")
    return ", ".join(line)


def train(run: Run, steps: int, until: int) -> None:
    """Up to `until` of `steps`, with the policy's own episodes added at each of `round_steps`."""
    boundaries = round_steps(steps)
    data = episodes(run, 0)
    run.policy.mean.copy_(torch.from_numpy(data.observation.mean((0, 1))))
    run.policy.std.copy_(torch.from_numpy(data.observation.std((0, 1))).clamp(min=1e-2))
    run.average.mean.copy_(run.policy.mean)
    run.average.std.copy_(run.policy.std)
    for number, boundary in enumerate(boundaries, start=1):
        if boundary < run.step:
            data = data + episodes(run, number)
    began, began_cpu = time.monotonic() - run.elapsed_s, time.process_time() - run.cpu_s
    while run.step < until:
        if run.step in boundaries:
            print(f"  {judge(run)}", flush=True)
            data = data + episodes(run, boundaries.index(run.step) + 1)
        flow, privileged = train_step(run, data, steps)
        run.step += 1
        run.elapsed_s, run.cpu_s = time.monotonic() - began, time.process_time() - began_cpu
        if run.step % REPORT_EVERY == 0:
            left_s = run.elapsed_s / run.step * (until - run.step)
            print(
                f"{run.task.shape.name} {run.step}/{steps} flow {flow:.4f} "
                f"privileged {privileged:.4f} {run.elapsed_s:.0f} s, {left_s:.0f} s left",
                flush=True,
            )
        if run.step % SAVE_EVERY == 0 or run.step == until:
            run.save()
    print(f"  {judge(run)}")


def main() -> None:
    """Train, judge, export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--run", type=Path, help="state of the run (default: runs/<task>)")
    parser.add_argument("--out", type=Path, help="checkpoint folder (default: RUN/checkpoint)")
    parser.add_argument("--steps", type=int, help="of the optimiser (default: the task's)")
    parser.add_argument("--until", type=int, help="stop at this step; the next run goes on")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[options.task]
    check(task)
    steps = options.steps or task.shape.steps
    folder = options.run or Path("runs") / options.task
    run = start(task, folder, options.seed, steps)
    train(run, steps, min(options.until or steps, steps))
    out = options.out or folder / "checkpoint"
    cpu_minutes = run.cpu_s / 60
    made = {"steps": steps, "until": run.step, "seed": options.seed, "cpu_minutes": cpu_minutes}
    export(run.average, out, made)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
