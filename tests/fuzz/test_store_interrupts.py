"""An exception before any line of a store's call: what was reported saved loads, the rest goes on.

Red when bytes are given away before they can be read back, when a struck save leaves something that
a later one takes for whole, or when a lock, a lane or a byte of the pool is lost.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flashrt
from flashrt.store.opening import open_session
from flashrt.store.store import Store
from tests.fuzz.injector import Injector

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = [(i * 37 + 11) % 512 for i in range(120)]
ROOMS = ("",)  # every file of the package


class Scene:
    """A store with one named capsule, and a session with two more."""

    def __init__(self, engine: flashrt.Engine, folder: Path) -> None:
        self.engine, self.store = engine, Store(folder)
        self.session = engine.session()
        self.session.prefill(PROMPT[:40])
        self.low = self.session.snapshot("low")
        self.store.save(self.low)
        self.session.prefill(PROMPT[40:])
        self.high = self.session.snapshot("high")
        self.digests = {self.low: self.low.digest, self.high: self.high.digest}

    def close(self) -> None:
        self.session.close()
        for capsule in list(self.engine.capsules.capsules):
            capsule.drop()


CALLS: dict[str, Callable[[Scene], object]] = {
    "save": lambda s: s.store.save(s.high),
    "save again": lambda s: s.store.save(s.low, "another"),
    "offload": lambda s: s.store.offload(s.high),
    "load": lambda s: s.store.load(s.engine, "low"),
    "remove": lambda s: s.store.remove("low"),
    "open": lambda s: open_session(
        s.store, s.engine, [*PROMPT, 5], boundaries=[80]
    ).session.close(),
}


@pytest.fixture(autouse=True)
def no_disk_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions are what strikes here; power is not lost."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def engine() -> Iterator[flashrt.Engine]:
    with flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=320, lanes=3) as engine:
        yield engine


def check(scene: Scene, name: str) -> None:
    engine, session = scene.engine, scene.session
    for capsule, digest in scene.digests.items():
        session.restore(capsule)  # wherever its bytes are now
        assert session.digest() == digest
    engine.capsules.check_integrity()
    store = Store(scene.store.folder.url)  # another user of the folder
    for each in store.places(engine.fingerprint):
        assert store.load(engine, each).digest in scene.digests.values() or name == "open"
    if name != "remove":
        assert store.load(engine, "low").digest == scene.digests[scene.low]
    store.save(scene.high, "after")
    again = store.load(engine, "after")
    session.rollback(0)
    session.restore(again)
    assert session.digest() == scene.digests[scene.high]
    engine.capsules.check_integrity()
    session.close()
    lanes = [engine.session() for _ in engine.lanes]
    for lane in lanes:
        lane.close()


def strike_all(engine: flashrt.Engine, folder: Path, name: str, stride: int) -> int:
    call, injector, n_struck = CALLS[name], Injector(ROOMS), 0
    names = (folder / f"{i}" for i in itertools.count())
    scene = Scene(engine, next(names))
    n_lines = injector.count(lambda: call(scene))
    scene.close()
    for at in range(len(name), n_lines, stride):
        scene = Scene(engine, next(names))
        n_struck += injector.strike(lambda: call(scene), at)  # noqa: B023
        try:
            check(scene, name)
        except BaseException as error:
            raise AssertionError(f"{name}, struck before line {at}: {injector.where}") from error
        finally:
            scene.close()
        assert engine.capsules.pool.used_nbytes == 0
    return n_struck


@pytest.mark.parametrize("name", CALLS)
def test_some_lines(engine: flashrt.Engine, tmp_path: Path, name: str) -> None:
    assert strike_all(engine, tmp_path, name, stride=151) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_many_lines(
    engine: flashrt.Engine, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    """--stride 1 strikes all 8,100; that takes some ten minutes."""
    stride: int = request.config.getoption("--stride")
    assert strike_all(engine, tmp_path, name, stride) > 5
