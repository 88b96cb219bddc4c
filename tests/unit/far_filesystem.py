"""A filesystem of fsspec that lies in memory and misbehaves as services do; and who runs when.

IS: times that are skewed or missing, files written in place, and a hook before each operation.
IS NOT: a test. `Schedule` lets two workers take turns at each operation, in a given order; waiting
costs time on a clock of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem


class Killed(BaseException):
    """A process ends at an operation: it does nothing more, not even what it does at its end."""


@dataclass
class Far:
    """What the service has, and how it behaves."""

    is_atomic: bool = True  # a put appears whole
    has_times: bool = True
    skew_s: float = 0.0  # of its clock
    now_s: float = 1e9
    before: Callable[[str, str], None] = lambda op, path: None
    files: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    operations: int = 0

    def step(self, op: str, path: str) -> None:
        self.before(op, path)
        self.operations += 1

    def put(self, path: str, data: bytes) -> None:
        self.files[path] = data, self.now_s + self.skew_s


class FarFilesystem(AbstractFileSystem):
    """See the module. `far` is the service at hand."""

    protocol = "far"
    cachable = False
    far = Far()

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        self.far.step("info", path)
        if path not in self.far.files:
            raise FileNotFoundError(path)
        return self._entry(path)

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False,
             **options: Any) -> Any:  # fmt: skip
        self.far.step("find", path)
        found = {p: self._entry(p) for p in sorted(self.far.files) if p.startswith(f"{path}/")}
        return found if detail else list(found)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        self.far.step("cat", path)
        if path not in self.far.files:
            raise FileNotFoundError(path)
        return self.far.files[path][0][start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self.far.step("put", path)
        if not self.far.is_atomic:
            self.far.put(path, value[: len(value) // 2])
            self.far.step("put the rest", path)
        self.far.put(path, value)

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self.far.step("mv", path1)
        self.far.put(path2, self.far.files.pop(path1)[0])

    def rm_file(self, path: str) -> None:
        self.far.step("rm", path)
        if path not in self.far.files:
            raise FileNotFoundError(path)
        del self.far.files[path]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders."""

    def _entry(self, path: str) -> dict[str, Any]:
        data, changed = self.far.files[path]
        entry: dict[str, Any] = {"name": path, "size": len(data), "type": "file"}
        return {**entry, "mtime": changed} if self.far.has_times else entry


class AtomicFarFilesystem(FarFilesystem):
    """A put is one step, as on S3."""

    protocol = ("farther", "s3")


fsspec.register_implementation("far", FarFilesystem, clobber=True)
fsspec.register_implementation("farther", AtomicFarFilesystem, clobber=True)


class Schedule:
    """Workers who run one at a time. `turns`: (worker, operations), in order; when they are used
    up, whoever can run does. A worker that waits gives its turn away, as far as another can run.
    """

    def __init__(
        self, far: Far, turns: Sequence[tuple[str, int]], frozen: str = "", pace: float = 1.0
    ) -> None:
        """frozen: a worker that was stopped: it runs in its turns alone, until the others have
        ended; others who wait keep their turn. pace: how fast the clock of those who wait is.
        """
        self.far = far
        self.results: dict[str, object] = {}
        self._turns = list(turns)
        self._frozen = frozen
        self._pace = pace
        self._condition = threading.Condition()
        self._alive: dict[str, None] = {}
        self._current = turns[0][0]

    def run(self, **work: Callable[[], object]) -> dict[str, object]:
        """Results, or what was raised, by worker."""
        self._alive = dict.fromkeys(work)
        self.far.before = lambda op, path: self._step()
        threads = [
            threading.Thread(target=self._work, args=item, name=item[0]) for item in work.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} hangs"
        self.far.before = lambda op, path: None
        return self.results

    def sleep(self, seconds: float) -> None:
        """In place of time.sleep."""
        self.far.now_s += seconds * self._pace
        with self._condition:
            if threading.current_thread().name in self._alive:
                self._pass_on()
                self._wait()

    def clock(self) -> float:
        """In place of time.monotonic."""
        return self.far.now_s

    def _work(self, name: str, work: Callable[[], object]) -> None:
        try:
            self.results[name] = work()
        except BaseException as error:
            self.results[name] = error
        with self._condition:
            del self._alive[name]
            self._turns = [t for t in self._turns if t[0] != name]
            if self._current == name:
                self._pass_on()

    def _step(self) -> None:
        name = threading.current_thread().name
        with self._condition:
            if name not in self._alive:
                return
            self._wait()
            if self._turns and self._turns[0][0] == name:
                left = self._turns[0][1] - 1
                self._turns[0] = name, left
                if left <= 0:
                    self._turns.pop(0)
                    self._pass_on(self._turns[0][0] if self._turns else None)
                    self._wait()

    def _pass_on(self, to: str | None = None) -> None:
        me = threading.current_thread().name
        others = [n for n in self._alive if n != me]
        able = [n for n in others if n != self._frozen]
        if to in self._alive:
            self._current = str(to)
        elif able:
            self._current = able[0]
        elif me in self._alive:
            self._current = me
        elif others:
            self._current = others[0]
        self._condition.notify_all()

    def _wait(self) -> None:
        name = threading.current_thread().name
        while self._current != name:
            if not self._condition.wait(30):
                raise AssertionError(f"{name} waits for {self._current}")
