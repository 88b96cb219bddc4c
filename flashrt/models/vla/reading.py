"""How a policy reads texts: the steps of its preprocessor, and the tokens that they make.

IS: LeRobot's tokenizer step and SmolVLA's newline, read as data; tokens of texts. IS NOT: the text,
which a family makes of a task, or where the tokenizer's file is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.locks import reentrant_lock, while_holding
from flashrt.base.messages import indented, shown
from flashrt.models.features import size_of
from flashrt.text.tokenizer import Tokenizer
from flashrt.weights.lerobot import PREPROCESSOR, step_of

NEW_LINE, TOKENIZER = "smolvla_new_line_processor", "tokenizer_processor"  # steps of LeRobot
_MOST_TOKENS = 1 << 10
_KEPT = 64  # texts


@dataclass(frozen=True, slots=True)
class Reading:
    """How texts are read, by the steps of a policy's preprocessor."""

    most: int  # tokens of a text, all beyond are cut off
    ends_lines: bool  # whether a task gets a newline behind it
    name: str  # of whose tokenizer it is

    def line(self, task: str) -> str:
        """A task as it is read where it is all that is read."""
        return f"{task}\n" if self.ends_lines and not task.endswith("\n") else task


def reading_of(root: Path) -> Reading:
    """Of a policy's folder. Raises CheckpointError for steps that read in another way."""
    step = step_of(root, TOKENIZER)
    if step is None:
        raise CheckpointError(f"{root / PREPROCESSOR}: has no step {TOKENIZER}; fetch it again")
    problems: list[str] = []
    fields = {"max_length": 512, "truncation": True, "padding_side": "right", **step}
    most = size_of(fields, "max_length", _MOST_TOKENS, problems)
    for field, supported in (("task_key", "task"), ("truncation", True), ("padding_side", "right")):
        if fields.get(field, supported) != supported:
            problems.append(f"{field} is {shown(fields[field])}; supported: {shown(supported)}")
    name = fields.get("tokenizer_name")
    if not isinstance(name, str) or not name:
        problems.append(f"tokenizer_name is {shown(name)}, expected a name or a folder")
    if problems:
        raise CheckpointError(f"{root / PREPROCESSOR}: step {TOKENIZER}:{indented(problems)}")
    return Reading(most, step_of(root, NEW_LINE) is not None, str(name))


class Words:
    """Texts as the tokens that a policy reads; those that were asked for last are known."""

    def __init__(self, find: Callable[[], Path], reading: Reading, vocab_size: int) -> None:
        """`find`: the tokenizer's file. It is looked for when it is read: a policy is planned, and
        told about, without one.
        """
        self.reading = reading
        self._find = find
        self._tokenizer: Tokenizer | None = None
        self._vocab_size = vocab_size
        self._known: dict[str, list[int]] = {}
        self._lock = reentrant_lock()  # of threads whose loops take turns elsewhere

    def tokenizer(self) -> Tokenizer:
        """See PrefixModel."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._find())
        return self._tokenizer

    def tokens(self, text: str) -> list[int]:
        """Of a text. Raises TokenError; CheckpointError for a tokenizer of another model."""
        known = self._known.get(text)
        return (
            known if known is not None else while_holding((self._lock,), lambda: self._read(text))
        )

    def _read(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is None:
            tokenizer = self.tokenizer()
            known = tokenizer.encode_whole(text, self.reading.most)
            if known and max(known) >= self._vocab_size:
                raise CheckpointError(
                    f"{tokenizer.path}: token {max(known)} of a vocabulary of "
                    f"{self._vocab_size}: it is another model's"
                )
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[text] = known
        return known
