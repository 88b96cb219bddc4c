"""A speech-like loop: words arrive one by one, replies begin early, and the user interrupts.

While the user speaks, every word starts a reply on a fork; the next word discards it. When the
user falls silent, the reply is there already. When the user interrupts it, the session is at the
last word that was spoken. Beside each latency: the same by prefilling again from nothing.

    python examples/barge_in.py [CHECKPOINT]
"""

import sys
import time

import flashrt
from flashrt.session.chat import open_chat, shared
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.document import HELD_OUT
from flashrt.worlds.inventory import Inventory

WORDS_SPOKEN = 4  # of the reply, when the user interrupts
Row = tuple[str, float, float, str]  # event, seconds, seconds by prefilling again, what is said


def main() -> None:
    """One question, speculated upon at every word; interrupted; another question."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, device="cpu", max_positions=2048, lanes=3)
    world, chat, stop = (
        Inventory(HELD_OUT, 120, 30),
        open_chat(engine),
        engine.checkpoint.stop_tokens,
    )
    session, rows = chat.session, list[Row]()
    chat.add("system", world.prompt())
    session.prefill(chat.tokens())
    first, second = world.things[10], world.things[70]

    def again(tokens: list[int], said: list[int]) -> float:
        """Seconds by prefilling again to what was just said, which it also checks."""
        with engine.session() as cold:
            started = time.perf_counter()
            cold.prefill(tokens)
            assert list(cold.generate(len(said), stop=stop)) == said, (
                "the same words, without capsules"
            )
            return time.perf_counter() - started

    def listen(said: tuple[tuple[str, str], ...], thing: object) -> list[int]:
        """A user's turn, token by token; returns the reply that was begun when it ended."""
        whole = chat.tokens((*said, ("user", world.question(thing))), is_asked=True)
        spoken = shared(whole, chat.tokens((*said, ("user", f"{world.question(thing)} x"))))
        reply: list[int] = []
        for heard in range(session.position + 1, spoken + 1):
            session.prefill(whole[heard - 1 : heard])
            started = time.perf_counter()
            with session.fork() as guess:  # as if the user had finished here
                guess.prefill(whole[spoken:])
                reply = list(guess.generate(24, stop=stop))
            seconds = time.perf_counter() - started
            if heard >= spoken - 3:
                word = engine.tokenizer.decode(whole[heard - 1 : heard])
                slow = again([*whole[:heard], *whole[spoken:]], reply)
                rows.append((f"heard{word}", seconds, slow, engine.tokenizer.decode(reply)))
        session.prefill(whole[spoken:])
        return reply

    reply = listen(chat.said, first)
    speech = session.generate(24, stop=stop)  # spoken as it is sampled; the guess knew the words
    assert [next(speech) for _ in range(WORDS_SPOKEN)] == reply[:WORDS_SPOKEN]
    speech.close()  # the user speaks: exactly what was spoken is history
    heard = engine.tokenizer.decode(reply[:WORDS_SPOKEN]).strip()
    said = (*chat.said, ("user", world.question(first)), ("assistant", heard))
    started = time.perf_counter()
    session.prefill(chat.tokens(said)[session.position :])  # its turn ends here
    now = session.tokens.tolist()
    rows.append(("interrupted", time.perf_counter() - started, again(now, []), f"{heard} --"))
    listen(said, second)

    print(f"{'event':14} {'capsules':>9} {'prefill':>9}   the reply so far")
    for event, seconds, slow, words in rows:
        print(f"{event:14} {seconds * 1e3:6.1f} ms {slow * 1e3:6.1f} ms  {words}")
    with engine.session() as cold:
        cold.prefill(session.tokens)
        assert cold.digest() == session.digest(), "forks and interruptions left no bit behind"
    print(f"in truth: {world.answer(first)} {world.answer(second)}")
    print(f"position {session.position:,}, digest equal to a cold prefill's")


if __name__ == "__main__":
    main()
