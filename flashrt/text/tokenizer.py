"""Text <-> token ids: a checkpoint's tokenizer.json through the `tokenizers` library.

IS: encode, decode, and a decoder for streams. IS NOT: chat formatting (`chat`), or of the
model's size: a model may have more ids than its tokenizer. Called by: load, serve, cli.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers

from flashrt.base.errors import CheckpointError, TokenError

TOKENIZER_FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"  # what bytes that are no character decode to
_MAX_HELD_TOKENS = (
    8  # a character has at most 4 bytes: a tail held longer than this is no character
)


class Tokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError if the file cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise CheckpointError(f"{path}: not a usable tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Ids that stand for text, special tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens spelled out in it are recognised; none is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that form no character become U+FFFD. Raises TokenError."""
        ids = [int(token) for token in tokens]
        try:
            return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special))
        except OverflowError as error:
            raise TokenError(f"token ids are not in [0, 2^32): {error}") from error

    def token_id(self, token: str) -> int | None:
        """The id of one token by its spelling, e.g. `<|im_end|>`; None if there is none."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for tokens that come one by one."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Text of tokens as they come, in whole characters only.

    A token may end inside a character: its text is held back until the rest has come, or until it
    is clear that the bytes are no character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []  # emitted last; some decoders join a token to the one before
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Take one token; the text that has become certain, perhaps none."""
        self._held.append(token)
        text = self._text()
        if not text.endswith(_REPLACEMENT):
            self._context, self._held = self._held, []
            return text
        return self.flush() if len(self._held) >= _MAX_HELD_TOKENS else ""

    def flush(self) -> str:
        """What is still held, broken bytes as U+FFFD; the decoder starts afresh."""
        text = self._text()
        self._context, self._held = [], []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context, skip_special=self._skip_special)
        ids = self._context + self._held
        return self._tokenizer.decode(ids, skip_special=self._skip_special)[len(before) :]


def tokenizer_of(checkpoint: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None if it has none."""
    path = checkpoint / TOKENIZER_FILE
    return Tokenizer(path) if path.is_file() else None
