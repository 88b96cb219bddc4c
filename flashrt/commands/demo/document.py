"""The demo on real text: a document is read once, and questions branch from its capsule.

IS: what happens and what is measured, for any model that can talk. IS NOT: how it is shown
(report). Nobody here knows the true answers: they are shown as the model gives them; what is
checked is bits.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np

from flashrt.base.errors import FlashrtError
from flashrt.base.files import read_file
from flashrt.base.messages import printable
from flashrt.commands.checkpoints import EngineOptions
from flashrt.commands.demo.acts import Acts
from flashrt.commands.demo.findings import DocumentFindings
from flashrt.commands.demo.report import draw
from flashrt.commands.demo.starts import measure_starts
from flashrt.core.backend import Progress
from flashrt.session.chat import ChatPoint
from flashrt.session.engine import SessionEngine

QUESTIONS = (
    "In one sentence: what is this document about?",
    "May I sell copies of the software? Answer briefly.",
    "What must I do when I change a file?",
)
AFTERTHOUGHT = "Now answer as a pirate would."
ELSEWHERE = "Does it give me a patent license?"
_INSTRUCTION = "You answer questions about this document.\n\n"
_IN_A_CLONE = Path(__file__).parents[3] / "LICENSE"
_MOST_NBYTES = 1 << 20
_ANSWER_TOKENS = 64
_INTO_THE_ANSWER = 9  # tokens that a rollback leaves of an answer: no boundary was ever there
_LENGTHS = (256, 1024, 2048, 4096)  # of the comparison cold / warm, up to the document's


def read_document(path: Path | None) -> tuple[str, str]:
    """Name and text: of a file, by default of the license that came with flashrt.

    Raises FlashrtError if it cannot be read as text.
    """
    if path is None:
        text = metadata.distribution("flashrt").read_text("licenses/LICENSE")
        if not text and _IN_A_CLONE.is_file():  # an editable install has no copy of its own
            text = _IN_A_CLONE.read_text(encoding="utf-8")
        if not text:
            raise FlashrtError(
                "flashrt's own LICENSE was not installed; give a text: --document FILE"
            )
        return "the license of flashrt", text
    try:
        return path.name, read_file(path, _MOST_NBYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise FlashrtError(
            f"{printable(str(path))}: cannot be read as text: {error}; give a file of UTF-8"
        ) from error


class DocumentDemo(Acts):
    """A document as the prompt."""

    def __init__(
        self,
        engine: SessionEngine,
        options: EngineOptions,
        found: DocumentFindings,
        progress: Progress,
    ) -> None:
        super().__init__(engine, options, found, progress)
        self.found = found

    def play(self, text: str, out: Path) -> None:
        """All acts, in order. Raises FlashrtError if the document is longer than the context."""
        self.found.prompt = self._fitting(text)
        read = self.tell("document", _INSTRUCTION + self.found.prompt)
        ends = self._questions(read)
        self._take_back(ends[0])
        self.resume(ends[0], ELSEWHERE, _ANSWER_TOKENS)
        draw(
            self.found, self.engine, [p.capsule for p in (read, *ends)],
            {"the reader": ends[0].capsule}, out,
        )  # fmt: skip
        self.ask_the_witness()
        for point in (*ends, read):
            point.capsule.drop()
        self._starts()

    def _fitting(self, text: str) -> str:
        """As much of the text as leaves room for the questions."""
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None, "a conversation is open"
        room = self.engine.max_positions - 8 * _ANSWER_TOKENS
        ids = tokenizer.encode(text)
        return text if len(ids) <= room else tokenizer.decode(ids[:room])

    def _questions(self, read: ChatPoint) -> list[ChatPoint]:
        """A branch each: straight on, after a restore, in a fork."""
        chat, names = self.chat, ("summary", "selling", "changes")
        turns = self.ask(chat, QUESTIONS[0], answer_tokens=_ANSWER_TOKENS)
        first = self.branch(names[0], "goes straight on", chat, turns)
        self.step("restore the document", lambda: chat.restore(read))
        turns = self.ask(chat, QUESTIONS[1], answer_tokens=_ANSWER_TOKENS)
        second = self.branch(names[1], "restored on the same lane", chat, turns)
        other = self.step("fork the document to another lane", lambda: chat.fork(read))
        turns = self.ask(other, QUESTIONS[2], answer_tokens=_ANSWER_TOKENS)
        third = self.branch(names[2], "forked to another lane", other, turns)
        other.close()
        return [first, second, third]

    def _take_back(self, point: ChatPoint) -> None:
        """A question is asked, and taken back: into the middle of its answer, then altogether."""
        chat = self.chat
        self.step("switch to the first branch", lambda: chat.restore(point))
        self.found.taken_back = self.ask(chat, AFTERTHOUGHT, answer_tokens=_ANSWER_TOKENS)
        end = chat.session.position
        middle = max(point.capsule.position, end - _INTO_THE_ANSWER)

        def roll_back() -> None:
            chat.session.rollback(middle)

        self.step(f"roll back {end - middle} tokens, into an answer", roll_back)
        self.step("take the question back", lambda: chat.restore(point))
        self.found.dropped_tokens = end - chat.session.position

    def _starts(self) -> None:
        chat, length = self.chat, self.found.prompt_tokens
        prompt = np.array(chat.tokens((("system", _INSTRUCTION + self.found.prompt),)), np.int32)
        turn = np.array(chat.tokens((("user", ELSEWHERE),), is_asked=True), np.int32)
        self.found.turn_tokens = len(turn)
        chat.close()
        lengths = [*(n for n in _LENGTHS if n < length), length]
        self.found.starts = measure_starts(self.engine, prompt, lengths, turn, self.progress)
