"""The other process of the demo: opens the store, restores a capsule, answers one question.

IS: a program that reads one JSON object on stdin and writes one on stdout; the agent's demo runs it
as `python -m flashrt.commands.demo.resume`. IS NOT: a command of the CLI.
"""

from __future__ import annotations

import json
import sys
import time

from flashrt.load import load
from flashrt.session.chat import ChatPoint, open_chat
from flashrt.store.store import Store


def main() -> None:
    """Restore, digest, ask."""
    started = time.perf_counter()
    told = json.load(sys.stdin)
    engine = load(told["checkpoint"], **told["options"])
    ready = time.perf_counter()
    with open_chat(engine) as chat:
        capsule = Store(told["store"]).load(engine, told["name"])
        chat.restore(ChatPoint(capsule, tuple(told["messages"])))
        engine.backend.sync()
        restored = time.perf_counter()
        digest = chat.session.digest()
        asked = time.perf_counter()
        chat.add("user", told["question"])
        answer = chat.reply(told["answer_tokens"])
        answered = time.perf_counter()
    found = {
        "digest": digest,
        "answer": answer,
        "loaded_s": ready - started,
        "restored_s": restored - ready,
        "answered_s": answered - asked,
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
