"""The engine that hands out sessions: `flashrt.Engine`, returned by `flashrt.load`.

IS: the verbs on tokens, with sessions on its free lanes, and what the checkpoint says about text.
IS NOT: what a session may do (session).
"""

from __future__ import annotations

from typing import Any

from flashrt.base.errors import ImageError
from flashrt.capsule.turn import in_turn
from flashrt.engine.sight import Image, Sight
from flashrt.engine.tokens import TokenEngine
from flashrt.session.session import Session
from flashrt.text.checkpoint_text import CheckpointText
from flashrt.text.constraint import Grammars
from flashrt.text.tokenizer import Tokenizer
from flashrt.vision.pixels import Picture


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
    def image(self, picture: Picture) -> Image:
        """An image: its `tokens` go into a prompt among others, where the chat template has its one
        image token. picture: a path, bytes of a file, or an array [height, width, 3] of uint8.

        Its rows are made once per content and kept in host memory, see `sight`. Raises ImageError
        for a model that was loaded without images=True, and for what is no image.
        """
        return self._sight.image(picture)

    @in_turn
    def glance(self, picture: Picture) -> Image:
        """The same, but the tower sees it when it is fed for the first time: hold it until then."""
        return self._sight.glance(picture)

    @property
    def _sight(self) -> Sight:
        if self.sight is None:
            raise ImageError(
                "the model was loaded without its vision tower: load(images=True), --images"
            )
        return self.sight

    @in_turn
    def close(self) -> None:
        """See Engine; the tower's memory is given back too."""
        super().close()
        if self.sight is not None:
            self.sight.tower.close()

    @in_turn
    def session(self) -> Session:
        """An empty session on a free lane. Raises LaneBusy when there is none."""
        return Session(self, self.capsules.reset)
