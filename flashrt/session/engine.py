"""The engine that hands out sessions: `flashrt.Engine`, returned by `flashrt.load`.

IS: the verbs on tokens, with sessions on its free lanes, and what the checkpoint says about text.
IS NOT: what a session may do (session).
"""

from __future__ import annotations

from typing import Any

from flashrt.capsule.turn import in_turn
from flashrt.engine.tokens import TokenEngine
from flashrt.session.session import Session
from flashrt.text.checkpoint_text import CheckpointText
from flashrt.text.constraint import Grammars
from flashrt.text.tokenizer import Tokenizer


class SessionEngine(TokenEngine):
    """An engine with sessions. `text`: what the checkpoint says about text."""

    def __init__(self, *arguments: Any, text: CheckpointText | None = None, **options: Any) -> None:
        """See Engine."""
        super().__init__(*arguments, **options)
        self.text = text or CheckpointText()

    @property
    def text(self) -> CheckpointText:
        """What the checkpoint says about text."""
        return self._text

    @text.setter
    def text(self, text: CheckpointText) -> None:
        self._text = text
        self.grammars = Grammars(text.tokenizer, self.vocab_size)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, if it has one."""
        return self.text.tokenizer

    @in_turn
    def session(self) -> Session:
        """An empty session on a free lane. Raises LaneBusy when there is none."""
        return Session(self, self.capsules.reset)
