"""Sessions as users see them: what is refused, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import BackendError

GOLDEN = Path(__file__).parents[1] / "golden"
Call = Callable[[flashrt.Session], Any]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.prefill([1, 512]), r"token 512 at index 1 is not in \[0, 512\)"),
        (lambda s: s.prefill([-1]), "token -1 at index 0"),
        (lambda s: s.prefill([0.5]), "flat run of integers"),
        (lambda s: s.prefill(np.zeros((2, 2), int)), "flat run of integers"),
        (lambda s: s.prefill(["a"]), "flat run of integers"),
        (lambda s: s.prefill([1] * 400), r"10 \+ 400 tokens > max_positions 400"),
        (lambda s: s.generate(1, temperature=-1), r"temperature=-1 is not in \[0, inf\)"),
        (lambda s: s.generate(1, temperature=float("nan")), "temperature=nan"),
        (lambda s: s.generate(1, top_p=0), "top_p=0"),
        (lambda s: s.generate(1, top_k=-3), "top_k=-3"),
        (lambda s: s.generate(1, seed=1 << 64), "seed="),
        (lambda s: s.generate(-1), "max_tokens=-1"),
        (lambda s: s.generate(1, stop=[600]), "token 600"),
        (lambda s: s.generate(1, draft=9), "draft=9 is beyond the longest draft, 8"),
        (lambda s: s.generate(1, draft=-1), "draft=-1"),
        (lambda s: s.generate(1, draft="often"), "draft='often' is neither \"auto\""),
        (lambda s: s.generate(1, repetition_penalty=0), "repetition_penalty=0"),
        (lambda s: s.generate(1, presence_penalty=float("inf")), "presence_penalty=inf"),
        (lambda s: s.generate(1, logit_bias={512: 1.0}), "token 512"),
        (lambda s: s.generate(1, logit_bias={3: float("nan")}), "logit_bias"),
        (lambda s: s.logprobs(), "right after generate"),
        (lambda s: s.rollback(11), r"11 is not in \[0, 10\]"),
        (lambda s: s.rollback(-1), "-1 is not in"),
        (lambda s: s.restore("x"), "expected a Capsule, got str"),
        (lambda s: s.restore(s.snapshot(), bands=("fixed",)), "bands"),
    ],
)
def test_refusals_leave_the_state(session: flashrt.Session, call: Call, message: str) -> None:
    session.prefill(range(10))
    digest = session.digest()
    with pytest.raises(flashrt.FlashrtError, match=message):
        call(session)
    assert session.digest() == digest
    assert session.tokens.tolist() == list(range(10))


def test_waypoints_that_were_asked_for_stay(
    engine: flashrt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when they are thinned like the others, when a full pool keeps the older ones, and when
    the state there is not what it was.
    """
    fed: list[int] = []
    with engine.session() as session:
        digests = {}
        for stop in (7, 20, 21):
            session.prefill(range(session.position, stop))
            session.keep_waypoint()
            digests[stop] = session.digest()
        session.prefill(range(21, 300))
        held: list[Any] = []
        with pytest.raises(flashrt.PoolFull):
            while True:
                held += engine.capsules.pool.take(engine.capsules.fixed_nbytes)
        session.keep_waypoint()
        kept = [w.position for w in session.lane.waypoints]
        assert {7, 20, 21, 300} <= set(kept), kept
        for block in held:
            engine.capsules.pool.give(block)
        prefill = engine.prefill

        def counted(lane: Any, tokens: Any, bucket: int | None = None) -> None:
            fed.append(len(tokens))
            prefill(lane, tokens, bucket)

        monkeypatch.setattr(engine, "prefill", counted)
        for stop in (21, 20, 7):
            session.rollback(stop)
            assert session.digest() == digests[stop] and not fed
        engine.capsules.check_integrity()


def test_an_empty_session_has_no_logits(session: flashrt.Session) -> None:
    with pytest.raises(flashrt.SessionError, match="prefill at least one token"):
        session.logits()
    with pytest.raises(flashrt.SessionError, match="prefill at least one token"):
        session.generate(1)
    session.prefill([])
    assert session.position == 0


