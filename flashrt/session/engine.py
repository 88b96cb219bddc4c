"""The engine that hands out sessions: `flashrt.Engine`, returned by `flashrt.load`.

IS: the verbs on tokens, with sessions on its free lanes, and the checkpoint's tokenizer. IS NOT:
what a session may do (session).
"""

from __future__ import annotations

from typing import Any

from flashrt.capsule.turn import in_turn
from flashrt.engine.tokens import TokenEngine
from flashrt.session.session import Session
from flashrt.text.tokenizer import Tokenizer


class SessionEngine(TokenEngine):
    """An engine with sessions."""

    def __init__(self, *arguments: Any, tokenizer: Tokenizer | None, **options: Any) -> None:
        """See Engine; `tokenizer` is that of the checkpoint, if it has one."""
        super().__init__(*arguments, **options)
        self.tokenizer = tokenizer

    @in_turn
    def session(self) -> Session:
        """An empty session on a free lane. Raises LaneBusy when there is none."""
        return Session(self, self.capsules.reset)
