"""Random histories over several lanes against an oracle that replays each on an empty lane."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

import flashrt
from flashrt.store.store import Store
from tests.property.guessing import guessing, interrupting, truth

GOLDEN = Path(__file__).parents[1] / "golden"
LANES = 4  # the last one is the oracle's
LIMIT = 360
TOKENS = st.lists(st.integers(0, 511), min_size=1, max_size=90)
PARAMS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1 << 40},
    {"repetition_penalty": 1.3, "logit_bias": {5: 4.0, 9: -np.inf}},
    {"temperature": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3, "min_p": 0.01},
)


class Histories(RuleBasedStateMachine):
    """Each session's tokens are tracked by a list; its state must be that of a cold prefill."""

    engine: Any = None
    folder = tempfile.TemporaryDirectory(prefix="flashrt-test-store-")
    sessions: Bundle[Any] = Bundle("sessions")
    capsules: Bundle[Any] = Bundle("capsules")

    @staticmethod
    def load() -> flashrt.Engine:
        """The engine of all runs."""
        return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=LIMIT, lanes=LANES)

    @initialize(target=sessions)
    def start(self) -> flashrt.Session:
        kind = type(self)
        if kind.engine is None:
            kind.engine = kind.load()
        self.store = Store(self.folder.name)
        self.history: dict[flashrt.Session, list[int]] = {}
        self.frozen: dict[flashrt.Capsule, list[int]] = {}
        first = self.engine.session()
        self.history[first] = []
        return first

    def free(self, session: flashrt.Session) -> int:
        return LIMIT - len(self.history[session])

    def live(self, session: flashrt.Session) -> bool:
        return session in self.history

    @rule(session=sessions, tokens=TOKENS)
    def prefill(self, session: flashrt.Session, tokens: list[int]) -> None:
        if self.live(session) and len(tokens) <= self.free(session):
            session.prefill(tokens)
            self.history[session] += tokens

    @rule(
        session=sessions,
        n=st.integers(1, 12),
        taken=st.integers(0, 12),
        params=st.sampled_from(PARAMS),
        draft=st.one_of(st.just(0), st.integers(1, 8), st.just("auto")),
        agree=st.sampled_from([0.0, 0.6, 0.9, 1.0]),
    )
    def generate(
        self,
        session: flashrt.Session,
        n: int,
        taken: int,
        params: dict[str, Any],
        draft: Any,
        agree: float,
    ) -> None:
        """Drafted or not, closed early or not: the tokens of plain decoding."""
        if not self.live(session) or not self.history[session] or n > self.free(session):
            return
        history = self.history[session]
        following = truth(self.engine, history, n + 8, **params)
        with guessing(self.engine, history, following, agree):
            stream = session.generate(n, draft=draft, **params)
            got = [token for _, token in zip(range(taken), stream, strict=False)]
            stream.close()
        assert got == following[: min(n, taken)]
        history += got

    @rule(
        session=sessions,
        after=st.integers(0, 12),
        is_done=st.booleans(),
        draft=st.sampled_from([0, 1, 4]),
    )
    def interrupt(self, session: flashrt.Session, after: int, is_done: bool, draft: int) -> None:
        """Ctrl-C before a replay, or between the replay and what the host makes of it."""
        if not self.live(session) or not self.history[session] or self.free(session) < 8:
            return
        history = self.history[session]
        following = truth(self.engine, history, 16)
        with (
            guessing(self.engine, history, following, 0.8),
            interrupting(self.engine, after, is_done),
        ):
            try:
                for token in session.generate(8, draft=draft):
                    history.append(token)
            except KeyboardInterrupt:
                pass

    @rule(target=capsules, session=sessions)
    def snapshot(self, session: flashrt.Session) -> Any:
        if not self.live(session):
            return multiple()
        try:
            capsule = session.snapshot()
        except flashrt.PoolFull:
            return multiple()
        self.frozen[capsule] = list(self.history[session])
        assert capsule.tokens.tolist() == self.history[session]
        return capsule

    @rule(session=sessions, capsule=capsules, is_poisoned=st.booleans())
    def restore(
        self, session: flashrt.Session, capsule: flashrt.Capsule, is_poisoned: bool
    ) -> None:
        if self.live(session) and capsule in self.frozen:
            if is_poisoned:
                self.engine.arena.poison_scratch()
                for waypoint in session.lane.waypoints:
                    self.engine.capsules.drop_waypoint(session.lane, waypoint)
                self.engine.poison_lane(session.lane)
            session.restore(capsule)
            self.history[session] = list(self.frozen[capsule])

    @rule(target=sessions, session=sessions)
    def fork(self, session: flashrt.Session) -> Any:
        if not self.live(session) or len(self.history) == len(self.engine.lanes) - 1:
            return multiple()
        other = session.fork()
        self.history[other] = list(self.history[session])
        return other

    @rule(target=sessions, session=sessions, capsule=capsules)
    def fork_capsule(self, session: flashrt.Session, capsule: flashrt.Capsule) -> Any:
        full = len(self.history) == len(self.engine.lanes) - 1
        if not self.live(session) or capsule not in self.frozen or full:
            return multiple()
        other = session.fork(capsule)
        self.history[other] = list(self.frozen[capsule])
        return other

    @rule(session=sessions, share=st.floats(0, 1))
    def rollback(self, session: flashrt.Session, share: float) -> None:
        if self.live(session):
            position = int(share * len(self.history[session]))
            session.rollback(position)
            del self.history[session][position:]

    @rule(capsule=capsules, tier=st.sampled_from(["device", "host", "disk"]))
    def move(self, capsule: flashrt.Capsule, tier: str) -> None:
        if capsule in self.frozen:
            try:
                capsule.to(tier)
            except flashrt.PoolFull:
                assert tier == "device"
            else:
                assert capsule.tier == tier

    @rule(target=capsules, capsule=capsules)
    def store_and_load(self, capsule: flashrt.Capsule) -> Any:
        if capsule not in self.frozen:
            return multiple()
        loaded = self.store.load(self.engine, self.store.save(capsule).place)
        assert loaded.tokens.tolist() == self.frozen[capsule]
        self.frozen[loaded] = list(self.frozen[capsule])
        return loaded

    @rule(capsule=consumes(capsules))
    def drop(self, capsule: flashrt.Capsule) -> None:
        if self.frozen.pop(capsule, None) is not None:
            capsule.drop()

    @precondition(lambda self: len(self.history) > 1)
    @rule(session=sessions)
    def close(self, session: flashrt.Session) -> None:
        if self.live(session) and len(self.history) > 1:
            session.close()
            del self.history[session]

    @rule(session=sessions)
    def compare(self, session: flashrt.Session) -> None:
        if self.live(session) and self.history[session]:
            with self.engine.session() as oracle:
                oracle.prefill(self.history[session])
                assert session.digest() == oracle.digest()
                assert session.logits().tobytes() == oracle.logits().tobytes()

    @rule(capsule=capsules)
    def compare_capsule(self, capsule: flashrt.Capsule) -> None:
        if self.frozen.get(capsule):
            with self.engine.session() as oracle:
                oracle.prefill(self.frozen[capsule])
                assert capsule.digest == oracle.digest()

    @invariant()
    def bookkeeping_adds_up(self) -> None:
        for session, tokens in getattr(self, "history", {}).items():
            assert session.tokens.tolist() == tokens
        if self.engine is not None:
            self.engine.capsules.check_integrity()

    def teardown(self) -> None:
        for session in list(getattr(self, "history", {})):
            session.close()
        for capsule in list(getattr(self, "frozen", {})):
            capsule.drop()
        if self.engine is not None:
            assert self.engine.stats()["pool_used_bytes"] == 0
            self.engine.arena.check_guards()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_numpy_seeded_long_walk() -> None:
    """One long random walk, seeded: snapshots in a tree, restores back and forth."""
    engine = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=LIMIT, lanes=2)
    rng = np.random.default_rng(7)
    session, nodes = engine.session(), []
    for _ in range(60):
        if nodes and rng.random() < 0.6:
            capsule, tokens = nodes[rng.integers(len(nodes))]
            session.restore(capsule)
            assert session.tokens.tolist() == tokens
        room = LIMIT - session.position
        if room > 40:
            session.prefill(rng.integers(0, 512, int(rng.integers(1, 40))))
        if len(nodes) < 8:
            nodes.append((session.snapshot(), session.tokens.tolist()))
        with engine.session() as oracle:
            oracle.prefill(session.tokens)
            assert session.digest() == oracle.digest()
