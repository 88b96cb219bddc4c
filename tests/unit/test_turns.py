"""What a turn costs, counted in replays, reads and fills: no clock is asked.

Red when a reply's last token is decoded on its own before the next prompt or a snapshot, when a
restored session computes more than a sample, or when a band is cleared that a copy overwrites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flashrt

GOLDEN = Path(__file__).parents[1] / "golden"


class Spy:
    """What an engine asks of its graphs and its device, in order."""

    def __init__(self, engine: flashrt.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        replay = engine.graphs.replay

        def spied_replay(key: Any, runs: Any) -> None:
            self.calls.append(f"{key.phase}/{key.rows}")
            replay(key, runs)

        monkeypatch.setattr(engine.graphs, "replay", spied_replay)
        for verb in ("read", "fill", "sync"):
            monkeypatch.setattr(engine.backend, verb, self.spied(verb, engine.backend))

    def spied(self, verb: str, backend: Any) -> Callable[..., Any]:
        call = getattr(backend, verb)

        def spied_call(*arguments: Any) -> Any:
            self.calls.append(verb)
            return call(*arguments)

        return spied_call


@pytest.fixture
def spy(engine: flashrt.Engine, monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(engine, monkeypatch)


@pytest.fixture
def replied(session: flashrt.Session, spy: Spy) -> Iterator[flashrt.Session]:
    """After a reply: its last token is history and is not yet in the state."""
    session.prefill(range(20))
    list(session.generate(5))
    spy.calls.clear()
    yield session


def test_a_prompt_after_a_reply_is_one_replay(replied: flashrt.Session, spy: Spy) -> None:
    replied.prefill([7, 8, 9])
    assert spy.calls == ["prefill/8"]
    whole = replied.tokens
    digest = replied.digest()
    replied.rollback(0)
    replied.prefill(whole)
    assert replied.digest() == digest


def test_a_snapshot_after_a_reply_samples_and_reads_nothing(
    replied: flashrt.Session, spy: Spy
) -> None:
    capsule = replied.snapshot()
    assert spy.calls == ["prefill/1"]
    assert capsule.position == 25
    assert capsule.tokens.tolist() == replied.tokens.tolist()


def test_a_reply_from_a_capsule_computes_only_the_sample(
    replied: flashrt.Session, spy: Spy
) -> None:
    expected = list(replied.generate(4))
    replied.rollback(25)
    capsule = replied.snapshot()
    for _ in range(2):
        replied.prefill([1, 2])
        replied.restore(capsule)
        spy.calls.clear()
        stream = replied.generate(4)
        got = [next(stream)]
        assert spy.calls == ["sample/1", "read"]
        assert [*got, *stream] == expected


def test_a_fork_clears_nothing(replied: flashrt.Session, spy: Spy) -> None:
    capsule = replied.snapshot()
    replied.prefill([3])
    spy.calls.clear()
    with replied.fork() as twin, replied.fork(capsule) as other:
        assert spy.calls == []
        assert twin.digest() == replied.digest()
        assert other.digest() == capsule.digest


def test_a_fork_without_room_or_state_gives_its_lane_back(replied: flashrt.Session) -> None:
    capsule = replied.snapshot()
    capsule.drop()
    for _ in range(4):
        with pytest.raises(flashrt.CapsuleError, match="dropped"):
            replied.fork(capsule)
    replied.fork().close()
