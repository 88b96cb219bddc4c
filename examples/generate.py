"""Load, prefill, stream; then more questions about the same prompt, without prefilling it again.

python examples/generate.py [CHECKPOINT]
"""

import sys
import time

import flashrt
from flashrt.session.chat import Chat, open_chat
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.document import HELD_OUT
from flashrt.worlds.inventory import Inventory


def stream(chat: Chat, question: str) -> float:
    """Ask, and print the answer as it is sampled; returns seconds to the first piece of text."""
    print(f"{question} ", end="")
    chat.add("user", question)
    started, first_s = time.perf_counter(), 0.0
    for piece in chat.stream(32):
        first_s = first_s or time.perf_counter() - started
        print(piece, end="", flush=True)
    return first_s


def main() -> None:
    """One prompt, three questions: one pays for the prompt, two start at its capsule."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, device="cpu", max_positions=2048)
    world, chat = Inventory(HELD_OUT, 120, 30), open_chat(engine)
    chat.add("system", world.prompt())  # is prefilled when a reply is wanted

    first, *others = world.things[20::40]
    cold_s = stream(chat, world.question(first))
    print(f"   ({world.places[first]}; {chat.fed_tokens:,} tokens fed, {cold_s * 1e3:.1f} ms)")
    chat.said = chat.said[:1]
    prompt = chat.snapshot("prompt")  # rolled back to the end of the system message, and frozen

    for thing in others:
        fed = chat.fed_tokens
        chat.restore(prompt)
        warm_s = stream(chat, world.question(thing))
        print(
            f"   ({world.places[thing]}; {chat.fed_tokens - fed} tokens fed, {warm_s * 1e3:.1f} ms)"
        )
        print(f"   the first text {cold_s / warm_s:.0f} times sooner")

    # The same answer with the checkpoint's own draft head: fewer steps, and no bit differs.
    digest = chat.session.digest()
    chat.restore(prompt)
    chat.add("user", world.question(others[-1]))
    chat.reply(32, draft=3)
    assert chat.session.digest() == digest, "drafting changes the speed and nothing else"
    stats = engine.stats()
    print(f"drafted: {stats['accepted']} of {stats['drafted']} guesses agreed; digest {digest}")


if __name__ == "__main__":
    main()
