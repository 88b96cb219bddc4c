"""Questions after a full restore, and after each half of one: the same capsule.

IS: recall from the prompt, positions after moves, places after updates; every answer beside the
truth. IS NOT: checks; a model may be wrong either way.

KV only is what a cache of keys and values would bring back: recurrent states and convolution
windows are those of an empty session. State only is the other half: the rows are those of another
text of the same length.
"""

from __future__ import annotations

from collections.abc import Iterable

from flashrt.capsule.capsule import Capsule
from flashrt.commands.demo.findings import Asked
from flashrt.core.backend import Progress
from flashrt.session.chat import Chat, ChatPoint, Said, shared
from flashrt.session.engine import SessionEngine
from flashrt.worlds.moves import Moves
from flashrt.worlds.updates import Updates

OTHER = 1000  # added to a seed: the world of the other text
ANSWER_TOKENS = 32
ROWS = ("rows",)


class Ablation:
    """Asks on the session of `chat`, which is rolled back; `answers` grows."""

    def __init__(self, engine: SessionEngine, chat: Chat, progress: Progress) -> None:
        self.answers: list[Asked] = []
        self.differs = True  # logits after keys and values alone, every time
        self._engine, self._chat, self._progress = engine, chat, progress
        self._session = chat.session

    def recall(self, facts: ChatPoint, asked: Iterable[tuple[str, str]], other: str) -> None:
        """Questions about the prompt, with their true answers; `other`: a prompt no shorter."""
        elsewhere = self._stand_at((("system", other),), facts.capsule.position)
        for question, truth in asked:
            whole = self._chat.tokens((*facts.said, ("user", question)), is_asked=True)
            rest = whole[facts.capsule.position :]
            self._ask("recall", facts.capsule, elsewhere, rest, question, truth)
        elsewhere.drop()

    def walks(self, seeds: Iterable[int], moves: int) -> None:
        """Where am I, after some moves?"""
        for seed in seeds:
            world, other = Moves(seed), Moves(seed + OTHER)
            told = f"{world.start()} {world.walk(moves)}"
            elsewhere = f"{other.start()} {other.walk(moves)}"
            question, truth = world.question(), world.answer()
            self._world(f"after {moves} moves", told, elsewhere, question, truth)

    def updates(self, seeds: Iterable[int], updates: int) -> None:
        """Where is a thing, after some updates?"""
        for seed in seeds:
            world = Updates(seed)
            told, elsewhere = world.move(updates), Updates(seed + OTHER).move(updates)
            thing = world.any_thing()
            question, truth = world.question(thing), world.answer(thing)
            self._world(f"after {updates} updates", told, elsewhere, question, truth)

    def _world(self, kind: str, told: str, elsewhere: str, question: str, truth: str) -> None:
        """Capsules between what is told and the question, in the middle of a user's turn."""
        whole = self._chat.tokens((("user", f"{told} {question}"),), is_asked=True)
        cut = shared(self._chat.tokens((("user", told),)), whole)
        capsule = self._stand_at((("user", told),), cut)
        other = self._stand_at((("user", elsewhere),), cut)
        self._ask(kind, capsule, other, whole[cut:], question, truth)
        capsule.drop()
        other.drop()

    def _stand_at(self, said: Said, position: int) -> Capsule:
        self._session.rollback(0)
        self._session.prefill(self._chat.tokens(said)[:position])
        return self._session.snapshot()

    def _ask(
        self, kind: str, capsule: Capsule, other: Capsule, rest: list[int], question: str,
        truth: str,
    ) -> None:  # fmt: skip
        self._progress("questions after whole and half restores", len(self.answers), 0)
        session = self._session
        session.rollback(0)
        session.restore(capsule)
        full, logits = self._answer(rest)
        session.rollback(0)
        session.restore(capsule, bands=ROWS)
        rows_only, other_logits = self._answer(rest)
        session.restore(capsule)
        session.restore(other, bands=ROWS)
        state_only, _ = self._answer(rest)
        self.differs &= logits != other_logits
        self.answers.append(Asked(kind, question, truth, full, rows_only, state_only))

    def _answer(self, rest: list[int]) -> tuple[str, bytes]:
        session, tokenizer = self._session, self._engine.tokenizer
        assert tokenizer is not None, "a conversation is open"
        session.prefill(rest)
        logits = session.logits().tobytes()
        stop = self._engine.checkpoint.stop_tokens
        return tokenizer.decode(session.generate(ANSWER_TOKENS, stop=stop)).strip(), logits
