"""A fixed history of each model, and the bits that it leads to.

IS: what `recorded.json` holds and `test_recorded.py` compares; `python -m tests.golden.record SETS`
writes the file. A change of the file means that stored capsules and users' results change: the
commit says why. IS NOT: a reference; that the bits are right is what the golden sets show.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

import flashrt
from flashrt.weights.bundled import bundled_checkpoint

HERE = Path(__file__).parent
RECORDED = HERE / "recorded.json"
POLICIES = ("mountain-car", "pendulum", "two-doors")


def hash_of(array: NDArray[np.generic]) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).tobytes())


def tokens_of(n: int, vocab_size: int) -> list[int]:
    return [(i * 7919 + i * i * 13) % vocab_size for i in range(n)]


def history_of_tokens(checkpoint: Path) -> dict[str, object]:
    """Digests, logits and tokens along a history of prefills, replies, forks and rollbacks."""
    found: dict[str, object] = {}
    engine = flashrt.load(checkpoint, device="cpu", max_positions=512, lanes=2)
    s = engine.session()

    def note(name: str, session: flashrt.Session) -> None:
        found[name] = [session.position, session.digest(), hash_of(session.logits())]

    prompt = tokens_of(333, engine.vocab_size)
    s.prefill(prompt[:1])
    note("one token", s)
    s.prefill(prompt[1:77])
    note("77 tokens", s)
    capsule = s.snapshot("77")
    s.prefill(prompt[77:])
    note("333 tokens", s)
    found["greedy"] = list(s.generate(24))
    note("after greedy", s)
    found["sampled"] = list(s.generate(24, temperature=0.9, top_k=40, top_p=0.95, seed=5))
    s.prefill(prompt[:9])
    note("a second turn", s)
    s.rollback(201)
    note("rolled back", s)
    twin = s.fork()
    found["twin"] = list(twin.generate(8, temperature=1.0, seed=3, repetition_penalty=1.1))
    note("after the twin's", twin)
    s.restore(capsule)
    note("restored", s)
    found["capsule"] = capsule.digest
    if engine.max_draft:
        found["drafted"] = list(s.generate(20, draft=3))
        note("after drafts", s)
    engine.close()
    return found


def history_of_actions(name: str) -> dict[str, object]:
    """Digests and actions along a history of ticks, plans, interrupts and rewinds."""
    found: dict[str, object] = {}
    engine = flashrt.load_policy(name, device="cpu", lanes=2)
    width = engine.config.observation_dim
    loop = flashrt.ControlLoop(engine, 50.0, seed=11)

    def run(first: int, n: int) -> list[str]:
        actions = []
        for i in range(first, first + n):
            seen = [((i * 31 + j * 17) % 41 - 20) / 23 for j in range(width)]
            actions.append(hash_of(loop.tick(np.array(seen, np.float32))))
            loop.slack()
        return actions

    found["first"] = run(0, 40)
    capsule = loop.snapshot()
    found["at 40"] = loop.digest()
    found["then"] = run(40, 25)
    loop.interrupt(2)
    found["after an interrupt"] = [*run(65, 12), loop.digest()]
    loop.rewind_ticks(9)
    found["rewound"] = [*run(68, 9), loop.digest()]
    loop.restore(capsule)
    loop.set_seed(12)
    found["restored"] = [*run(40, 9), loop.digest()]
    loop.close()
    engine.close()
    return found


def main(sets: list[str]) -> None:
    checkpoints = {p.name: p for p in map(Path, sets)}
    recorded = {
        "tokens": {
            "tiny-agent": history_of_tokens(bundled_checkpoint()),
            **{name: history_of_tokens(path) for name, path in sorted(checkpoints.items())},
        },
        "actions": {name: history_of_actions(name) for name in POLICIES},
    }
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
