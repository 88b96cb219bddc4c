"""Real signals: Ctrl-C at any instant of restores, rollbacks, replies and forks.

Red when a session is left whose digest is not that of its tokens, or when a lane or a byte of the
pool is lost. `test_interrupts` strikes each line of Python; here they fall between its bytecodes.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import flashrt

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = [(i * 37 + 11) % 512 for i in range(300)]


@pytest.mark.parametrize("n", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_states_are_those_of_their_tokens(n: int) -> None:
    choose = random.Random(n)
    engine = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=400, lanes=3, draft=True)
    session, oracle = engine.session(), engine.session()
    session.prefill(PROMPT[:100])
    low = session.snapshot()
    session.prefill(PROMPT[100:])
    high = session.snapshot()

    def restores() -> None:
        for _ in range(200):
            session.restore(low)
            session.restore(high)

    def rollbacks() -> None:
        for _ in range(20):
            session.rollback(100)
            session.prefill(PROMPT[100:150])
            session.restore(high)

    def replies() -> None:
        for draft in (0, 3):
            session.restore(low)
            for _ in session.generate(60, draft=draft, temperature=0.8, seed=1):
                pass

    def forks() -> None:
        for _ in range(50):
            with session.fork() as twin:
                twin.snapshot().drop()

    calls: list[Callable[[], None]] = [restores, rollbacks, replies, forks]
    known: dict[tuple[int, ...], str] = {}
    n_struck = 0
    for _ in range(n):
        call = choose.choice(calls)
        try:
            signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-5, 0.02))
            call()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            n_struck += 1
        tokens = session.tokens.tolist()
        if tuple(tokens) not in known:
            oracle.rollback(0)
            oracle.prefill(tokens)
            known[tuple(tokens)] = oracle.digest()
        assert session.digest() == known[tuple(tokens)]
        assert session.tokens.tolist() == tokens
        engine.capsules.check_integrity()
        for capsule in engine.capsules.capsules - {low, high}:
            capsule.drop()  # made, but not handed over
        session.fork().close()  # a lane is free
    assert n_struck > n / 10
    engine.close()


@pytest.fixture(autouse=True)
def alarms_are_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
