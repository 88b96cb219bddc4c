"""Train the trunk: a stable phase by steps, then a cool-down from any of its checkpoints.

    torchrun --nproc-per-node 2 train.py --out run --steps 3000     goes on from run/last.pt
    torchrun --nproc-per-node 2 train.py --out run --decay 1000     cools down, to run/final.pt

IS: loss, optimizers, schedule, checkpoints. IS NOT: the draft head (mtp).

A step averages several batches per process, each of one task. What is drawn depends on seed,
process and step alone: equal runs are equal, whether resumed or not.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed
from curriculum import Curriculum
from lessons import HARD, TASKS, Encoder, Rows, batch
from model import Model, config
from muon import Muon
from parallel import share_gradients
from progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from flashrt.worlds.names import COLORS

MIX = "recall:4,updates:1.5,moves:2.5,building:1.5,robot:0.7,mixed:1.2,story:0.4"
WARM_UP_STEPS = 60
TOPIC_WEIGHT = 0.2
COOLING = "cooling.pt"  # a cool-down under way
LAST_RATE = 0.03  # of the learning rate, at the end of the cool-down


def losses(model: Model, rows: Rows, position_weight: float) -> tuple[Tensor, Tensor]:
    """-> loss; counts: right and all answer words, the same in rows whose states were wiped."""
    early: list[Tensor] = []
    hidden = model(rows.ids, rows.resets if rows.resets.any() else None, early)
    kept = rows.weights[:, 1:] > 0
    targets, weights = rows.ids[:, 1:][kept], rows.weights[:, 1:][kept]
    logits = model.logits(hidden[:, :-1][kept])
    each = functional.cross_entropy(logits, targets, reduction="none")
    loss = (each * weights).sum() / weights.sum().clamp_min(1e-6)
    hard = weights == HARD if rows.task != "story" else weights > 0
    agreed = logits.detach().argmax(-1) == targets
    wiped = rows.resets.any(1, keepdim=True).expand_as(kept)[kept] & hard
    counts = torch.stack([agreed[hard].sum(), hard.sum(), agreed[wiped].sum(), wiped.sum()])
    named = rows.topics[..., 0] >= 0
    if named.any():  # what is talked about, read before the first attention layer looks it up
        guess, truth = model.topic_head(early[0][named]), rows.topics[named]
        color, noun = guess.split([len(COLORS), guess.shape[-1] - len(COLORS)], -1)
        named_loss = functional.cross_entropy(color, truth[:, 0]) + functional.cross_entropy(
            noun, truth[:, 1]
        )
        loss = loss + TOPIC_WEIGHT * named_loss
    walked = rows.positions[..., 0] >= 0
    if walked.any():  # the true position, read after every move
        column, row = model.position_head(hidden[walked]).chunk(2, -1)
        truth = rows.positions[walked]
        walked_loss = functional.cross_entropy(column, truth[:, 0]) + functional.cross_entropy(
            row, truth[:, 1]
        )
        loss = loss + position_weight * walked_loss
    return loss, counts


@dataclass(slots=True)
class Run:
    """All that a checkpoint holds, and how to take a step."""

    options: argparse.Namespace
    rank: int
    world: int
    model: Model
    optimizers: list[torch.optim.Optimizer]
    parameters: list[Tensor]
    mix: dict[str, float]
    encoder: Encoder = field(default_factory=Encoder)
    curriculum: Curriculum = field(default_factory=Curriculum)
    step: int = 0
    tokens: int = 0
    decay_from: int = 0  # step at which the cool-down began, if it is one
    wiped: float = 0.0  # running share of right words in rows whose states were wiped

    def take_step(self, rate: float) -> None:
        """One step at `rate` times the learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.options.lr * rate
        counts = self._accumulate(random.Random(f"{self.options.seed} {self.rank} {self.step}"))
        if self.world > 1:
            share_gradients(self.parameters, counts, self.world)
        *by_task, wiped_right, wiped_all, tokens = counts.tolist()
        for i, task in enumerate(TASKS):
            if by_task[2 * i + 1]:
                self.curriculum.note(task, by_task[2 * i], by_task[2 * i + 1])
        if wiped_all:
            self.wiped += min(0.5, wiped_all / 500) * (wiped_right / wiped_all - self.wiped)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int(tokens)

    def _accumulate(self, dice: random.Random) -> Tensor:
        """Gradients of this process's batches; right and all answer words by task, the same of
        wiped rows, tokens.
        """
        options, counts = self.options, torch.zeros(2 * len(TASKS) + 3)
        for _ in range(options.batches):
            task = dice.choices(list(self.mix), list(self.mix.values()))[0]
            length = self.curriculum.length(dice, task)
            size = max(options.tokens, min(2048, 4 * length))
            rows = batch(self.encoder, dice, task, max(1, size // length), length)
            if options.decisions:
                rows.weights[:, 1:][rows.ids[:, :-1] == self.encoder.opener["assistant"]] = HARD
            loss, counted = losses(self.model, rows.to(options.device), options.position_weight)
            (loss / options.batches).backward()
            if length == self.curriculum.longest(task):
                at = 2 * TASKS.index(task)
                counts[at : at + 2] += counted[:2].cpu()
                counts[-3:-1] += counted[2:].cpu()
            counts[-1] += rows.ids.numel()
        return counts

    def save(self, name: str) -> None:
        """Write a checkpoint, whole or not at all; one process does."""
        if self.rank:
            return
        c = self.curriculum
        held = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "layers": self.options.layers, "step": self.step, "tokens": self.tokens,
            "decay_from": self.decay_from,
            "curriculum": (c.level, c.right, c.seen),
        }  # fmt: skip
        torch.save(held, self.options.out / "new.pt")
        (self.options.out / "new.pt").rename(self.options.out / name)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        held = torch.load(path, map_location=self.options.device, weights_only=False)
        self.model.load_state_dict(held["model"])
        for optimizer, state in zip(self.optimizers, held["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.tokens = held["step"], held["tokens"]
        self.decay_from = held["decay_from"] if path.name == COOLING else self.step
        self.curriculum = Curriculum(*held["curriculum"])


def begin(options: argparse.Namespace) -> Run:
    """Processes, model, optimizers: Muon for the matrices of the layers, AdamW for the rest."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo" if options.device == "cpu" else "nccl")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)  # the same weights everywhere, other documents
    model = Model(config(options.layers)).to(options.device)
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith("mtp.")]
    matrices = [p for n, p in named if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in named if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        Muon(matrices, lr=options.lr),
        torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    shares = (part.split(":") for part in options.mix.split(","))
    mix = {task: float(share) for task, share in shares}
    run = Run(options, rank, world, model, optimizers, [p for _, p in named], mix)
    options.out.mkdir(parents=True, exist_ok=True)
    held = options.out / COOLING
    if not (options.decay and held.exists()):
        held = options.start or options.out / "last.pt"
    if held.exists():
        run.resume(held)
    for part in options.cap.split(",") if options.cap else ():
        task, length = part.split(":")
        run.curriculum.cap(task, int(length))
    return run


def rate_at(step: int, decay_from: int, decay_steps: int) -> float:
    """Share of the learning rate: warm-up, flat; or, cooling down, linear to LAST_RATE."""
    if decay_steps:
        return max(LAST_RATE, 1 - (1 - LAST_RATE) * (step - decay_from) / decay_steps)
    return min(1.0, (step + 1) / WARM_UP_STEPS)


def main() -> None:
    """Run one phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=0, help="last step of the stable phase")
    parser.add_argument("--decay", type=int, default=0, help="cool down for so many steps")
    parser.add_argument("--until", type=int, default=0, help="stop the cool-down at this step")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, else out/last.pt")
    parser.add_argument("--batches", type=int, default=3, help="per process and step")
    parser.add_argument("--tokens", type=int, default=1024, help="per batch, at least")
    parser.add_argument("--lr", type=float, default=0.006)
    parser.add_argument("--mix", default=MIX, help="task:share,...")
    parser.add_argument("--cap", default="", help="task:tokens,... no longer rows than these")
    parser.add_argument("--position-weight", type=float, default=0.5)
    parser.add_argument(
        "--decisions", action="store_true", help="the first word of an answer weighs as much"
    )
    parser.add_argument("--layers", default="LLFLF", help="L delta rule, F full attention")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    options = parser.parse_args()
    run = begin(options)
    end = run.decay_from + options.decay if options.decay else options.steps
    last = options.until or end
    held_as = COOLING if options.decay else "last.pt"
    with Progress(run.rank == 0, run.step, last) as progress:
        began, began_tokens = time.time(), run.tokens
        while run.step < last:
            run.take_step(rate_at(run.step, run.decay_from, options.decay))
            speed = (run.tokens - began_tokens) / (time.time() - began)
            progress.show(run.step, run.tokens, speed, run.wiped, run.curriculum)
            if run.step % options.save_every == 0:
                run.save(held_as)
    run.save("final.pt" if options.decay and run.step >= end else held_as)


if __name__ == "__main__":
    main()
