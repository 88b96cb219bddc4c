"""An exception before any line of a call that holds a lock on a file: afterwards nobody holds it.

Red while such calls held locks by bare descriptors: one that was struck before it closed its own
left the lock held until the process ended, and the process waited for itself, or never swept.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flashrt.backends.cache import KernelCache
from flashrt.base.files import lock_file, replacing
from flashrt.store.directory import Directory
from flashrt.store.spill import Spill
from tests.fuzz.injector import Injector

ROOMS = ("base/files.py", "backends/cache.py", "store/directory.py", "store/spill.py")


def replace(folder: Path) -> None:
    (folder / f".flashrt-1-{'0' * 16}").touch()  # a killed writer's
    with replacing(folder / "new", is_durable=False) as temporary:
        temporary.touch()


def build(folder: Path) -> None:
    (folder / "build-00000000").mkdir(exist_ok=True)  # a killed builder's
    (folder / "build-00000000/lock").touch()
    with KernelCache(folder).building() as work:
        (work / "k.c").touch()


def spill(folder: Path) -> Spill:
    (folder / "process-1-00000000").mkdir(exist_ok=True)  # a killed process's
    (folder / "process-1-00000000/lock").touch()
    made = Spill(folder)
    made.put(np.zeros(8, np.uint8))
    return made


def sweep(folder: Path) -> None:
    with Directory(folder, is_durable=False).sweeping():
        pass


CALLS: dict[str, Callable[[Path], Spill | None]] = {
    "replace": replace, "build": build, "spill": spill, "sweep": sweep,
}  # fmt: skip


def held(folder: Path) -> Iterator[Path]:
    """Files that somebody has a lock on."""
    for path in folder.rglob("*"):
        if path.is_file():
            with lock_file(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield path


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_no_lock_outlives_a_struck_call(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So much for the locks; that no file is lost is for the tests of stores and of crashes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    folder, injector = tmp_path / "n", Injector(ROOMS)
    folder.mkdir(mode=0o700)
    n_lines = injector.count(lambda: CALLS[name](folder))
    assert n_lines > 10
    for at in range(n_lines):
        folder = tmp_path / f"{at}"
        folder.mkdir(mode=0o700)
        made: list[Spill | None] = []  # a spill goes when nobody strikes any more
        # A thread whose tracer raised in an `except` goes on to hold what was caught there.
        with ThreadPoolExecutor(1) as thread:
            call = lambda: made.append(CALLS[name](folder))  # noqa: B023, E731
            thread.submit(injector.strike, call, at).result()
        made.clear()
        assert not list(held(folder)), f"struck before line {at}: {injector.where}"
