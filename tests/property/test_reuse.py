"""Whatever a session is opened from, its state is that of a cold prefill."""

from __future__ import annotations

import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from flashrt.store.opening import open_session
from flashrt.store.reuse import Action
from flashrt.store.store import Store

STEM = [n % 5 for n in range(120)]
PROMPTS = st.builds(
    lambda n, tail: STEM[:n] + tail,
    st.integers(0, len(STEM)),
    st.lists(st.integers(0, 2), max_size=6),
).filter(len)
CALLS = st.lists(
    st.tuples(
        PROMPTS,
        st.booleans(),  # on the live session, or on a new lane
        st.lists(st.integers(1, 120), max_size=2),
        st.sampled_from([None, 16, 50]),
        st.booleans(),  # forget the capsules in memory before, as a restart would
    ),
    min_size=1,
    max_size=7,
)


@given(CALLS)
@settings(max_examples=25, deadline=None)
def test_every_way_leads_to_the_same_state(
    engine: flashrt.Engine,
    calls: list[tuple[list[int], bool, list[int], int | None, bool]],
) -> None:
    with tempfile.TemporaryDirectory() as folder, engine.session() as live:
        store = Store(folder)
        for prompt, is_live, boundaries, every, is_restart in calls:
            if is_restart:
                for capsule in list(engine.capsules.capsules):
                    capsule.drop()
            near = live if is_live else None
            opened = open_session(
                store, engine, prompt, session=near, boundaries=boundaries, every=every
            )
            session, decision = opened.session, opened.decision
            assert session.tokens.tolist() == prompt
            assert decision.position + decision.n_prefill == len(prompt)
            assert (decision.position == 0) == (decision.action is Action.COLD)
            assert opened.problems == ()
            with engine.session() as oracle:
                oracle.prefill(prompt)
                assert oracle.digest() == session.digest()
                assert oracle.logits().tobytes() == session.logits().tobytes()
            for capsule in opened.published:
                assert capsule.tokens.tolist() == prompt[: capsule.position]
            if session is not live:
                session.close()
            engine.capsules.check_integrity()
    for capsule in list(engine.capsules.capsules):
        capsule.drop()
    assert engine.stats()["pool_used_bytes"] == 0
