"""Best-of-N and beam search over forks of one capsule, scored by an environment.

The model tells a tale; the environment has hidden coins in places, and pays for each place that
the tale goes to. Best-of-N forks whole tales from the request. Beam search forks sentences from the
best tales so far, and samples as many. A fork begins at its capsule: nothing is prefilled twice.

    python examples/tree_search.py [CHECKPOINT]
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass

import flashrt
from flashrt.session.chat import open_chat
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.names import PLACES

SENTENCES, WIDTH, BRANCHES, LONGEST = 6, 3, 4, 24
COINS = dict(zip(PLACES, random.Random(0).sample(range(len(PLACES)), len(PLACES)), strict=True))


@dataclass
class Node:
    """A tale so far: its capsule, its last sentence, the node before it, the seed it came from."""

    capsule: flashrt.Capsule
    sentence: str = ""
    before: Node | None = None
    seed: int = 0
    is_kept: bool = False

    @property
    def path(self) -> list[Node]:
        """From the request to here."""
        return [*(self.before.path if self.before else []), self]

    @property
    def score(self) -> int:
        """What the environment pays."""
        said = {word for node in self.path for word in node.sentence.split()}
        return sum(COINS[word] for word in said if word in COINS)


def sentence(engine: flashrt.Engine, session: flashrt.Session, seed: int) -> str:
    """The next sentence, sampled; its full stop is committed too."""
    (full_stop,) = engine.tokenizer.encode(" .")
    stop = (full_stop, *engine.checkpoint.stop_tokens)
    said = list(session.generate(LONGEST, temperature=0.9, seed=seed, stop=stop))
    session.prefill([full_stop])
    return engine.tokenizer.decode([*said, full_stop]).strip()


def grow(engine: flashrt.Engine, session: flashrt.Session, node: Node, seed: int) -> Node:
    """One more sentence, in a fork of the node's capsule."""
    with session.fork(node.capsule) as fork:
        said = sentence(engine, fork, seed)
        return Node(fork.snapshot(), said, node, seed)


def show(node: Node, nodes: list[Node], indent: str = " ") -> None:
    """What the beam kept, as a tree."""
    for child in nodes:
        if child.before is node and child.is_kept:
            print(f"{child.score:4}{indent}{child.sentence}")
            show(child, nodes, indent + "  ")


def main() -> None:
    """Both searches, from one capsule, with the same number of sampled sentences."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, "cpu", max_positions=512, lanes=2, pool_bytes=128 << 20)
    chat = open_chat(engine)
    chat.add("user", "tell me a story about a fox .")
    chat.session.prefill(chat.tokens(is_asked=True))
    root, started, nodes = Node(chat.session.snapshot("request")), time.perf_counter(), list[Node]()

    tales = [root] * (WIDTH * BRANCHES)  # best of N
    for _ in range(SENTENCES):
        tales = [grow(engine, chat.session, n, len(nodes) + i) for i, n in enumerate(tales)]
        nodes += tales
    beam = [root]
    for _ in range(SENTENCES):
        parents = beam * (WIDTH * BRANCHES // len(beam))
        grown = [grow(engine, chat.session, n, len(nodes) + i) for i, n in enumerate(parents)]
        beam = sorted(grown, key=lambda n: -n.score)[:WIDTH]
        for node in beam:
            node.is_kept = True
        nodes += grown
    seconds = time.perf_counter() - started

    alone, first, best = tales[0], max(tales, key=lambda n: n.score), beam[0]
    show(root, nodes)
    print(f"coins: one tale {alone.score}, best of {len(tales)} {first.score}, beam {best.score}")
    spared = sum(n.before.capsule.position for n in nodes if n.before)
    print(
        f"{len(nodes)} forks in {seconds:.2f} s spared {spared:,} tokens of prefill; the capsules "
        f"hold {sum(n.capsule.nbytes for n in nodes) / 1e6:.1f} MB"
    )

    with engine.session() as cold:  # the best tale once more, with its seeds and without a fork
        cold.prefill(root.capsule.tokens)
        for n in best.path[1:]:
            assert sentence(engine, cold, n.seed) == n.sentence, "a fork says what its origin would"
        assert cold.digest() == best.capsule.digest, "a fork is its origin, to the bit"


if __name__ == "__main__":
    main()
