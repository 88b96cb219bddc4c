"""An agent with tools in a simulated building whose tools sometimes do not answer.

Before each call, a capsule. A call that fails is taken back with its tokens and made again, so the
agent never sees the failure: it ends in the state, to the bit, of an agent whose tools never
failed. Beside it: the same agent with its failures left in the context, and what going back would
have cost by prefilling again.

    python examples/agent_rollback.py [CHECKPOINT]
"""

import random
import sys
import time
from dataclasses import dataclass

import flashrt
from flashrt.session.chat import Chat, open_chat
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.building import Building, parse_call
from flashrt.worlds.document import HELD_OUT

BUILDINGS, REQUESTS, TURNS, HINTS = 4, 4, 12, 10
FAILURE = "error : the tool did not answer . try again later ."


@dataclass
class Run:
    """One agent in all buildings."""

    failing: float  # share of calls that fail
    takes_back: bool = False
    brought: int = 0
    tokens: int = 0  # of context at the end
    undone: int = 0
    undo_s: float = 0.0
    prefills_saved: int = 0  # tokens that going back by prefilling would have fed


def fetch(chat: Chat, building: Building, luck: random.Random, run: Run) -> None:
    """Call, result, call, ... until the agent says something else."""
    for _ in range(TURNS):
        before = chat.snapshot()
        said = chat.reply(32)
        if not parse_call(said):
            return
        if luck.random() >= run.failing:
            chat.add("tool", building.call(said))
        elif run.takes_back:
            started = time.perf_counter()
            chat.restore(before)  # as if the call had not been made
            run.undo_s += time.perf_counter() - started
            run.undone += 1
            run.prefills_saved += chat.session.position
        else:
            chat.add("tool", FAILURE)
        before.capsule.drop()


def play(engine: flashrt.Engine, run: Run) -> list[str]:
    """All buildings; the digest at the end of each."""
    digests = []
    for seed in range(HELD_OUT, HELD_OUT + BUILDINGS):
        building, luck = Building(seed, HINTS), random.Random(seed)
        with open_chat(engine) as chat:
            chat.add("system", building.prompt())
            for thing in [t for t in building.things if t in building.hidden][:REQUESTS]:
                chat.add("user", building.request(thing))
                fetch(chat, building, luck, run)
                run.brought += building.is_brought(thing)
            digests.append(chat.session.digest())
            run.tokens += chat.session.position
    return digests


def main() -> None:
    """Tools that never fail; that fail, kept in the context; that fail, taken back."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, device="cpu", max_positions=2048, pool_bytes=64 << 20)
    reliable, kept, back = Run(0.0), Run(0.4), Run(0.4, takes_back=True)
    truth, _, undone = (play(engine, run) for run in (reliable, kept, back))
    assert undone == truth, "what was taken back left no bit behind"
    for what, run in (
        ("no failures", reliable),
        ("failures kept", kept),
        ("failures taken back", back),
    ):
        print(f"{what:20} brought {run.brought:2} of {BUILDINGS * REQUESTS}, "
              f"{run.tokens / BUILDINGS:.0f} tokens of context")  # fmt: skip
    print(f"{back.undone} calls taken back in {back.undo_s * 1e3:.1f} ms; by prefilling again: "
          f"{back.prefills_saved:,} tokens; the states are those without failures")  # fmt: skip


if __name__ == "__main__":
    main()
