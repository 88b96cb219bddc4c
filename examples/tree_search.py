"""Best-of-N and beam search over forks of one capsule, whose branches are sampled side by side.

The model tells a tale; the environment has hidden coins in places, and pays for each place that
the tale goes to. Best-of-N forks whole tales from the request. Beam search forks sentences from the
best tales so far, and samples as many. A fork begins at its capsule: nothing is prefilled twice.
The forks of a level share each pass over the weights; the bits are those of each fork alone.

    python examples/tree_search.py [CHECKPOINT]
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass

import flashrt
from flashrt.session.chat import Chat, open_chat
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.names import PLACES

SENTENCES, WIDTH, BRANCHED, LONGEST = 6, 3, 12, 24
COINS = dict(zip(PLACES, random.Random(0).sample(range(len(PLACES)), len(PLACES)), strict=True))


@dataclass
class Node:
    """A tale so far: its capsule, its last sentence, the seed it came from, the node before it."""

    capsule: flashrt.Capsule
    sentence: str = ""
    seed: int = 0
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


def search(chat: Chat, engine: flashrt.Engine, root: Node, is_together: bool) -> list[list[Node]]:
    """All nodes; the tales of best-of-N; those of the beam: as many sentences are sampled for it.

    All tales go on after each sentence; those of the beam from the best few.
    """
    found: list[list[Node]] = [[]]
    for width in (BRANCHED, WIDTH):
        kept = [root]
        for _ in range(SENTENCES):
            parents = kept * (BRANCHED // len(kept))
            forks = [chat.session.fork(node.capsule) for node in parents]
            seeds = [len(found[0]) + i for i in range(BRANCHED)]
            said = sentences(engine, forks, seeds, is_together)
            kept = list(map(Node, [fork.snapshot() for fork in forks], said, seeds, parents))
            found[0] += kept
            kept = sorted(kept, key=lambda n: -n.score)[:width] if width < BRANCHED else kept
            for fork in forks:
                fork.close()
        found.append(kept)
    return found


def sentences(
    engine: flashrt.Engine, sessions: list[flashrt.Session], seeds: list[int], is_together: bool
) -> list[str]:
    """The next sentence of each, sampled; its full stop is committed too."""
    (full_stop,) = engine.tokenizer.encode(" .")
    stop, seeded = (full_stop, *engine.checkpoint.stop_tokens), zip(sessions, seeds, strict=True)
    going = [s.generate(LONGEST, temperature=0.9, seed=n, stop=stop) for s, n in seeded]
    said: list[list[int]] = [[] for _ in going]
    if is_together:
        for index, token in flashrt.together(*going):
            said[index].append(token)
    else:
        said = [list(tokens) for tokens in going]
    for session in sessions:
        session.prefill([full_stop])
    return [engine.tokenizer.decode([*tokens, full_stop]).strip() for tokens in said]


def main() -> None:
    """Both searches from one capsule, a level at once; then again, one branch after the other."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, "cpu", max_positions=512, lanes=13, pool_bytes=128 << 20)
    chat = open_chat(engine)
    chat.add("user", "tell me a story about a fox .")
    chat.session.prefill(chat.tokens(is_asked=True))
    root, clock = Node(chat.session.snapshot("request")), [time.perf_counter()]
    for is_together in (False, True):
        nodes, tales, beam = search(chat, engine, root, is_together)
        clock.append(time.perf_counter())

    one, first, best = tales[0], max(tales, key=lambda n: n.score), beam[0]
    print("\n".join(f"{n.score:4} {n.sentence}" for n in best.path[1:]))
    print(f"coins: one tale {one.score}, best of {len(tales)} {first.score}, beam {best.score}")
    spared = sum(n.before.capsule.position for n in nodes if n.before)
    print(f"{len(nodes)} forks spared {spared:,} tokens of prefill")
    alone, together = clock[1] - clock[0], clock[2] - clock[1]
    print(f"{alone:.2f} s one by one, {together:.2f} s side by side: {alone / together:.1f} x")

    with engine.session() as cold:  # the best tale once more, with its seeds and without a fork
        cold.prefill(root.capsule.tokens)
        for n in best.path[1:]:
            said = sentences(engine, [cold], [n.seed], is_together=False)
            assert said == [n.sentence], "a fork says what its origin would"
        assert cold.digest() == best.capsule.digest, "a fork is its origin, to the bit"


if __name__ == "__main__":
    main()
