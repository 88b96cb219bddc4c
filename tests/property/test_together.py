"""Promise: lanes that share replays have the tokens, logits and state of each alone, whoever they
share with; and what goes wrong in one stays there.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

import flashrt
from flashrt.backends.simt.device import SimtDevice
from flashrt.core import graph as graphs
from flashrt.core.runs import Run, RunsWord, table_of
from flashrt.load import load_on
from flashrt.models.model import STEP_ROWS
from flashrt.ops.sample import SamplerParams
from flashrt.session.together import Feed, step
from tests.property.guessing import (
    cold,
    guessing,
    guessing_each,
    interrupting,
    outcome,
    truth,
)
from tests.property.test_machine import GOLDEN, LIMIT, PARAMS, Histories

LANES = 9  # the last one is the oracle's
PROMPTS = ([1, 2, 3], list(range(20, 90)), [4], [99, 98], [7] * 33, [100, 3], [17, 18, 19], [5])
LENGTHS = (20, 31, 5, 40, 12, 7, 33, 1)


@pytest.fixture(scope="module")
def engine() -> Iterator[flashrt.Engine]:
    with flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=LIMIT, lanes=LANES) as made:
        yield made


def collect(stream: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Tokens by index."""
    found: dict[int, list[int]] = defaultdict(list)
    for index, token in stream:
        found[index].append(token)
    return found


def options(index: int) -> dict[str, Any]:
    return PARAMS[index % len(PARAMS)]


def opened(engine: flashrt.Engine, prompts: Sequence[list[int]] = PROMPTS) -> list[flashrt.Session]:
    sessions = []
    for prompt in prompts:
        sessions.append(engine.session())
        sessions[-1].prefill(prompt)
    return sessions


class Groups(Histories):
    """The random histories, with generations of random groups of sessions side by side."""

    engine = None

    @staticmethod
    def load() -> flashrt.Engine:
        return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=LIMIT, lanes=LANES)

    @rule(
        group=st.lists(Histories.sessions, min_size=2, max_size=8, unique_by=id),
        lengths=st.lists(st.integers(1, 12), min_size=8, max_size=8),
        params=st.lists(st.sampled_from(PARAMS), min_size=8, max_size=8),
        drafts=st.lists(st.sampled_from([0, 0, 1, 3, 8, "auto"]), min_size=8, max_size=8),
        agree=st.sampled_from([0.0, 0.7, 1.0]),
        taken=st.integers(0, 60),
    )
    def together(
        self,
        group: list[flashrt.Session],
        lengths: list[int],
        params: list[dict[str, Any]],
        drafts: list[Any],
        agree: float,
        taken: int,
    ) -> None:
        """The tokens of each alone, up to where the caller stops; some draft, some do not."""
        chosen = [
            (session, n, options)
            for session, n, options in zip(group, lengths, params, strict=False)
            if self.live(session) and self.history[session] and n <= self.free(session)
        ]
        ahead = [truth(self.engine, self.history[s], n + 8, **options) for s, n, options in chosen]
        wanted = [tokens[:n] for tokens, (_, n, _) in zip(ahead, chosen, strict=True)]
        streams = [
            session.generate(n, draft=d, **options)
            for (session, n, options), d in zip(chosen, drafts, strict=False)
        ]
        known = {
            session.lane.index: self.history[session] + tokens
            for (session, *_), tokens in zip(chosen, ahead, strict=True)
        }
        with guessing_each(self.engine, known, agree):
            got = collect(itertools.islice(flashrt.together(*streams), taken))
        for i, (session, *_) in enumerate(chosen):
            streams[i].close()
            assert got[i] == wanted[i][: len(got[i])]
            self.history[session] += got[i]
        assert sum(map(len, got.values())) == min(taken, sum(map(len, wanted)))

    @rule(
        group=st.lists(Histories.sessions, min_size=1, max_size=8, unique_by=id),
        tokens=st.lists(st.integers(0, 511), min_size=8, max_size=56),
        n_feeds=st.integers(1, 4),
        params=st.sampled_from(PARAMS),
        draft=st.sampled_from([0, 3]),
    )
    def mix(
        self,
        group: list[flashrt.Session],
        tokens: list[int],
        n_feeds: int,
        params: dict[str, Any],
        draft: int,
    ) -> None:
        """Pieces of prompts for some, the next two tokens of others, in two steps."""
        live = [s for s in group if self.live(s) and self.free(s) > 70]
        fed, others = live[:n_feeds], [s for s in live[n_feeds:] if self.history[s]]
        if not fed:
            return
        wanted = [truth(self.engine, self.history[s], 2, **params) for s in others]
        streams = [s.generate(2, draft=draft, **params) for s in others]
        share = len(tokens) // len(fed)
        for i in range(2):
            feeds = [
                Feed(s, np.array(tokens[j * share : j * share + max(1, share - i)], np.int32))
                for j, s in enumerate(fed)
            ]
            last = SamplerParams(temperature=0.9, seed=3)
            step(streams, [Feed(f.session, f.tokens, last if i else None) for f in feeds])
            for feed in feeds:
                self.history[feed.session] += feed.tokens.tolist()
            before = self.engine.stats()["replays"]
            for s, stream, following in zip(others, streams, wanted, strict=True):
                assert next(stream) == following[i]
                self.history[s].append(following[i])
            assert self.engine.stats()["replays"] == before
        for s in fed:
            following = truth(self.engine, self.history[s], 1, temperature=0.9, seed=3)
            before = self.engine.stats()["replays"]
            assert list(s.generate(1, temperature=0.9, seed=3)) == following
            assert self.engine.stats()["replays"] == before
            self.history[s] += following


