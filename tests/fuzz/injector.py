"""An exception at any line: what Ctrl-C, a signal handler or MemoryError may be.

IS: running a call with an exception raised before its n-th line of flashrt's own files, and how
many such lines a call has. IS NOT: what must hold afterwards; each test says that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

import flashrt

PACKAGE = Path(flashrt.__file__).parent


class Struck(BaseException):
    """As KeyboardInterrupt, no Exception: nothing may catch it by accident."""


class Injector:
    """Counts lines in files of some rooms, and raises before one of them."""

    def __init__(self, rooms: Collection[str]) -> None:
        self._prefixes = tuple(f"{PACKAGE / room}" for room in rooms)
        self._lines = 0
        self._at = -1
        self.where = ""

    def count(self, call: Callable[[], object]) -> int:
        """Lines that a call runs through."""
        self._run(call, -1)
        return self._lines

    def strike(self, call: Callable[[], object], at: int) -> bool:
        """Run a call with `Struck` raised before its line number `at`, from 0; whether it was."""
        try:
            self._run(call, at)
        except Struck:
            return True
        return False

    def _run(self, call: Callable[[], object], at: int) -> None:
        self._lines, self._at, self.where = 0, at, ""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(self._prefixes) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            if self._lines == self._at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                self._lines += 1
                raise Struck(self.where)
            self._lines += 1
        return self._line
