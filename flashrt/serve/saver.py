"""The saver: one thread that writes files, so that no lane waits for a disk.

IS: an order of jobs, and work for when there is none. IS NOT: what is written (sessions, the
store), or the engine: a job never touches it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from flashrt.base.errors import StoreError


class Saver:
    """Does jobs in the order in which they came. `tidy` is called while there is none, until it
    returns False.
    """

    def __init__(self, tidy: Callable[[], bool]) -> None:
        self._tidy = tidy
        self._jobs: deque[tuple[Callable[[], object], Callable[[BaseException | None], object]]]
        self._jobs = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._may_tidy = False
        self._thread = threading.Thread(target=self._loop, name="flashrt-saver", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def do(self, job: Callable[[], object], done: Callable[[BaseException | None], object]) -> None:
        """`job()`, then `done(what it raised, or None)`, both in the saver's thread."""
        with self._wake:
            self._jobs.append((job, done))
            self._wake.notify()

    def tidy_soon(self) -> None:
        """There is something to tidy."""
        with self._wake:
            self._may_tidy = True
            self._wake.notify()

    def close(self) -> None:
        """Do what waits, then end."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._may_tidy and not self._is_closing:
                    self._wake.wait()
                if not self._jobs and self._is_closing:
                    return
                at_hand = self._jobs.popleft() if self._jobs else None
            if at_hand is None:
                try:
                    self._may_tidy = self._tidy()
                except StoreError:
                    self._may_tidy = False
                continue
            job, done = at_hand
            error: BaseException | None = None
            try:
                job()
            except Exception as raised:
                error = raised
            done(error)
