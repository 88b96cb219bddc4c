"""An exception before any line of a call: afterwards the state is that of the tokens.

Red when bytes move while the record still says something else, when a block, a reference or a lane
is lost, when a generator or a drafted reply leaves guesses behind, or when a capsule saved
afterwards does not load. Every line is struck in the slow suite, one in some in the quick one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flashrt
from tests.fuzz.injector import Injector, Struck

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = [(i * 37 + 11) % 512 for i in range(90)]
ROOMS = ("",)  # every file of the package


class Scene:
    """A session with a history: capsules below it, beside it and ahead of it, a reply half said."""

    def __init__(self, engine: flashrt.Engine, folder: Path) -> None:
        self.engine = engine
        self.session = engine.session()
        self.session.prefill(PROMPT[:40])
        self.low = self.session.snapshot("low")
        self.session.prefill(PROMPT[40:])
        self.high = self.session.snapshot("high")
        self.session.rollback(60)
        self.session.prefill([5, 6, 7])
        self.beside = self.session.snapshot("beside")
        self.stream = self.session.generate(30, temperature=0.9, seed=4)
        for _ in range(3):
            next(self.stream)
        self.path = folder / "a.capsule"
        self.made: list[Any] = []

    def keep(self, thing: Any) -> None:
        self.made.append(thing)

    def drafted(self) -> None:
        for token in self.session.generate(9, draft=3, temperature=0.5, seed=2):
            self.keep(token)

    def close(self) -> None:
        for thing in self.made:
            if isinstance(thing, flashrt.Session):
                thing.close()
        self.session.close()
        for capsule in list(self.engine.capsules.capsules):
            capsule.drop()


CALLS: dict[str, Callable[[Scene], object]] = {
    "prefill": lambda s: s.session.prefill([1, 2, 3]),
    "long prefill": lambda s: s.session.prefill(PROMPT * 3),
    "next": lambda s: next(s.stream),
    "drafted": lambda s: s.drafted(),
    "close a stream": lambda s: s.stream.close(),
    "logits": lambda s: s.session.logits(),
    "digest": lambda s: s.session.digest(),
    "snapshot": lambda s: s.keep(s.session.snapshot()),
    "restore below": lambda s: s.session.restore(s.low),
    "restore ahead": lambda s: s.session.restore(s.high),
    "rollback pending": lambda s: s.session.rollback(64),
    "rollback": lambda s: s.session.rollback(50),
    "rollback to nothing": lambda s: s.session.rollback(0),
    "fork": lambda s: s.keep(s.session.fork()),
    "fork a capsule": lambda s: s.keep(s.session.fork(s.high)),
    "session": lambda s: s.keep(s.engine.session()),
    "close": lambda s: s.session.close(),
    "drop": lambda s: s.high.drop(),
    "drop an inner one": lambda s: s.low.drop(),
    "to host": lambda s: s.high.to("host"),
    "to disk": lambda s: s.low.to("disk"),
    "save": lambda s: s.high.save(s.path),
    "load": lambda s: s.keep(s.engine.load_capsule(s.path)),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[flashrt.Engine]:
    engine = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=448, lanes=4, draft=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def oracle() -> Iterator[flashrt.Session]:
    """A cold engine of its own."""
    engine = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=448, draft=True)
    with engine.session() as session:
        yield session
    engine.close()


def cold_digest(
    oracle: flashrt.Session, tokens: list[int], known: dict[tuple[int, ...], str]
) -> str:
    key = tuple(tokens)
    if key not in known:
        oracle.rollback(0)
        oracle.prefill(tokens)
        known[key] = oracle.digest()
    return known[key]


def check(scene: Scene, oracle: flashrt.Session, known: dict[tuple[int, ...], str]) -> None:
    engine, session = scene.engine, scene.session
    if session.is_closed:
        session.close()
        session = engine.session()
        session.prefill(PROMPT[:3])
        scene.keep(session)
    tokens = session.tokens.tolist()
    assert session.position == len(tokens)
    assert session.digest() == cold_digest(oracle, tokens, known)
    assert session.tokens.tolist() == tokens
    engine.capsules.check_integrity()
    for capsule in (scene.low, scene.high, scene.beside):
        if not capsule.is_dropped:
            session.restore(capsule)
            assert session.digest() == cold_digest(oracle, capsule.tokens.tolist(), known)
    after = session.snapshot()
    after.save(scene.path)
    again = engine.load_capsule(scene.path)
    session.prefill([9])
    session.restore(again)
    assert session.digest() == after.digest
    engine.capsules.check_integrity()
    assert len(engine.capsules.capsules) <= 3 + 2 + len(scene.made)
    for thing in scene.made:
        if isinstance(thing, flashrt.Session):
            thing.close()
    session.close()
    lanes = [engine.session() for _ in engine.lanes]  # none was lost
    for each in lanes:
        each.close()


def strike_all(
    engine: flashrt.Engine, oracle: flashrt.Session, folder: Path, name: str, stride: int
) -> int:
    call, injector = CALLS[name], Injector(ROOMS)
    known: dict[tuple[int, ...], str] = {}

    def scene_of() -> Scene:
        scene = Scene(engine, folder)
        if name == "load":
            scene.high.save(scene.path)
        return scene

    scene = scene_of()
    n_lines = max(1, injector.count(lambda: call(scene)))
    scene.close()
    points = range(sum(name.encode()) % min(stride, n_lines), n_lines, stride)
    n_struck = 0
    for at in points:
        scene = scene_of()
        n_struck += injector.strike(lambda: call(scene), at)  # noqa: B023
        try:
            check(scene, oracle, known)
        except BaseException as error:
            raise AssertionError(f"{name}, struck before line {at}: {injector.where}") from error
        finally:
            scene.close()
        engine.capsules.check_integrity()
        assert engine.capsules.pool.used_nbytes == 0
    return n_struck


@pytest.mark.parametrize("name", CALLS)
def test_some_lines(
    engine: flashrt.Engine, oracle: flashrt.Session, tmp_path: Path, name: str
) -> None:
    assert strike_all(engine, oracle, tmp_path, name, stride=29) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_every_line(
    engine: flashrt.Engine,
    oracle: flashrt.Session,
    tmp_path: Path,
    name: str,
    request: pytest.FixtureRequest,
) -> None:
    """--stride 1 strikes every line."""
    stride = max(1, request.config.getoption("--stride") // 8)
    assert strike_all(engine, oracle, tmp_path, name, stride) > 1


@pytest.mark.parametrize("name", ["next", "close a stream", "snapshot", "logits", "rollback"])
def test_some_lines_while_the_device_is_ahead(
    engine: flashrt.Engine,
    oracle: flashrt.Session,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device has fed a token that the host was about to yield; this one waits for each replay,
    and is told to go ahead all the same.
    """
    monkeypatch.setattr(engine.backend, "is_async", True)
    assert strike_all(engine, oracle, tmp_path, name, stride=7) > 0


def test_a_change_struck_in_another_thread_is_repaired(
    engine: flashrt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when whoever has the turn back after a kernel takes another's unfinished change for its
    own: its end then hides that blocks are lost.
    """
    session, other = engine.session(), engine.session()
    other.prefill(PROMPT[:20])
    replay, table = engine.graphs.replay, engine.capsules

    def struck_snapshot() -> None:
        with monkeypatch.context() as patch, pytest.raises(Struck):
            patch.setattr(table, "_add", strike)
            other.snapshot()

    def strike(*arguments: Any) -> None:
        raise Struck

    def replay_meanwhile(key: Any, runs: Any) -> None:
        monkeypatch.setattr(engine.graphs, "replay", replay)
        thread = threading.Thread(target=struck_snapshot)
        thread.start()
        thread.join()
        replay(key, runs)

    monkeypatch.setattr(engine.graphs, "replay", replay_meanwhile)
    session.prefill(PROMPT[:20])
    assert session.digest() == other.digest()
    table.check_integrity()
    session.close()
    other.close()
    assert table.pool.used_nbytes == 0
