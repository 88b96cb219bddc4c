"""Opening a session on a prompt: find what is known of it, go there, prefill the rest.

IS: candidates from the live lane, from capsules in memory and from the store, and carrying out what
reuse decides. IS NOT: the store, or the decision. It exists so that neither a session nor a store
has to know the other.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError, PoolFull, SessionError, StoreError
from flashrt.capsule.capsule import Capsule, extents_of
from flashrt.capsule.lineage import Lane, Segment, path_to, segment_layout, shared_rows
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session
from flashrt.store.manifest import Place
from flashrt.store.reuse import Action, Boundary, Decision, Live, Rates, boundaries_due, decide
from flashrt.store.store import Store

MEASURED_TOKENS = 64  # fewer say nothing about the speed of prefill


@dataclass(frozen=True, slots=True)
class Opened:
    """A session at the end of its prompt, and how it got there."""

    session: Session
    decision: Decision
    published: tuple[Capsule, ...]  # boundaries that are in the store now, on the disk tier
    problems: tuple[str, ...]  # why other boundaries are not


def open_session(
    store: Store,
    engine: SessionEngine,
    tokens: Iterable[int] | NDArray[np.integer],
    *,
    session: Session | None = None,
    boundaries: Iterable[int] = (),
    every: int | None = None,
) -> Opened:
    """A session whose tokens are `tokens`, with as little prefill as the store allows.

    `session`: one that is live already and may be close by (default: a new one, on a free lane).
    `boundaries`: positions, such as ends of messages and tool calls; `every`: a number of tokens; a
    capsule is published at each of them that is passed. Raises LaneBusy, SessionError, TokenError.
    A stored capsule that cannot be read is passed over, and `decision.reason` says so.
    """
    wanted = engine.checked_tokens(tokens, np.empty(0, np.int32))
    if every is not None and every < 1:
        raise SessionError(f"open_session: every={every}; give a number of tokens, or None")
    if session is not None and session.lane not in engine.lanes:
        raise SessionError("open_session: the session belongs to another engine")
    live = None if session is None else _live(engine, session)
    opened = session or engine.session()
    try:
        decision = _go(store, engine, opened, wanted, live)
        published, problems = _prefill(store, opened, wanted, boundaries, every)
    except BaseException:
        if session is None:
            opened.close()
        raise
    return Opened(opened, decision, published, problems)


def matching_capsules(capsules: Iterable[Capsule], tokens: NDArray[np.int32]) -> list[Capsule]:
    """Capsules in memory whose tokens are a prefix of `tokens`, deepest first.

    Segments are the edges of a radix tree over token ids: each one is compared once.
    """
    verdicts: dict[Segment, bool] = {}

    def agrees(segment: Segment | None) -> bool:
        path: list[Segment] = []
        while segment is not None and segment not in verdicts:
            path.append(segment)
            segment = segment.parent
        verdict = segment is None or verdicts[segment]
        for at in reversed(path):
            verdict = verdict and np.array_equal(tokens[at.start : at.stop], at.tokens)
            verdicts[at] = verdict
        return verdict

    found = [c for c in capsules if 0 < c.position <= len(tokens) and agrees(c.segment)]
    return sorted(found, key=lambda c: -c.position)


def _live(engine: SessionEngine, session: Session) -> Live:
    lane = session.lane
    boundaries = [m.position for m in lane.waypoints]
    deepest = engine.capsules.boundaries(lane, lane.position)
    if deepest is not None:
        boundaries.append(deepest.position)
    return Live(session.tokens, sorted({b for b in boundaries if b}))


def _go(
    store: Store,
    engine: SessionEngine,
    session: Session,
    wanted: NDArray[np.int32],
    live: Live | None,
) -> Decision:
    """Carry out the best decision whose bytes can be read."""
    candidates = _candidates(store, engine, session.lane, wanted)
    passed_over = ""
    while True:
        fixed_nbytes = engine.capsules.fixed_nbytes
        decision = decide(wanted, candidates, live, fixed_nbytes, store.rates)
        if decision.action is Action.COLD:
            session.rollback(0)
        elif decision.action is Action.ROLLBACK:
            session.rollback(decision.position)
        elif decision.action is Action.RESTORE:
            boundary = decision.boundary
            assert boundary is not None
            try:
                _restore(store, engine, session, boundary)
            except CapsuleError as error:
                candidates.remove(boundary)
                passed_over += f"; passed over {boundary.position:,}: {error}"
                continue
        return replace(decision, reason=decision.reason + passed_over)


def _restore(store: Store, engine: SessionEngine, session: Session, boundary: Boundary) -> None:
    if isinstance(boundary.key, Capsule):
        session.restore(boundary.key)
        return
    assert isinstance(boundary.key, Place), "made in _candidates"
    loaded = store.load(engine, boundary.key)
    try:
        session.restore(loaded)
    except CapsuleError:
        loaded.drop()
        raise


def _candidates(
    store: Store, engine: SessionEngine, lane: Lane, wanted: NDArray[np.int32]
) -> list[Boundary]:
    """All boundaries on the way; the shallow ones matter when the deep ones cannot be read."""
    rows = engine.arena.lane(lane.index).rows
    found = [
        Boundary(c.position, restore_nbytes(lane, c), c.tier, c)
        for c in matching_capsules(engine.capsules.capsules, wanted)
    ]
    for place in store.find(engine.fingerprint, wanted):
        nbytes = engine.capsules.fixed_nbytes + segment_layout(rows, 0, place.position)[1]
        found.append(Boundary(place.position, nbytes, "disk", place))
    return found


def restore_nbytes(lane: Lane, capsule: Capsule) -> int:
    """What a restore would move: the fixed band, and rows that the lane does not hold already."""
    shared = shared_rows(lane, capsule.segment)
    rows = sum(s.rows.nbytes for s in path_to(capsule.segment, shared))
    return extents_of(capsule)[0].nbytes + rows


def _prefill(
    store: Store,
    session: Session,
    wanted: NDArray[np.int32],
    boundaries: Iterable[int],
    every: int | None,
) -> tuple[tuple[Capsule, ...], tuple[str, ...]]:
    """The rest of the prompt, with boundaries on the way; measures the speed of prefill.

    Where there is no room for a capsule, a later session prefills more; this one goes on.
    """
    start, n = session.position, len(wanted)
    due = boundaries_due(start, n, boundaries, every)
    published: list[Capsule] = []
    problems: list[str] = []
    spent_s = 0.0
    for stop in sorted({*due, n}):
        began = time.perf_counter()
        session.prefill(wanted[session.position : stop])
        spent_s += time.perf_counter() - began
        if stop in due:
            try:
                published.append(_published(store, session))
            except (PoolFull, StoreError) as error:
                problems.append(f"no capsule at {stop:,}: {error}")
    if n - start >= MEASURED_TOKENS:
        store.rates = Rates(us_per_token=spent_s * 1e6 / (n - start))
    return tuple(published), tuple(problems)


def _published(store: Store, session: Session) -> Capsule:
    """A capsule of the session's state, in the store. Raises PoolFull, or StoreError, and then
    nobody has it.
    """
    capsule = session.snapshot()
    try:
        store.offload(capsule)
    except BaseException:
        capsule.drop()
        raise
    return capsule
