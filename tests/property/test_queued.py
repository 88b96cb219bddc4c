"""Decodes that are queued before the host knows their token: a token earlier, the same history.

IS: sessions on the simt device, whose streams are lazy as a GPU's are, against the same ones that
wait for every token. IS NOT: the rest of what sessions do ahead (test_simt_machine has all of it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.load import load_on
from flashrt.ops.cursor import CursorWord

TINY = Path(__file__).parents[1] / "golden" / "tiny"
PROMPT = [(i * 37 + 11) % 512 for i in range(20)]


class Waiting(SimtDevice):
    """Every token is waited for."""

    is_async = False


def load(device: SimtDevice) -> flashrt.Engine:
    return load_on(lambda: device, TINY, max_positions=64, lanes=1, draft=False)


@pytest.fixture(scope="module")
def engine() -> Iterator[flashrt.Engine]:
    engine = load(SimtDevice())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def waiting() -> Iterator[flashrt.Engine]:
    engine = load(Waiting())
    yield engine
    engine.close()


def begun(engine: flashrt.Engine) -> flashrt.Session:
    session = engine.session()
    session.prefill(PROMPT)
    return session


def fed_on_device(session: flashrt.Session) -> int:
    return session.engine._read_cursor(session.lane, CursorWord.POSITION)


def test_the_next_decode_is_queued_before_a_token_is_known(
    engine: flashrt.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the device stands still while the host waits."""
    said: list[str] = []
    device = engine.backend
    replay, read = device.replay, device.begin_read_word

    def noted(address: int) -> Callable[[], int]:
        wait = read(address)
        return lambda: (said.append("wait"), wait())[1]

    with begun(engine) as session:
        monkeypatch.setattr(device, "replay", lambda *a: (said.append("replay"), replay(*a))[1])
        monkeypatch.setattr(device, "begin_read_word", noted)
        assert len(list(session.generate(4))) == 4
        # sample; then a decode before each wait, but for the last token that was asked for
        assert said == ["replay", *["replay", "wait"] * 3, "wait"]


Turn = tuple[str, int, int]  # what to do, how many tokens, a seed
TURNS = st.lists(
    st.tuples(
        st.sampled_from(("reply", "stopped", "left", "logprobs", "prefill", "rollback", "again")),
        st.integers(1, 5),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=6,
)


def told(session: flashrt.Session, turns: list[Turn]) -> list[object]:
    """All that a caller sees of these turns."""
    seen: list[object] = []
    start = session.snapshot()
    for what, n, seed in turns:
        if session.position + n + 1 >= 64:
            break
        stream = session.generate(n + 1, temperature=0.9, seed=seed)
        if what == "reply":
            seen += [*stream, stream.reason]
        elif what == "stopped":  # at the n-th token that would have come
            before = session.position
            stops = {list(stream)[n]}
            session.rollback(before)
            stream = session.generate(40, temperature=0.9, seed=seed, stop=stops)
            for _ in range(n + 1):
                seen.append(next(stream, None))
            seen += [stream.reason, session.position]
        elif what == "left":
            seen.append(next(stream))
            stream.close()
        elif what == "logprobs":
            for token in stream:
                seen += [token, session.logprobs(2)]
        elif what == "prefill":
            session.prefill(range(n))
        elif what == "rollback":
            session.rollback(session.position - min(n, session.position - 1))
        else:
            session.restore(start)
        seen.append(session.tokens.tolist())
        if seed == 1:
            seen += [session.digest(), session.logits().tobytes()]
    start.drop()
    return [*seen, session.digest()]


@given(TURNS)
@settings(max_examples=15, deadline=None)
def test_a_caller_sees_the_same(
    engine: flashrt.Engine, waiting: flashrt.Engine, turns: list[Turn]
) -> None:
    """Red when a token counts before it was yielded, when one that stops is fed, when logits are
    those of the token after, and when something queued is forgotten by what follows.
    """
    with begun(engine) as session, begun(waiting) as other:
        assert told(session, turns) == told(other, turns)


def test_a_stop_is_not_fed(engine: flashrt.Engine) -> None:
    """Red without op `hold`, or with the stops of another reply in place."""
    with begun(engine) as session:
        reply = list(session.generate(6, temperature=0.9, seed=7))
        for n in (1, 4):
            session.rollback(len(PROMPT))
            stop = [reply[n]]
            first = reply.index(reply[n])
            assert list(session.generate(6, temperature=0.9, seed=7, stop=stop)) == reply[:first]
            assert session.position == fed_on_device(session) == len(PROMPT) + first


def test_no_token_is_not_fed(engine: flashrt.Engine) -> None:
    """Logits of NaN end a reply; the state is as before them."""
    with begun(engine) as session:
        region = engine.arena.lane(session.lane.index).fixed.slot("last_hidden")
        kept = engine.arena.read(region)
        engine.arena.write(region, np.full_like(kept, 0x7FC0))
        with pytest.raises(flashrt.SessionError, match="NaN"):
            list(session.generate(5))
        assert session.position == fed_on_device(session) == len(PROMPT)
        engine.arena.write(region, kept)
        assert len(list(session.generate(2, temperature=0.5))) == 2


@pytest.mark.parametrize("at", [0, 1, 3])
def test_ctrl_c_while_it_waits_leaves_what_was_yielded(
    engine: flashrt.Engine, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Red when the token that nobody got is history, though the device has fed it."""
    with begun(engine) as session:
        want = list(session.generate(6, temperature=0.9, seed=3))
        digest = session.digest()
        session.rollback(len(PROMPT))
        read, n = engine.backend.begin_read_word, iter(range(99))

        def interrupted(address: int) -> Callable[[], int]:
            wait, is_struck = read(address), next(n) == at

            def struck() -> int:
                if is_struck:
                    raise KeyboardInterrupt
                return wait()

            return struck

        got = []
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine.backend, "begin_read_word", interrupted)
            for token in session.generate(6, temperature=0.9, seed=3):
                got.append(token)
        assert got == want[:at]
        assert session.tokens.tolist() == [*PROMPT, *got]
        assert list(session.generate(6 - at, temperature=0.9, seed=3)) == want[at:]
        assert session.digest() == digest
