"""Rollouts for a trainer: groups of samples from one trunk each, with logprobs and advantages.

The policy tells tales; the environment has hidden coins in places, and pays for each place that a
tale goes to. As GRPO has it, a prompt is sampled in a group, and a sample's advantage is its return
against its group's. The prompt of a group is prefilled once; its capsule goes to each worker once.
One worker is killed on the way: no sample is lost, and none is another. A group that is sampled
again has the same digests: what a trainer saw can be shown to be what the policy did.

    python examples/rl_rollouts.py [CHECKPOINT]
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time

import numpy as np

import flashrt
from flashrt.fleet import Branch, Fleet, Rollout
from flashrt.session.chat import open_chat
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.names import HEROES, PLACES

GROUP, LONGEST, TEMPERATURE = 16, 48, 1.0
COINS = dict(zip(PLACES, random.Random(0).sample(range(len(PLACES)), len(PLACES)), strict=True))


def reward(text: str) -> int:
    """What the environment pays for a tale."""
    return sum(COINS[word] for word in set(text.split()) if word in COINS)


def batch_of(prompts: list[list[int]], groups: list[list[Rollout]], decode) -> dict:
    """Arrays for a trainer, a row per sample: tokens right-padded with 0, and which of them are the
    policy's; what it thought of them at temperature 1; advantages within the group.
    """
    rows = [(prompt, r) for prompt, group in zip(prompts, groups, strict=True) for r in group]
    longest = max(len(prompt) + len(r.tokens) for prompt, r in rows)
    batch = {
        "tokens": np.zeros((len(rows), longest), np.int32),
        "is_sampled": np.zeros((len(rows), longest), bool),
        "logprobs": np.zeros((len(rows), longest), np.float32),
        "digest": np.array([r.digest for _, r in rows]),
    }
    for i, (prompt, r) in enumerate(rows):
        first, stop = len(prompt), len(prompt) + len(r.tokens)
        batch["tokens"][i, :stop] = [*prompt, *r.tokens]
        batch["is_sampled"][i, first:stop] = True
        batch["logprobs"][i, first:stop] = r.logprobs
    returns = np.array([[reward(decode(r.tokens.tolist())) for r in g] for g in groups], float)
    centered = returns - returns.mean(axis=1, keepdims=True)
    batch["returns"] = returns.ravel()
    batch["advantages"] = (centered / (returns.std(axis=1, keepdims=True) + 1e-6)).ravel()
    return batch


async def sampled(fleet: Fleet, prompts: list[list[int]], stop: tuple, kills: bool) -> list:
    """A group of samples for each prompt; all groups are under way at the same time."""
    trunks = [await fleet.trunk(prompt) for prompt in prompts]
    seeds = [(trunk, GROUP * i + j) for i, trunk in enumerate(trunks) for j in range(GROUP)]
    branches = [
        Branch(seed=seed, start=trunk, stop=stop, max_tokens=LONGEST, temperature=TEMPERATURE)
        for trunk, seed in seeds
    ]
    found = []
    async for rollout in fleet.rollouts(trunks[0], branches, ordered=True, logprobs=True):
        found.append(rollout)
        if kills and len(found) == GROUP:
            os.kill(fleet.stats().workers[0].state.pid, signal.SIGKILL)
    return [found[i : i + GROUP] for i in range(0, len(found), GROUP)]


def main() -> None:
    """A batch for a trainer; the same batch again; one of its samples by one engine."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, "cpu", max_positions=512)
    prompts = []
    for hero in HEROES:
        with open_chat(engine) as chat:
            chat.add("user", f"tell me a story about a {hero} .")
            prompts.append(list(chat.tokens(is_asked=True)))
    stop = tuple(engine.checkpoint.stop_tokens)
    with Fleet(checkpoint, workers=2, device="cpu", max_positions=512) as fleet:
        began = time.perf_counter()
        groups = asyncio.run(sampled(fleet, prompts, stop, kills=False))
        seconds = time.perf_counter() - began
        again = asyncio.run(sampled(fleet, prompts, stop, kills=True))
        moved = sum(sum(m.values()) for w in fleet.stats().workers for m in w.moved)
    batch = batch_of(prompts, groups, engine.tokenizer.decode)
    same = batch_of(prompts, again, engine.tokenizer.decode)
    assert all(np.array_equal(batch[name], same[name]) for name in batch), "to the bit"
    n_tokens, n = int(batch["is_sampled"].sum()), len(batch["returns"])
    print(f"{n} samples of {len(prompts)} prompts, {n_tokens:,} tokens in {seconds:.1f} s")
    print(f"return {batch['returns'].mean():.1f} on average, {batch['returns'].max():.0f} at best")
    print({name: (array.shape, str(array.dtype)) for name, array in batch.items()})
    print(f"sampled again, one worker killed: the same {n} digests; {moved / 1e6:.1f} MB moved")

    best = int(batch["advantages"].argmax())  # once more, by one engine from nothing
    with engine.session() as cold:
        cold.prefill(prompts[best // GROUP])
        list(cold.generate(LONGEST, TEMPERATURE, seed=best, stop=stop))
        assert cold.digest() == batch["digest"][best], "a rollout is the policy's, to the bit"


if __name__ == "__main__":
    main()
