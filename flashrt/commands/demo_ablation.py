"""Questions after a full restore, and after one of keys and values alone: the same capsule.

IS: recall from the prompt, positions after moves, places after updates; every answer beside the
truth. IS NOT: checks; a model may be wrong either way. Called by: demo_acts.

Keys and values alone is what a cache of them would bring back: recurrent states and convolution
windows are those of an empty session.
"""

from __future__ import annotations

from collections.abc import Iterable

from flashrt.commands.demo_story import Asked
from flashrt.core.backend import Progress
from flashrt.core.capsule import Capsule
from flashrt.session.chat import Chat, Moment, Said, shared
from flashrt.session.load import SessionEngine
from flashrt.worlds.moves import Moves
from flashrt.worlds.updates import Updates

ANSWER_TOKENS = 32


class Ablation:
    """Asks on the session of `chat`, which is rolled back; `answers` grows."""

    def __init__(self, engine: SessionEngine, chat: Chat, progress: Progress) -> None:
        self.answers: list[Asked] = []
        self.differs = True  # logits after half a restore, every time
        self._engine, self._chat, self._progress = engine, chat, progress

    def recall(self, facts: Moment, asked: Iterable[tuple[str, str]]) -> None:
        """Questions about the prompt, with their true answers."""
        for question, truth in asked:
            whole = self._chat.tokens((*facts.said, ("user", question)), is_asked=True)
            rest = whole[facts.capsule.position :]
            self._ask("recall", facts.capsule, rest, question, truth)

    def walks(self, seeds: Iterable[int], moves: int) -> None:
        """Where am I, after some moves?"""
        for seed in seeds:
            world = Moves(seed)
            told = f"{world.start()} {world.walk(moves)}"
            self._world(f"after {moves} moves", told, world.question(), world.answer())

    def updates(self, seeds: Iterable[int], updates: int) -> None:
        """Where is a thing, after some updates?"""
        for seed in seeds:
            world = Updates(seed)
            told, thing = world.move(updates), world.any_thing()
            kind = f"after {updates} updates"
            self._world(kind, told, world.question(thing), world.answer(thing))

    def _world(self, kind: str, told: str, question: str, truth: str) -> None:
        """A snapshot between what is told and the question, in the middle of a user's turn."""
        session = self._chat.session
        asked: Said = (("user", f"{told} {question}"),)
        whole = self._chat.tokens(asked, is_asked=True)
        cut = shared(self._chat.tokens((("user", told),)), whole)
        session.rollback(0)
        session.prefill(whole[:cut])
        capsule = session.snapshot()
        self._ask(kind, capsule, whole[cut:], question, truth)
        capsule.drop()

    def _ask(self, kind: str, capsule: Capsule, rest: list[int], question: str, truth: str) -> None:
        self._progress("questions after full and KV-only restores", len(self.answers), 0)
        full, logits = self._answer(capsule, ("fixed", "rows"), rest)
        rows_only, other_logits = self._answer(capsule, ("rows",), rest)
        self.differs &= logits != other_logits
        self.answers.append(Asked(kind, question, truth, full, rows_only))

    def _answer(
        self, capsule: Capsule, bands: tuple[str, ...], rest: list[int]
    ) -> tuple[str, bytes]:
        session, tokenizer = self._chat.session, self._engine.tokenizer
        assert tokenizer is not None, "a conversation is open"
        session.rollback(0)
        session.restore(capsule, bands=bands)
        session.prefill(rest)
        logits = session.logits().tobytes()
        stop = self._engine.checkpoint.stop_tokens
        return tokenizer.decode(session.generate(ANSWER_TOKENS, stop=stop)).strip(), logits