def test_a_closed_session_refuses_everything(engine: flashrt.Engine) -> None:
    session = engine.session()
    session.prefill([1])
    capsule = session.snapshot()
    session.close()
    session.close()
    calls: list[Call] = [
        lambda s: s.prefill([1]), lambda s: s.logits(), lambda s: s.generate(1),
        lambda s: s.snapshot(), lambda s: s.restore(capsule), lambda s: s.fork(),
        lambda s: s.rollback(0), lambda s: s.digest(),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(flashrt.SessionError, match="closed"):
            call(session)
    capsule.drop()


def test_foreign_and_dropped_capsules_are_refused(session: flashrt.Session) -> None:
    other = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=64)
    foreign = other.session()
    foreign.prefill([3])
    capsule = foreign.snapshot()
    session.prefill([1, 2])
    digest = session.digest()
    with pytest.raises(flashrt.CapsuleError, match="another engine"):
        session.restore(capsule)
    with pytest.raises(flashrt.CapsuleError, match="another engine"):
        session.fork(capsule)
    mine = session.snapshot()
    mine.drop()
    with pytest.raises(flashrt.CapsuleError, match="dropped"):
        session.restore(mine)
    assert session.digest() == digest


def test_generation_stops_when_the_lane_is_full(session: flashrt.Session) -> None:
    session.prefill(np.zeros(398, int))
    stream = session.generate(10)
    got = list(stream)
    assert len(got) == 2
    assert stream.reason == "context"
    assert session.position == 400
    assert session.tokens[-2:].tolist() == got
    session.digest()
    with pytest.raises(flashrt.SessionError, match="max_positions 400"):
        session.generate(1)


def test_a_generation_says_why_it_ended(session: flashrt.Session) -> None:
    session.prefill(range(20))
    capsule = session.snapshot()
    stream = session.generate(6)
    assert stream.reason is None
    free = list(stream)
    assert stream.reason == "length"
    session.restore(capsule)
    stream = session.generate(6, stop=[free[3]])
    assert list(stream) == free[: free.index(free[3])]
    assert stream.reason == "stop"
    stream = session.generate(6)
    next(stream)
    stream.close()
    assert stream.reason is None
    assert list(stream) == []


def test_stop_tokens_are_not_committed(session: flashrt.Session) -> None:
    session.prefill(range(20))
    capsule = session.snapshot()
    free = list(session.generate(12))
    session.restore(capsule)
    stop = free[5]
    assert list(session.generate(12, stop=[stop])) == free[: free.index(stop)]
    assert session.position == 20 + free.index(stop)


def test_a_generator_notices_that_the_session_moved(session: flashrt.Session) -> None:
    session.prefill(range(20))
    stream = session.generate(5)
    next(stream)
    session.prefill([4])
    with pytest.raises(flashrt.SessionError, match="changed meanwhile"):
        next(stream)


def test_logits_between_tokens_do_not_disturb_generation(session: flashrt.Session) -> None:
    session.prefill(range(20))
    capsule = session.snapshot()
    expected = list(session.generate(6, temperature=1.0, seed=4))
    session.restore(capsule)
    got = []
    for token in session.generate(6, temperature=1.0, seed=4):
        got.append(token)
        session.logits()
        session.digest()
    assert got == expected


def test_sampling_is_a_function_of_seed_and_position(session: flashrt.Session) -> None:
    session.prefill(range(20))
    capsule = session.snapshot()
    runs = set()
    for seed in (1, 1, 2):
        session.restore(capsule)
        runs.add(tuple(session.generate(8, temperature=1.0, seed=seed)))
    assert len(runs) == 2


def test_load_refuses_what_it_cannot_do() -> None:
    with pytest.raises(BackendError, match="choose one of"):
        flashrt.load(GOLDEN / "tiny", device="tpu")
    with pytest.raises(flashrt.CheckpointError, match="no such directory"):
        flashrt.load(GOLDEN / "nowhere", device="cpu")
    with pytest.raises(flashrt.FlashrtError, match="lanes=0"):
        flashrt.load(GOLDEN / "tiny", device="cpu", lanes=0)
    for name, value in (
        ("lanes", "2"), ("lanes", True), ("lanes", 10**9), ("pool_bytes", -1_000_000),
        ("pool_bytes", 1.5), ("pool_bytes", 10**30), ("max_positions", 0),
        ("max_positions", 10**12), ("draft", "yes"),
    ):  # fmt: skip
        wrong: dict[str, Any] = {name: value}
        with pytest.raises(flashrt.FlashrtError, match=name):
            flashrt.load(GOLDEN / "tiny", device="cpu", **wrong)
    with pytest.raises(flashrt.FlashrtError, match="kv_dtype"):
        flashrt.load(GOLDEN / "tiny", device="cpu", kv_dtype="int4")  # type: ignore[arg-type]


def test_a_forgotten_session_gives_its_lane_back(engine: flashrt.Engine) -> None:
    for _ in range(2 * len(engine.lanes)):
        engine.session().prefill([1])
