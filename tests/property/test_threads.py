"""Promise: threads take turns. What a session or a loop computes in one of eight threads is what it
computes alone, to the bit, with others on the same engine and with engines beside it.

The interpreter switches threads every microsecond here, 5,000 times as often as it usually does,
and between lines of flashrt's own at random. Red before: wrong digests, "Set changed size",
spurious PoolFull, a pool that no longer tiles.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on

GOLDEN = Path(__file__).parents[1] / "golden"
PACKAGE = Path(flashrt.__file__).parent
ROOMS = tuple(f"{PACKAGE / room}" for room in ("capsule", "core", "engine", "session", "robot"))
THREADS = 8
YIELDS = 0.05  # of the lines of these rooms
PARAMS: tuple[dict[str, Any], ...] = (
    {}, {"temperature": 1.0, "seed": 7}, {"repetition_penalty": 1.3, "logit_bias": {5: 4.0}},
)  # fmt: skip
Trace = list[tuple[str, str]]


@pytest.fixture
def impatient() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def load(lanes: int = 2 * THREADS) -> flashrt.Engine:
    return flashrt.load(
        GOLDEN / "tiny", device="cpu", max_positions=320, lanes=lanes, pool_bytes=48 << 20
    )


def history(engine: flashrt.Engine, common: flashrt.Capsule, seed: int, n_steps: int) -> Trace:
    """A history that depends on the seed alone: each step, and the digest after it."""
    rng, trace = random.Random(seed), []
    capsules = [common]
    session = engine.session()
    session.restore(common)
    for _ in range(n_steps):
        verb = rng.choice(
            ("prefill", "generate", "snapshot", "restore", "rollback", "fork", "drop")
        )
        if session.position > 240:
            verb = "restore"
        if verb == "prefill":
            session.prefill([rng.randrange(500) for _ in range(rng.randint(1, 12))])
        elif verb == "generate":
            list(session.generate(rng.randint(1, 3), **rng.choice(PARAMS)))
        elif verb == "snapshot":
            capsules.append(session.snapshot())
        elif verb == "restore":
            session.restore(rng.choice(capsules))
        elif verb == "rollback":
            session.rollback(rng.randint(1, session.position))
        elif verb == "fork":
            other = session.fork(rng.choice([None, rng.choice(capsules)]))
            session.close()
            session = other
        elif len(capsules) > 1:
            capsules.pop(rng.randrange(1, len(capsules))).drop()
        trace.append((verb, session.digest()))
    session.close()
    for capsule in capsules[1:]:
        capsule.drop()
    return trace


def at_once(calls: list[Callable[[], Any]], yields: float = YIELDS) -> list[Any]:
    """Each in a thread of its own, all of them at the same time."""
    begin = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        begin.wait()
        rng = random.Random(threading.get_ident())

        def at_line(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line" and rng.random() < yields:
                time.sleep(1e-5)  # others go on here, unless they wait for a lock
            return at_line

        def enter(frame: FrameType, event: str, argument: Any) -> Any:
            return at_line if frame.f_code.co_filename.startswith(ROOMS) else None

        if yields:
            sys.settrace(enter)
        try:
            return call()
        finally:
            sys.settrace(None)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def common_capsule(engine: flashrt.Engine) -> flashrt.Capsule:
    with engine.session() as session:
        session.prefill([3 * i % 500 for i in range(50)])
        return session.snapshot()


def assert_pool_is_empty(engine: flashrt.Engine) -> None:
    pool = engine.capsules.pool
    assert pool.blocks == [] and pool.gaps == [(pool.offset, pool.nbytes)], (
        "all of it, in one piece"
    )
    assert len(engine.free_lanes) == len(engine.lanes)


def test_eight_threads_compute_what_one_does(impatient: None) -> None:
    """Sessions of one engine that share a capsule, and those of another engine beside it."""
    run_rounds(n_rounds=2, n_steps=24)


@pytest.mark.slow
def test_eight_threads_for_long(impatient: None, request: pytest.FixtureRequest) -> None:
    """The same for `--seconds`."""
    run_rounds(seconds=request.config.getoption("--seconds"), n_steps=40)


def run_rounds(n_steps: int, n_rounds: int = 1_000_000, seconds: float = 1e9) -> None:
    alone, engines = load(), [load(), load(lanes=4)]
    before = common_capsule(alone)
    commons = [common_capsule(engine) for engine in engines]
    end = time.monotonic() + seconds
    for round_ in range(n_rounds):
        seeds = [THREADS * round_ + i for i in range(THREADS)]
        expected = [history(alone, before, seed, n_steps) for seed in seeds]
        homes = [1 if i >= THREADS - 2 else 0 for i in range(THREADS)]  # two on the other engine
        found = at_once(
            [
                lambda seed=seed, home=home: history(engines[home], commons[home], seed, n_steps)
                for seed, home in zip(seeds, homes, strict=True)
            ]
        )
        assert found == expected
        if time.monotonic() > end:
            break
    for engine, common in zip((alone, *engines), (before, *commons), strict=True):
        common.drop()
        assert_pool_is_empty(engine)
        engine.close()


def control(engine: Any, seed: int) -> tuple[bytes, str]:
    """Ticks, a capsule, a rewind and ticks again: actions and the digest after them."""
    loop = flashrt.ControlLoop(engine, seed=seed)
    size, rng = engine.config.observation_dim, np.random.default_rng(seed)
    actions = [loop.tick(rng.standard_normal(size)) for _ in range(12)]
    capsule = loop.snapshot()
    actions += [loop.tick(rng.standard_normal(size)) for _ in range(9)]
    loop.restore(capsule)
    actions += [loop.tick(rng.standard_normal(size)) for _ in range(9)]
    found = np.stack(actions).tobytes(), loop.digest()
    loop.close()
    capsule.drop()
    return found


def test_loops_in_threads_act_as_they_do_alone(impatient: None) -> None:
    """Replays of a policy run on the thread that asks for them: they share one scratch too."""
    engines = [flashrt.load_policy("pendulum", device="cpu", lanes=THREADS) for _ in range(2)]
    expected = [control(engines[0], seed) for seed in range(THREADS)]
    calls = [lambda seed=seed: control(engines[seed % 2], seed) for seed in range(THREADS)]
    for i in range(22):  # kernels meet where lines of Python are quick, books where they are not
        assert at_once(calls, YIELDS if i < 2 else 0.0) == expected
    for engine in engines:
        engine.close()


def test_simt_devices_in_threads(impatient: None) -> None:
    """Two devices run the same libraries, and those keep fibers in static variables. Red before:
    rings, tables and fibers of two threads at once.
    """

    def load_simt() -> Any:
        return load_on(SimtDevice, GOLDEN / "tiny", max_positions=64, lanes=2, draft=False)

    def prefill(engine: Any, seed: int) -> str:
        with engine.session() as session:
            session.prefill([seed * i % 500 for i in range(9)])
            capsule = session.snapshot()
            list(session.generate(1))
            session.restore(capsule)
            capsule.drop()
            return str(session.digest())

    engines = [load_simt(), load_simt()]
    expected = [prefill(engines[0], seed) for seed in range(4)]
    found = at_once([lambda seed=seed: prefill(engines[seed % 2], seed) for seed in range(4)])
    assert found == expected
    for engine in engines:
        engine.close()


@pytest.mark.slow
def test_closing_an_engine_under_a_running_kernel_is_no_crash(impatient: None) -> None:
    """Red before: the memory went while another thread's kernel worked on it."""
    for _ in range(5):
        engine = load(lanes=4)
        sessions = [engine.session() for _ in range(4)]
        caught: list[str] = []

        def serve(session: flashrt.Session, caught: list[str] = caught) -> None:
            try:
                while True:
                    session.prefill([1] * 60)
                    session.rollback(0)
            except flashrt.FlashrtError as error:
                caught.append(str(error))

        threads = [threading.Thread(target=serve, args=(session,)) for session in sessions]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        engine.close()
        for thread in threads:
            thread.join()
        assert len(caught) == 4 and all("closed" in text for text in caught)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_goes_on_with_its_session() -> None:
    """Red before: it waited for the turn of a thread that only its parent has."""
    engine = load(lanes=3)
    mine, theirs = engine.session(), engine.session()
    mine.prefill([1, 2, 3])
    has_turn, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with theirs.lock, engine.turn.lock:
            has_turn.set()
            is_over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    has_turn.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        status = 1
        try:
            mine.prefill([4, 5])
            alone = theirs.fork()
            alone.prefill([1, 2, 3, 4, 5])
            status = 0 if alone.digest() == mine.digest() else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    is_over.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    mine.prefill([4, 5])
    engine.close()
