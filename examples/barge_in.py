"""A speech-like loop: words arrive one by one, replies begin early, and the user interrupts.

While the user speaks, every word starts a reply on a fork; the next word discards it. When the
user falls silent, the reply is there already. It is spoken more slowly than it was written: when
the user interrupts, the session goes back to the last word that was heard. Beside each latency: the
same by prefilling again from nothing, as one must where a recurrent state cannot go back.

    python examples/barge_in.py [CHECKPOINT]
"""

import sys
import time

import flashrt
from flashrt.session.chat import Said, open_chat, shared
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.worlds.document import HELD_OUT
from flashrt.worlds.inventory import Inventory

SPOKEN, SHOWN = 4, 4  # words of a reply, when the user interrupts; last words of a question


class Talk:
    """A session between two people, and what each event took."""

    def __init__(self, engine: flashrt.Engine, prompt: str) -> None:
        self.engine, self.chat = engine, open_chat(engine)
        self.session, self.stop = self.chat.session, engine.checkpoint.stop_tokens
        self.said: Said = (("system", prompt),)
        self.session.prefill(self.chat.tokens(self.said))
        print(f"{'event':14} {'capsules':>9} {'prefill':>9}   the reply so far")

    def listen(self, question: str) -> None:
        """A user's turn, token by token; at each, the reply as if it were the last."""
        whole = self.chat.tokens((*self.said, ("user", question)), is_asked=True)
        last = shared(whole, self.chat.tokens((*self.said, ("user", f"{question} and"))))
        for heard in range(self.session.position + 1, last + 1):
            self.session.prefill(whole[heard - 1 : heard])
            started = time.perf_counter()
            with self.session.fork() as guess:
                guess.prefill(whole[last:])  # the turn ends here, perhaps
                reply = list(guess.generate(24, stop=self.stop))
                tokens = guess.tokens
            seconds = time.perf_counter() - started
            if heard > last - SHOWN:
                self.tell(f"heard{self.text(whole[heard - 1 : heard])}", seconds, tokens, reply)
        self.session.prefill(whole[last:])
        self.said = (*self.said, ("user", question))

    def speak(self) -> None:
        """Write the whole reply; speak some words of it; be interrupted."""
        start, reply = self.session.position, list(self.session.generate(24, stop=self.stop))
        started = time.perf_counter()
        self.session.rollback(start + SPOKEN)
        seconds = time.perf_counter() - started
        self.tell("interrupted", seconds, self.session.tokens, reply[:SPOKEN])
        self.said = (*self.said, ("assistant", self.text(reply[:SPOKEN]).strip()))
        self.session.prefill(self.chat.tokens(self.said)[self.session.position :])

    def tell(self, event: str, seconds: float, tokens: object, reply: list[int]) -> None:
        """Print an event beside the same by prefilling again, and compare what both say."""
        before = list(tokens)[: len(tokens) - len(reply)]
        with self.engine.session() as cold:
            started = time.perf_counter()
            cold.prefill(before)
            assert list(cold.generate(len(reply), stop=self.stop)) == reply, "the same words"
            slow = time.perf_counter() - started
        print(f"{event:14} {seconds * 1e3:6.1f} ms {slow * 1e3:6.1f} ms  {self.text(reply)}")

    def text(self, tokens: list[int]) -> str:
        """Of some tokens."""
        return self.engine.tokenizer.decode(tokens)


def main() -> None:
    """A question, speculated upon; its reply, interrupted; another question."""
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else bundled_checkpoint()
    engine = flashrt.load(checkpoint, device="cpu", max_positions=2048, lanes=3)
    world = Inventory(HELD_OUT, 120, 30)
    talk = Talk(engine, world.prompt())
    for thing in (world.things[10], world.things[70]):
        talk.listen(world.question(thing))
        talk.speak()
        print(f"{'in truth':34}  {world.answer(thing)}")
    with engine.session() as cold:
        cold.prefill(talk.session.tokens)
        assert cold.digest() == talk.session.digest(), "forks and rollbacks left no bit behind"
    print(f"position {talk.session.position:,}, digest equal to a cold prefill's")


if __name__ == "__main__":
    main()
