"""Closed sessions and engines: what they show, what they refuse, and what they give back.

Red when a closed session shows what its lane's next user says, when a closed engine hands out
sessions, or when it keeps its memory.
"""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest

import flashrt
from flashrt.base.errors import BackendError

GOLDEN = Path(__file__).parents[1] / "golden"


def load(**options: int) -> flashrt.Engine:
    return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=400, **options)  # type: ignore[arg-type]


def test_a_closed_session_keeps_its_own_tokens(engine: flashrt.Engine) -> None:
    session = engine.session()
    session.prefill([1, 2, 3])
    reply = list(session.generate(2))
    session.close()
    with engine.session() as other:
        assert other.lane is session.lane
        other.prefill([7] * 20)
        assert session.tokens.tolist() == [1, 2, 3, *reply]
        assert session.position == 5
        session.close()
        assert other.position == 20


def test_a_closed_engine_refuses(tmp_path: Path) -> None:
    with load(lanes=2) as engine:
        session = engine.session()
        session.prefill(range(20))
        capsule = session.snapshot()
        stream = session.generate(5)
        next(stream)
    engine.close()
    with pytest.raises(flashrt.SessionError, match="engine is closed"):
        engine.session()
    for call in (session.digest, session.snapshot, session.fork, lambda: session.prefill([1])):
        with pytest.raises(flashrt.SessionError, match="engine is closed"):
            call()
    with pytest.raises(flashrt.SessionError, match="engine is closed"):
        next(stream)
    with pytest.raises(flashrt.CapsuleError, match="engine is closed"):
        capsule.save(tmp_path / "a.capsule")
    with pytest.raises(BackendError, match="engine is closed"):
        engine.lane_array(session.lane, "state")
    assert capsule.is_dropped
    capsule.drop()
    session.close()


def test_a_closed_engine_gives_its_memory_back() -> None:
    """Private memory of this process: an engine with a pool of 96 MiB, all of it written."""

    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / (1 << 20)

    load().close()  # kernels and threads stay
    gc.collect()
    before = resident_mib()
    engine = load(pool_bytes=96 << 20)
    session = engine.session()
    session.prefill(range(300))
    grown = resident_mib() - before
    assert grown > 90
    engine.close()
    gc.collect()
    assert resident_mib() - before < grown / 10
    assert session.position == 300  # somebody still refers to it all
