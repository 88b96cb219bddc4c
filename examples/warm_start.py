"""A process that resumes from a store: the first one pays for the prompt, the second does not.

The script runs itself twice, as two processes that share nothing but a folder.

    python examples/warm_start.py [CHECKPOINT]
"""

import subprocess
import sys
import tempfile
import time

import flashrt
from flashrt.session.chat import open_chat
from flashrt.store.opening import open_session
from flashrt.store.store import Store
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.document import HELD_OUT
from flashrt.worlds.inventory import Inventory

FACTS = Inventory(HELD_OUT, 150, 60)  # the same world in every process


def answer(folder: str, checkpoint: str, which: str) -> None:
    """One process: open a session on the prompt, wherever it is known, and ask."""
    engine = flashrt.load(checkpoint, device="cpu", max_positions=4096)
    chat = open_chat(engine)
    chat.add("system", FACTS.prompt())
    prompt = chat.tokens()
    thing = FACTS.things[int(which)]
    chat.add("user", FACTS.question(thing))

    started = time.perf_counter()
    opened = open_session(
        Store(folder), engine, prompt, session=chat.session, boundaries=[len(prompt)]
    )
    ready_s = time.perf_counter() - started
    assert opened.session.position == len(prompt)
    digest = opened.session.digest()
    started = time.perf_counter()
    said = chat.reply(24)
    answered_s = time.perf_counter() - started

    print(f"{opened.decision.action:8} {len(prompt):,} tokens ready in {ready_s * 1e3:6.1f} ms, "
          f"answer in {answered_s * 1e3:4.1f} ms: {said}  ({FACTS.places[thing]})")  # fmt: skip
    print(digest, file=sys.stderr)


def main() -> None:
    """A cold process, then two warm ones; all of them stand in the same state."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else str(bundled_checkpoint())
    with tempfile.TemporaryDirectory() as folder:
        digests = set()
        for which in ("3", "3", "40"):
            command = [sys.executable, __file__, "--in", folder, checkpoint, which]
            ran = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
            digests.add(ran.stderr)
        assert len(digests) == 1, "restored or prefilled: the same bits"
    print("all processes stood in the same state, to the bit")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        answer(*sys.argv[2:])
    else:
        main()
