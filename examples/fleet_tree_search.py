"""Beam search over a fleet: nodes are capsules, and branches run where their capsule lies.

The model tells a tale; the environment has hidden coins in places, and pays for each place that the
tale goes to. A node is the end of a sentence. The best nodes of a level are branched from: on the
worker that has the capsule while it has a lane, else the capsule travels, without the rows that the
other worker has already. The best tale is told once more by one engine: the same bits.

    python examples/fleet_tree_search.py [CHECKPOINT]
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from dataclasses import dataclass

import flashrt
from flashrt.fleet import Branch, Fleet, Rollout
from flashrt.session.chat import open_chat
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.names import PLACES

SENTENCES, WIDTH, BRANCHED, LONGEST = 6, 4, 32, 24
COINS = dict(zip(PLACES, random.Random(0).sample(range(len(PLACES)), len(PLACES)), strict=True))


@dataclass
class Node:
    """A tale so far: the sentence that it ends in, and the node before it."""

    rollout: Rollout | None = None
    sentence: str = ""
    before: Node | None = None

    @property
    def path(self) -> list[Node]:
        """From the request to here."""
        return [*(self.before.path if self.before else []), self]

    @property
    def score(self) -> int:
        """What the environment pays."""
        said = {word for node in self.path for word in node.sentence.split()}
        return sum(COINS[word] for word in said if word in COINS)


async def search(fleet: Fleet, engine: flashrt.Engine, prompt) -> tuple[list[Node], int]:
    # The best nodes of the last level, best first, and how many branches ran where their node was.
    (full_stop,) = engine.tokenizer.encode(" .")
    root = await fleet.trunk(prompt)
    beam, at_home = [Node()], 0
    for level in range(SENTENCES):
        parents = [beam[i % len(beam)] for i in range(BRANCHED)]
        branches = [
            Branch(
                seed=level * BRANCHED + i, temperature=0.9, max_tokens=LONGEST,
                stop=(full_stop, *engine.checkpoint.stop_tokens),
                start=node.rollout.end if node.rollout else root,
                suffix=(full_stop,) if node.rollout else (),  # of the sentence before
            )
            for i, node in enumerate(parents)
        ]  # fmt: skip
        nodes = []
        async for rollout in fleet.rollouts(root, branches, keep=True, ordered=True):
            assert rollout.error is None, rollout.error
            parent = parents[rollout.index]
            at_home += parent.rollout is not None and parent.rollout.worker == rollout.worker
            said = engine.tokenizer.decode([*rollout.tokens.tolist(), full_stop])
            nodes.append(Node(rollout, said.strip(), parent))
        beam = sorted(nodes, key=lambda n: -n.score)[:WIDTH]
    return beam, at_home


def main() -> None:
    """A search from one trunk; its best tale once more, by one engine, without a capsule."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, "cpu", max_positions=512)
    with open_chat(engine) as chat:
        chat.add("user", "tell me a story about a fox .")
        prompt = chat.tokens(is_asked=True)

    with Fleet(checkpoint, workers=2, device="cpu", max_positions=512) as fleet:
        began = time.perf_counter()
        beam, at_home = asyncio.run(search(fleet, engine, prompt))
        seconds = time.perf_counter() - began
        moved = sum(sum(m.values()) for w in fleet.stats().workers for m in w.moved)
    path = beam[0].path[1:]
    print("\n".join(f"{n.score:4} {n.sentence}" for n in path))
    print(f"coins of the best tale: {path[-1].score}")
    print(f"{BRANCHED * SENTENCES} branches in {seconds:.1f} s; {moved / 1e6:.1f} MB moved")
    print(f"{at_home} of {BRANCHED * (SENTENCES - 1)} branches ran where their node was")
    (full_stop,) = engine.tokenizer.encode(" .")
    with engine.session() as cold:
        cold.prefill(prompt)
        for node in path:
            if node.before.rollout:
                cold.prefill([full_stop])
            b = node.rollout.branch
            list(cold.generate(b.max_tokens, b.temperature, seed=b.seed, stop=b.stop))
        assert cold.digest() == path[-1].rollout.digest, "a tale is one engine's, to the bit"


if __name__ == "__main__":
    main()
