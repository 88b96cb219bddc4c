"""Text of tokens that come one by one, in whole characters.

IS: a window over the last tokens, decoded again at each: what has become certain is handed out. IS
NOT: knowledge of any tokenizer: it is given two functions. Exists because tokens cannot be decoded
one by one: one may end inside a character, and most decoders treat the first one differently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

_REPLACEMENT = "\ufffd"  # what bytes that are no character decode to
_MOST_CHARACTER_BYTES = 4
_MOST_WINDOW = 32  # tokens in a row that end inside a character, before the oldest are let go


class StreamDecoder:
    """What its pieces give together is what `decode` makes of all tokens at once.

    A character that is not whole yet is held back. Of tokens that stand for single bytes,
    `byte_tokens`, a broken run keeps the characters that were whole, where `decode` gives up all of
    the run.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        is_shown: Callable[[int], bool],
        byte_tokens: Collection[int] = (),
        letter: int | None = None,
    ) -> None:
        """`is_shown`: whether `decode` takes notice of a token at all; `letter`: any token that is
        no byte and has text, to stand before a byte that is not the first.
        """
        self._decode, self._is_shown = decode, is_shown
        self._byte_tokens, self._letter = byte_tokens, letter
        self._window: list[int] = []  # some tokens before those that are not certain, and these
        self._given = 0  # characters of the window's text that were handed out
        self._bytes = 0  # byte tokens at the window's end that are no character yet

    def push(self, token: int) -> str:
        """Take one token; the text that has become certain, perhaps none. Raises TokenError."""
        if not self._is_shown(token):
            return ""
        self._window.append(token)
        if token not in self._byte_tokens:
            self._bytes = 0
            return self._advance()
        self._bytes += 1
        piece = self._advance()
        while self._bytes >= _MOST_CHARACTER_BYTES:  # the first of them begins no character
            del self._window[-self._bytes]
            self._bytes -= 1
            piece += _REPLACEMENT + self._advance()
        return piece

    def flush(self) -> str:
        """What is still held, broken bytes as U+FFFD; the decoder starts afresh."""
        text = self._decode(self._window)[self._given :]
        self._window, self._given, self._bytes = [], 0, 0
        return text

    def _advance(self) -> str:
        """Hand out all but what may still become another character: of a run of byte tokens, every
        byte is a U+FFFD until it is whole; otherwise only the last U+FFFD is uncertain.
        """
        text = self._decode(self._window)
        whole, least = len(text), len(text) - max(1, self._run())
        while whole > least and text[:whole].endswith(_REPLACEMENT):
            whole -= 1
        piece = text[self._given : whole]
        self._given = max(self._given, whole)
        if whole == len(text):
            self._bytes = 0
            self._shorten(text)
        elif len(self._window) > _MOST_WINDOW:
            self._slide(text[self._given :])
        return piece

    def _run(self) -> int:
        """Byte tokens at the window's end."""
        others = (i for i, t in enumerate(reversed(self._window)) if t not in self._byte_tokens)
        return next(others, len(self._window))

    def _shorten(self, text: str) -> None:
        """All is handed out: keep the fewest last tokens that decode to the end of it, and to some
        text, so that what comes next is not taken for the first. No byte token is kept: with it,
        the next would have to make a whole run.
        """
        if not text:
            return
        if run := self._run():
            letter = [] if self._letter is None else [self._letter]
            self._window = self._window[:-run] or letter
            self._given = len(self._decode(self._window))
            return
        for count in range(1, len(self._window)):
            last = self._window[-count:]
            if (end := self._decode(last)) and text.endswith(end):
                self._window, self._given = last, len(end)
                return

    def _slide(self, held: str) -> None:
        """Let go of the older half of a long window, if the same text is still held after that."""
        newer = self._window[-_MOST_WINDOW // 2 :]
        text = self._decode(newer)
        if len(text) > len(held) and text.endswith(held):
            self._window, self._given = newer, len(text) - len(held)
