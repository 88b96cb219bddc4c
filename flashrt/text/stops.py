"""Stop strings: where a text that comes in pieces ends.

IS: pieces in, pieces out, up to the first stop string, which may lie across pieces. IS NOT: stop
tokens (Session.generate).
"""

from __future__ import annotations

from collections.abc import Iterable

from flashrt.base.errors import SessionError


class StopStrings:
    """Of one text. What may be the beginning of a stop string is held back."""

    def __init__(self, strings: Iterable[str]) -> None:
        """One string, or several. Raises SessionError for an empty one, or no text."""
        self._strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if not all(isinstance(s, str) and s for s in self._strings):
            raise SessionError(f"stop: {self._strings!r}; give texts of at least one character")
        self._held = ""
        self.is_found = False
        self.found: str | None = None  # the one that ended the text
        self.rest = ""  # what came after the stop string, in the piece that completed it

    def push(self, piece: str) -> str:
        """Take a piece; what lies before any stop string. Nothing more after one was found."""
        if self.is_found:
            return ""
        self._held += piece
        # The one that is whole first, and of those that end together the longest: so it does not
        # matter how the text was cut.
        found = [(at + len(s), at) for s in self._strings if (at := self._held.find(s)) >= 0]
        self.is_found = bool(found)
        if found:
            stop, end = min(found)
            self.found, self.rest = self._held[end:stop], self._held[stop:]
        else:
            end = len(self._held) - self._longest_beginning()
        given, self._held = self._held[:end], "" if found else self._held[end:]
        return given

    def flush(self) -> str:
        """What is still held, at the text's end."""
        given, self._held = self._held, ""
        return given

    def _longest_beginning(self) -> int:
        """Characters at the end of what is held that a stop string begins with."""
        most = max((len(s) for s in self._strings), default=1) - 1
        for count in range(min(most, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-count:]) for s in self._strings):
                return count
        return 0