QUICK = settings(
    max_examples=15, stateful_step_count=25, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_groups_of_lanes_are_each_lane_alone() -> None:
    """Fault: a row, a cursor, a sampler or a state of one lane gets into another's."""
    run_state_machine_as_test(Groups, settings=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_groups_on_the_cuda_kernels(seed: int) -> None:
    """The same on the raw CUDA kernels, under random schedules."""

    class SimtGroups(Groups):
        engine = None
        folder = tempfile.TemporaryDirectory(prefix="flashrt-test-store-")

        @staticmethod
        def load() -> flashrt.Engine:
            return load_on(
                lambda: SimtDevice("bfloat16", seed=seed), GOLDEN / "tiny",
                max_positions=LIMIT, lanes=5,
            )  # fmt: skip

    few = settings(QUICK, max_examples=3, stateful_step_count=12)
    run_state_machine_as_test(SimtGroups, settings=few)


@pytest.mark.parametrize(
    ("name", "kv_dtype"), [("tiny", "int8"), ("tiny", "float32"), ("tiny-untied-odd", "bfloat16")]
)
def test_eight_generations_in_as_many_replays_as_the_longest(name: str, kv_dtype: Any) -> None:
    """Fault: a dtype of keys, an odd shape or an untied head does not move with its lane; or each
    lane has replays of its own.
    """
    with flashrt.load(GOLDEN / name, device="cpu", lanes=LANES, kv_dtype=kv_dtype) as engine:
        alone = [
            (truth(engine, p, n, **options(i)), n)
            for i, (p, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True))
        ]
        sessions = opened(engine)
        before = engine.stats()["replays"]
        streams = [
            s.generate(n, **options(i))
            for i, (s, n) in enumerate(zip(sessions, LENGTHS, strict=True))
        ]
        got = collect(flashrt.together(*streams))
        replays = engine.stats()["replays"] - before
        assert [got[i] for i in range(8)] == [tokens for tokens, _ in alone]
        assert [stream.reason for stream in streams] == ["length"] * 8
        assert replays == max(LENGTHS)  # one for all, from the first token on
        for session, prompt, (tokens, _) in zip(sessions, PROMPTS, alone, strict=True):
            assert outcome(session) == cold(engine, prompt + tokens)
        engine.arena.check_guards()


def test_a_token_that_was_sampled_otherwise_is_no_replay_of_its_own(engine: flashrt.Engine) -> None:
    """Fault: a lane that knows a token of other parameters stays out of the shared replay."""
    sessions = opened(engine, PROMPTS[:2])
    sessions[0].logits()  # it samples a token ahead, with the default parameters
    streams = [s.generate(2, temperature=1.0, seed=7) for s in sessions]
    step(streams, [])
    before = engine.stats()["replays"]
    got = [next(stream) for stream in streams]
    assert engine.stats()["replays"] == before
    assert got == [truth(engine, p, 1, temperature=1.0, seed=7)[0] for p in PROMPTS[:2]]
    for session in sessions:
        session.close()


def test_swapped_lanes_are_noticed(engine: flashrt.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a table whose first two runs have each other's lane."""

    def swapped(runs: tuple[Run, ...]) -> bytes:
        words = np.frombuffer(table_of(runs), np.int32).copy()
        if len(runs) > 1:
            first, second = RunsWord.FIRST, RunsWord.FIRST + 4
            words[[first, second]] = words[[second, first]]
            words[[first + 2, second + 2]] = words[[second + 2, first + 2]]
        return words.tobytes()

    def one_lane_moved(runs: tuple[Run, ...]) -> bytes:
        words = np.frombuffer(table_of(runs), np.int32).copy()
        if len(runs) > 1:
            words[RunsWord.FIRST] = words[RunsWord.FIRST + 4]
        return words.tobytes()

    wanted = [truth(engine, p, 6) for p in PROMPTS[:2]]
    for plant, is_right in ((table_of, True), (swapped, True), (one_lane_moved, False)):
        monkeypatch.setattr(graphs, "table_of", plant)
        first, second = opened(engine, PROMPTS[:2])
        got = collect(flashrt.together(first.generate(6), second.generate(6)))
        # runs may stand in any order, as long as each is one lane's
        assert ([got[0], got[1]] == wanted) is is_right, plant
        first.close()
        second.close()
    monkeypatch.undo()
    sessions = opened(engine, PROMPTS[:2])
    streams = [session.generate(6) for session in sessions]
    stream = flashrt.together(*streams)
    for _ in range(2):
        next(stream)
    cursors = [engine.lane_array(session.lane, "cursor") for session in sessions]
    for session, cursor in zip(sessions, reversed(cursors), strict=True):
        engine.set_lane_array(session.lane, "cursor", cursor)
    got = collect(stream)
    assert got[0] != wanted[0][1:] and got[1] != wanted[1][1:]
    for session in sessions:
        session.close()


def test_nan_in_one_lane_ends_that_one_alone(engine: flashrt.Engine) -> None:
    """Fault: a poisoned row or state reaches a neighbour, or ends the whole group."""
    prompts = PROMPTS[:4]
    wanted = [truth(engine, p, 8) for p in prompts]
    for region in ("state", "keys", "window"):
        sessions = opened(engine, prompts)
        streams = [s.generate(8) for s in sessions]
        stream = flashrt.together(*streams)
        got = collect(itertools.islice(stream, 8))  # two of each
        poison = engine.lane_array(sessions[1].lane, region)
        poison.view(np.uint8)[:] = 0xFF
        engine.set_lane_array(sessions[1].lane, region, poison)
        with pytest.raises(flashrt.SessionError, match="NaN") as caught:
            for index, token in stream:
                got[index].append(token)
        assert "generation 1" in caught.value.__notes__[0]
        for i in (0, 2, 3):
            assert got[i] == wanted[i]
            assert outcome(sessions[i]) == cold(engine, prompts[i] + wanted[i])
        assert got[1] == wanted[1][: len(got[1])] and len(got[1]) < 8
        for session in sessions:
            session.close()


def test_a_full_lane_and_a_stop_token_end_their_own(engine: flashrt.Engine) -> None:
    """Fault: the end of one is the end of all, or it decodes on."""
    full = list(range(LIMIT - 3))
    following = truth(engine, [4], 9)
    stop = next(t for t in following if t != following[0])
    sessions = opened(engine, (full, [4], [9, 9]))
    streams = [
        sessions[0].generate(50), sessions[1].generate(9, stop=[stop]), sessions[2].generate(12),
    ]  # fmt: skip
    got = collect(flashrt.together(*streams))
    assert [s.reason for s in streams] == ["context", "stop", "length"]
    assert len(got[0]) == 3 and got[1] == following[: following.index(stop)] and len(got[2]) == 12
    for session in sessions:
        assert outcome(session) == cold(engine, session.tokens.tolist())
        session.close()


@pytest.mark.parametrize("is_done", [False, True])
def test_an_interrupt_leaves_what_was_yielded(engine: flashrt.Engine, is_done: bool) -> None:
    """Fault: Ctrl-C before a shared replay, or between it and the books, leaves some of its lanes
    ahead of, or behind, what their callers have.
    """
    for after in range(3, 9):
        sessions = opened(engine, PROMPTS[:3])
        got: dict[int, list[int]] = defaultdict(list)
        streams = [session.generate(12, **options(i)) for i, session in enumerate(sessions)]
        with interrupting(engine, after, is_done), pytest.raises(KeyboardInterrupt):
            for index, token in flashrt.together(*streams):
                got[index].append(token)
        for i, session in enumerate(sessions):
            assert session.tokens.tolist() == PROMPTS[i] + got[i]
            assert outcome(session) == cold(engine, PROMPTS[i] + got[i])
            following = truth(engine, PROMPTS[i], 12, **options(i))
            assert list(session.generate(4, **options(i))) == following[len(got[i]) :][:4]
            session.close()


def test_what_cannot_go_together_is_refused(engine: flashrt.Engine) -> None:
    (session,) = opened(engine, PROMPTS[:1])
    with pytest.raises(flashrt.SessionError, match="named twice"):
        flashrt.together(session.generate(1), session.generate(1))
    with flashrt.load(GOLDEN / "tiny", device="cpu") as other:
        (elsewhere,) = opened(other, PROMPTS[:1])
        with pytest.raises(flashrt.SessionError, match="several engines"):
            flashrt.together(session.generate(1), elsewhere.generate(1))
    stream = session.generate(1)
    session.close()
    with pytest.raises(flashrt.SessionError, match="closed"):
        flashrt.together(stream)
    assert list(flashrt.together()) == []


def test_forks_by_number(engine: flashrt.Engine) -> None:
    """Fault: some lanes stay taken when there are too few."""
    (session,) = opened(engine, PROMPTS[1:2])
    forks = session.fork(3)
    state = session.digest()
    assert [fork.digest() for fork in forks] == [state] * 3
    free = len(engine.free_lanes)
    with pytest.raises(flashrt.LaneBusy):
        session.fork(free + 1)
    assert len(engine.free_lanes) == free
    with pytest.raises(flashrt.SessionError, match="negative"):
        session.fork(-1)
    for one in (session, *forks):
        one.close()


def test_steps_of_prompts_and_tokens(engine: flashrt.Engine) -> None:
    """Fault: rows of one run are taken for another's, where some lanes prefill and some decode."""
    rng = np.random.default_rng(11)
    sessions = [engine.session() for _ in range(5)]
    texts = [rng.integers(0, engine.vocab_size, n).astype(np.int32) for n in (100, 37, 80, 64, 5)]
    at, sampled = [0] * 5, [list[int]() for _ in range(5)]
    fed: list[list[int]] = [[] for _ in range(5)]
    for i, session in enumerate(sessions):
        engine.set_sampler(session.lane, SamplerParams(temperature=1.0, seed=i))
    while min(map(len, sampled)) < 4:
        runs, room = [], STEP_ROWS
        for i in rng.permutation(5)[: rng.integers(1, 6)]:
            text = texts[i][at[i] : at[i] + min(int(rng.integers(1, 40)), room)]
            if at[i] == len(texts[i]):
                text = np.array(sampled[i][-1:], np.int32)[:room]
            if len(text):
                room -= len(text)
                runs.append((i, text))
        for (i, text), token in zip(
            runs, engine.step([(sessions[i].lane, text) for i, text in runs]), strict=True
        ):
            at[i] = min(at[i] + len(text), len(texts[i]))
            fed[i] += text.tolist()
            if at[i] == len(texts[i]):
                sampled[i].append(token)
    for i, session in enumerate(sessions):
        with engine.session() as alone:
            alone.prefill(texts[i])
            assert list(alone.generate(len(sampled[i]), temperature=1.0, seed=i)) == sampled[i]
        assert session.digest() == cold(engine, fed[i])[1]
        session.close()
    engine.arena.check_guards()


def test_a_step_refuses_what_does_not_fit(engine: flashrt.Engine) -> None:
    """Fault: rows beyond the graph's, or beyond a lane's end, are written."""
    session, other = opened(engine, PROMPTS[:2])
    many = np.zeros(STEP_ROWS, np.int32)
    before = [session.digest(), other.digest()]
    for runs in (
        [], [(session.lane, many), (other.lane, many[:1])], [(session.lane, many[:1])] * 2,
        [(session.lane, many[:0])],
    ):  # fmt: skip
        with pytest.raises(flashrt.SessionError, match="step"):
            engine.step(runs)
    other.prefill([1] * (LIMIT - 5 - other.position))
    with pytest.raises(flashrt.SessionError, match="max_positions"):
        engine.step([(session.lane, many[:2]), (other.lane, many[:6])])
    assert session.digest() == before[0]
    session.close()
    other.close()


@pytest.mark.slow
def test_a_thousand_steps_allocate_and_capture_nothing() -> None:
    """Fault: a group of another size is captured when it first comes; graphs grow with lanes."""
    with (
        flashrt.load(GOLDEN / "tiny", device="cpu", lanes=8, max_positions=1100) as engine,
        flashrt.load(GOLDEN / "tiny", device="cpu", lanes=16, max_positions=1100) as wide,
    ):
        assert wide.stats()["graphs"] == engine.stats()["graphs"] + 1  # together, of 16
        for band in ("fixed_bytes", "rows_bytes"):
            assert wide.stats()[band] == engine.stats()[band]
        sessions = opened(engine)
        before = engine.stats()
        streams = [s.generate(1000, temperature=1.0, seed=i) for i, s in enumerate(sessions)]
        assert sum(1 for _ in flashrt.together(*streams)) == 8000
        after = engine.stats()
        assert after["replays"] - before["replays"] == 1000
        for counter in ("allocations", "compilations", "captures"):
            assert after[counter] == before[counter]


def test_groups_in_threads(engine: flashrt.Engine) -> None:
    """Fault: two groups' tables get mixed, or two threads wait for each other's sessions."""
    wanted = [truth(engine, p, 25, **options(i)) for i, p in enumerate(PROMPTS)]
    sessions = opened(engine)
    found: dict[int, list[int]] = {}

    def run(indices: Sequence[int]) -> None:
        streams = [sessions[i].generate(25, **options(i)) for i in indices]
        for at, tokens in collect(flashrt.together(*streams)).items():
            found[indices[at]] = tokens

    threads = [
        threading.Thread(target=run, args=(part,)) for part in ((0, 5, 2), (7, 1, 3), (6, 4))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(8)] == wanted
    for session in sessions:
        session.close()


def test_a_step_on_a_sessions_lane_voids_what_it_knew_ahead(engine: flashrt.Engine) -> None:
    """Red: after a draft that agreed, tokens of the way not taken were yielded as the next ones."""
    (session,) = opened(engine, PROMPTS[1:2])
    following = truth(engine, PROMPTS[1], 8)
    with guessing(engine, PROMPTS[1], following, 1.0):
        stream = session.generate(8, draft=6)
        got = [next(stream), next(stream)]  # and four more are known
        stream.close()
    other = (following[2] + 1) % engine.vocab_size
    pending = session.tokens[session.lane.position :]
    assert pending.tolist() == got
    engine.step([(session.lane, np.append(pending, np.int32(other)))])
    history = session.tokens.tolist()
    assert history == [*PROMPTS[1], *got, other]
    assert list(session.generate(3)) == truth(engine, history, 3)
    session.close()
