"""An exception before any line of a conversation's call: it goes on as if nothing had been asked.

Red when messages and session drift apart, when a reply that failed joins, or when a conversation
waits for a reply that will never come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import flashrt
from flashrt.session.chat import Chat, ChatPoint, open_chat
from flashrt.weights.bundled import bundled_checkpoint
from tests.fuzz.injector import Injector

ROOMS = ("",)  # every file of the package
QUESTION = "where is the red key?"


class Scene:
    """A conversation with a point below it."""

    def __init__(self, engine: flashrt.Engine) -> None:
        self.chat = open_chat(engine)
        self.chat.add("system", "the red key is in the kitchen.")
        self.point: ChatPoint = self.chat.snapshot()
        self.chat.add("user", QUESTION)
        self.chat.reply(4)
        self.made: list[Chat] = []

    def ask(self) -> None:
        self.chat.add("user", QUESTION)
        self.chat.reply(5, draft=2)

    def half_a_reply(self) -> None:
        self.chat.add("user", QUESTION)
        stream = self.chat.stream(8)
        next(stream)
        stream.close()

    def close(self) -> None:
        for chat in (self.chat, *self.made):
            chat.close()


CALLS: dict[str, Callable[[Scene], object]] = {
    "ask": lambda s: s.ask(),
    "half a reply": lambda s: s.half_a_reply(),
    "snapshot": lambda s: s.chat.snapshot(),
    "restore": lambda s: s.chat.restore(s.point),
    "fork": lambda s: s.made.append(s.chat.fork()),
    "fork a point": lambda s: s.made.append(s.chat.fork(s.point)),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[flashrt.Engine]:
    with flashrt.load(bundled_checkpoint(), device="cpu", max_positions=256, lanes=4) as engine:
        yield engine


def check(engine: flashrt.Engine, scene: Scene, known: dict[object, str]) -> None:
    chat = scene.chat
    said = [tuple(sorted(message.items())) for message in chat.messages]
    chat.add("user", QUESTION)
    got = chat.reply(6)
    key = tuple(map(repr, said))
    if key not in known:
        with open_chat(engine) as fresh:
            fresh.messages = [dict(message) for message in said]
            fresh.add("user", QUESTION)
            known[key] = fresh.reply(6)
    assert got == known[key]
    chat.restore(scene.point)
    assert chat.session.digest() == scene.point.capsule.digest
    engine.capsules.check_integrity()
    scene.close()
    lanes = [engine.session() for _ in engine.lanes]
    for lane in lanes:
        lane.close()
    for capsule in list(engine.capsules.capsules):
        capsule.drop()
    assert engine.capsules.pool.used_nbytes == 0


def strike_all(engine: flashrt.Engine, name: str, stride: int) -> int:
    call, injector, known = CALLS[name], Injector(ROOMS), dict[object, str]()
    scene = Scene(engine)
    n_lines = injector.count(lambda: call(scene))
    scene.close()
    scene.point.capsule.drop()
    n_struck = 0
    for at in range(len(name), n_lines, stride):
        scene = Scene(engine)
        n_struck += injector.strike(lambda: call(scene), at)  # noqa: B023
        try:
            check(engine, scene, known)
        except BaseException as error:
            raise AssertionError(f"{name}, struck before line {at}: {injector.where}") from error
    return n_struck


@pytest.mark.parametrize("name", CALLS)
def test_some_lines(engine: flashrt.Engine, name: str) -> None:
    assert strike_all(engine, name, stride=97) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_more_lines(engine: flashrt.Engine, name: str, request: pytest.FixtureRequest) -> None:
    """--stride 1 strikes every line."""
    assert strike_all(engine, name, max(1, request.config.getoption("--stride") // 3)) > 3
