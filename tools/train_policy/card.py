"""The card of a checkpoint: README.md with what it is, its figures, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ABOUT = {
    "two_doors": """A robot that remembers where to go. It starts below a wall with two doors; the
goal beyond the wall is shown for the first 5 ticks of 75, then hidden. Either door will do, so the
policy has two modes; now and then the goal moved while it was trained, so it follows a new cue.
Environment: `flashrt.worlds.two_doors` (25 Hz; position and cue in, velocity command out).
Solved: within 0.1 m of the goal at the end.""",
    "pendulum": """Swings a pendulum up and balances it without being told its velocity:
gymnasium's Pendulum-v1, of whose observation it sees cos and sin alone. Torque out.
Solved: upright and at rest at the end.""",
    "mountain_car": """Drives a car up a hill that is too steep, without being told its velocity:
gymnasium's MountainCarContinuous-v0, of whose observation it sees the position alone. Force out.
It turned out not to need its recurrent memory: the action before, which is an input and in
the capsule, says which way the car rolls (see the figures). Solved: on the hill in 999 ticks.""",
}
EXPERTS = {
    "two_doors": "heads for a door, then for the goal, and sees the goal throughout",
    "pendulum": "pumps energy, then a linear regulator; sees the velocity",
    "mountain_car": "pushes the way the car rolls; sees the velocity",
}


def write_card(checkpoint: Path, rows: Sequence[tuple[str, NDArray[np.float64], float]]) -> None:
    """`rows`: what was measured, returns of the episodes, share that was solved."""
    config = json.loads((checkpoint / "config.json").read_text())
    name, training = config["environment"], config["training"]
    size = (checkpoint / "model.safetensors").stat().st_size
    lines = [f"# {checkpoint.name}", "", ABOUT[name], "", "## Figures", ""]
    lines += [
        f"Closed loop by flashrt on a CPU, {len(rows[0][1])} episodes with seeds that were not",
        f"trained on. The expert {EXPERTS[name]}.",
        "",
        "| | return, mean ± standard error | solved |",
        "|---|---:|---:|",
    ]
    for what, returns, solved in rows:
        error = returns.std() / np.sqrt(len(returns))
        lines.append(f"| {what} | {returns.mean():.2f} ± {error:.2f} | {solved:.1%} |")
    out = f"flashrt/weights/bundled/{checkpoint.name}"
    lines += [
        "",
        "## Make it again",
        "",
        "```sh",
        "pip install -e '.[train]'",
        f"python tools/train_policy/train.py {name} --until {training['until']:.0f} --out {out}",
        f"python tools/train_policy/evaluate.py {out} --write",
        "```",
        "",
        f"{training['until']:.0f} steps with seed {training['seed']:.0f}: "
        f"{training['cpu_minutes']:.1f} minutes of CPU time on one thread. Behaviour cloning",
        "of chunks from a scripted expert that is shown noise (DART) and the policy's own mistakes",
        "(DAgger); flow matching with a random committed prefix.",
        "",
        "## What is in it",
        "",
        f"`config.json` and `model.safetensors`: {size / 1e6:.2f} MB, float32. Encoder and GRU of",
        f"{config['memory_dim']}, a flow head of {config['head_blocks']} blocks of "
        f"{config['head_dim']}, which plans {config['chunk_size']} actions in "
        f"{config['num_inference_steps']} Euler steps; {config['n_action_steps']} are",
        f"executed. {config['fps']:.0f} ticks per second. Licence: Apache-2.0, as flashrt's.",
    ]
    (checkpoint / "README.md").write_text("\n".join(lines) + "\n")
