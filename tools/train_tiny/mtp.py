"""Train the draft head on the frozen trunk, teacher-forced over several chained drafts.

    torchrun --nproc-per-node 2 mtp.py run/final.pt --out run/drafted.pt --steps 600

IS: the head run exactly as decoding runs it, for every position at once. IS NOT: training of the
trunk. Draft d of position i knows the tokens up to i + d; its target is the trunk's own greedy
token i + d + 1, so that the loss is about agreement, which is what a draft is for.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed
from lessons import LONGEST, SHORTEST, TASKS, Encoder, Rows, batch
from model import Attention, Model, load
from parallel import share_gradients
from torch import Tensor, nn
from torch.nn import functional

LENGTHS = (64, 128, 256, 512, 1024)
WARM_UP_STEPS, DECAY_SHARE, LAST_RATE = 30, 0.5, 0.03
Entries = tuple[Tensor, Tensor]  # keys, values [B, heads, T, size]


def attend(
    attention: Attention, x: Tensor, depth: int, trunk: Entries | None, chain: list[Entries]
) -> tuple[Tensor, Entries]:
    """Position i attends to the head's entries of true states 0..i, to its own chain, to itself.

    x [B, T, H] at rotary positions depth - 1, depth, ...; `trunk` is None at depth 1, where the
    own entries are those of true states. -> output [B, T, H], own entries.
    """
    length = x.shape[1]
    q, k, v, gate = attention.project(x, depth - 1)
    own, scale = (k, v), attention.size**-0.5
    keys, values = own if trunk is None else (t[:, :, :length] for t in trunk)
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    scores = [(q @ keys.transpose(-1, -2) * scale).masked_fill(later, float("-inf"))]
    alone = (
        [] if trunk is None else [(k[:, :, :length], v[:, :, :length]) for k, v in chain] + [own]
    )
    scores += [(q * k).sum(-1, keepdim=True) * scale for k, _ in alone]
    shares = torch.cat(scores, -1).softmax(-1)
    o = shares[..., :length] @ values
    for i, (_, v) in enumerate(alone):
        o = o + shares[..., length + i, None] * v
    return attention.o_proj(o.transpose(1, 2).flatten(2) * gate), own


def drafts(model: Model, hidden: Tensor, ids: Tensor, depth: int) -> Iterator[Tensor]:
    """hidden [B, T, H] of the trunk -> for d = 1 .. depth, [B, T - d, H]: entry i predicts token
    i + d + 1.
    """
    head, layer = model.mtp, model.mtp.layers[0]
    trunk: Entries | None = None
    chain: list[Entries] = []
    for d in range(1, depth + 1):
        length = ids.shape[1] - d
        known = head.pre_fc_norm_embedding(model.model.embed_tokens(ids[:, d:]))
        before = head.pre_fc_norm_hidden(hidden[:, :length])
        x = head.fc(torch.cat([known, before], -1))
        mixed, own = attend(layer.self_attn, layer.input_layernorm(x), d, trunk, chain)
        if trunk is None:
            trunk = own
        else:
            chain.append(own)
        x = x + mixed
        hidden = head.norm(x + layer.mlp(layer.post_attention_layernorm(x)))
        yield hidden


def terms(
    model: Model, ids: Tensor, weights: Tensor, depth: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per draft: logits, and the trunk's greedy tokens, at what the assistant writes."""
    with torch.no_grad():
        hidden = model(ids)
        greedy = model.logits(hidden).argmax(-1)  # greedy[i]: the trunk's token i + 1
    for d, guess in enumerate(drafts(model, hidden, ids, depth), 1):
        kept = weights[:, d + 1 :] > 0
        yield model.logits(guess[:, :-1][kept]), greedy[:, d:-1][kept]


def rows_of(encoder: Encoder, dice: random.Random, tokens: int) -> Rows:
    """A batch of any task at any length."""
    task = dice.choice(TASKS)
    low, high = SHORTEST.get(task, 0), LONGEST.get(task, LENGTHS[-1])
    length = dice.choice([n for n in LENGTHS if low <= n <= high])
    return batch(encoder, dice, task, max(1, tokens // length), length)


def train(model: Model, options: argparse.Namespace, rank: int, world: int) -> None:
    """Change the draft head; print how many drafts agree, by depth."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = [p.requires_grad_(True) for p in model.mtp.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0)
    encoder, depth, began, tokens = Encoder(), options.depth, time.time(), 0
    agreed = torch.zeros(depth)
    for step in range(options.steps):
        dice = random.Random(f"draft {options.seed} {rank} {step}")
        left = (1 - step / options.steps) / DECAY_SHARE
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / WARM_UP_STEPS, max(LAST_RATE, left))
        counts = torch.zeros(2 * depth + 1)  # agreed and all by depth; tokens
        for _ in range(options.batches):
            rows = rows_of(encoder, dice, options.tokens).to(options.device)
            loss = torch.zeros((), device=options.device)
            for d, (logits, greedy) in enumerate(terms(model, rows.ids, rows.weights, depth)):
                if len(greedy):
                    loss = loss + functional.cross_entropy(logits, greedy)
                    counts[2 * d] += (logits.argmax(-1) == greedy).sum().item()
                    counts[2 * d + 1] += len(greedy)
            if loss.requires_grad:
                (loss / options.batches).backward()
            counts[-1] += rows.ids.numel()
        if world > 1:
            share_gradients(parameters, counts, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int(counts[-1])
        agreed.lerp_(counts[:-1:2] / counts[1:-1:2].clamp_min(1), 0.05 if step else 1.0)
        if rank == 0 and (step + 1) % 20 == 0:
            shares = " ".join(f"{share:.3f}" for share in agreed)
            spent = time.time() - began
            print(f"{spent:5.0f}s {step + 1:5d} {tokens / 1e6:5.2f}M agreed {shares}", flush=True)


def main() -> None:
    """Train, write the checkpoint with its new head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batches", type=int, default=3, help="per process and step")
    parser.add_argument("--tokens", type=int, default=1024, help="per batch")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--depth", type=int, default=3, help="drafts in a chain")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.distributed.init_process_group("gloo" if options.device == "cpu" else "nccl")
    torch.set_num_threads(options.threads)
    model = load(options.checkpoint).to(options.device)
    train(model, options, rank, world)
    if rank == 0:
        held = torch.load(options.checkpoint, map_location="cpu", weights_only=False)
        torch.save(held | {"model": model.state_dict()}, options.out)


if __name__ == "__main__":
    main()
