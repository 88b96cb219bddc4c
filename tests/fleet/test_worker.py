"""A worker without Ray: branches take turns on its lanes, leave within a step, go on elsewhere from
a boundary; what is wrong with one is no other's business. Every bit is a single engine's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import BackendError, FleetError
from flashrt.fleet.branch import Branch
from flashrt.fleet.message import Absent, Assignment, Event, Finished, Passed, Wanted
from flashrt.fleet.worker import Worker

TINY = Path(__file__).parents[1] / "golden/tiny"
PROMPT = np.arange(37, dtype=np.int32)
RUN = "run 0"


def opened(**options: object) -> flashrt.Engine:
    return flashrt.load(TINY, device="cpu", max_positions=128, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def single() -> flashrt.Engine:
    return opened()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    made = [Worker(opened(lanes=2)), Worker(opened(lanes=3))]
    yield made
    for worker in made:
        worker.close()


def alone(engine: flashrt.Engine, branch: Branch) -> tuple[list[int], list[float], str]:
    """What one engine says: tokens, their logprobs, digest."""
    with engine.session() as session:
        session.prefill([*PROMPT, *branch.suffix])
        said, logprobs = [], []
        for token in session.generate(
            branch.max_tokens, temperature=branch.temperature, seed=branch.seed
        ):
            said.append(token)
            logprobs.append(session.logprobs()[0])
        return said, logprobs, session.digest()


def sampled(n: int, **fields: int) -> list[Branch]:
    return [Branch(seed=i, temperature=1.0, **{"max_tokens": 20, **fields}) for i in range(n)]


def submit(worker: Worker, address: str, branches: list[Branch], **wanted: object) -> None:
    found = [Assignment(i, address, b) for i, b in enumerate(branches)]
    worker.submit(RUN, Wanted(**wanted), found)  # type: ignore[arg-type]


def collected(worker: Worker, kind: type[Event], n: int) -> list[Event]:
    """The next n events of a kind; others are passed over."""
    found: list[Event] = []
    while len(found) < n:
        events = worker.collect(RUN, 30)
        assert events, "the worker stands still"
        found += [e for e in events if isinstance(e, kind)]
    return found


def test_branches_on_lanes_are_those_of_one_engine(
    workers: list[Worker], single: flashrt.Engine
) -> None:
    """More branches than lanes, of several lengths, one with a suffix. Red when a lane keeps
    anything of the branch before, or who shares a step changes a bit.
    """
    branches = sampled(5) + sampled(3, max_tokens=7)
    branches.append(Branch(suffix=(4, 5, 6), max_tokens=9))
    address = workers[0].prefill(PROMPT)
    submit(workers[0], address, branches, logprobs=True)
    events = collected(workers[0], Finished, len(branches))
    for event in events:
        assert isinstance(event, Finished)
        found = event.tokens.tolist(), event.logprobs.tolist(), event.digest
        assert found == alone(single, branches[event.index]), event.index
        assert event.reason == "length"
    assert sorted(e.index for e in events) == list(range(len(branches)))


def test_a_branch_goes_on_elsewhere_from_its_boundary(
    workers: list[Worker], single: flashrt.Engine
) -> None:
    """Red when a parcel lacks something, or the rest of a branch is not what it would have been."""
    here, there = workers
    address = here.prefill(PROMPT)
    (branch,) = sampled(1)
    submit(here, address, [branch], boundary_every=8)
    (passed,) = collected(here, Passed, 1)
    assert isinstance(passed, Passed)
    trunk, _ = here.fetch(address)
    parcel, nbytes = here.fetch(passed.address, RUN)
    assert trunk is not None
    assert parcel is not None
    assert parcel.base == address
    here.close()
    assert there.install(trunk, parcel).nbytes == {address: trunk.nbytes, parcel.digest: nbytes}
    assert not there.install(trunk, parcel).nbytes, "what is there is not taken again"
    rest = Branch(seed=branch.seed, temperature=1.0, max_tokens=20 - len(passed.tokens))
    submit(there, passed.address, [rest])
    (event,) = collected(there, Finished, 1)
    assert isinstance(event, Finished)
    said, _, digest = alone(single, branch)
    assert [*passed.tokens, *event.tokens] == said
    assert event.digest == digest


def test_without_its_base_a_parcel_waits(workers: list[Worker]) -> None:
    here, there = workers
    address = here.prefill(PROMPT)
    submit(here, address, sampled(1), keep=True)
    (event,) = collected(here, Finished, 1)
    assert isinstance(event, Finished)
    parcel, _ = here.fetch(str(event.digest), RUN)
    assert parcel is not None
    assert there.install(parcel).missing == address
    submit(there, address, sampled(1))
    assert collected(there, Absent, 1) == [Absent(0, address)]


WRONG = [
    (Branch(suffix=(10**6,)), "not in"),
    (Branch(suffix=(1,) * 128), "max_positions"),
    (Branch(temperature=-1.0), "temperature"),
    (Branch(max_tokens=-1), "max_tokens"),
    (Branch(stop=None), "cannot begin"),  # type: ignore[arg-type]
    (Branch(logit_bias={-1: 2.0}), "not in"),
]


def test_what_is_wrong_with_a_branch_is_its_own(
    workers: list[Worker], single: flashrt.Engine
) -> None:
    """Red when an error of one ends another, or keeps a lane."""
    branches = [*sampled(2), *(branch for branch, _ in WRONG), *sampled(2)]
    submit(workers[0], workers[0].prefill(PROMPT), branches)
    events = {e.index: e for e in collected(workers[0], Finished, len(branches))}
    for i, (_, message) in enumerate(WRONG, 2):
        event = events[i]
        assert isinstance(event, Finished)
        assert message in str(event.error)
        assert event.digest is None
    for i in (0, 1, 8, 9):
        event = events[i]
        assert isinstance(event, Finished)
        assert (event.tokens.tolist(), event.digest) == alone(single, branches[i])[::2]
    assert workers[0].state().n_busy == 0


def test_a_run_that_is_stopped_leaves_nothing(
    workers: list[Worker], single: flashrt.Engine
) -> None:
    """Red when a branch, its parcels or its events stay, or the lanes are not what they were."""
    worker = workers[0]
    address = worker.prefill(PROMPT)
    submit(worker, address, sampled(9, max_tokens=80), boundary_every=2)
    collected(worker, Passed, 3)
    worker.stop(RUN)
    submit(worker, address, sampled(3))  # it was on its way
    state = worker.state()
    assert (state.n_busy, state.n_waiting, state.n_parcels) == (0, 0, 0)
    assert state.capsules == (address,)
    assert worker.collect(RUN, 30) == []
    worker.submit("run 1", Wanted(), [Assignment(0, address, sampled(1)[0])])
    (event,) = worker.collect("run 1", 30)
    assert isinstance(event, Finished)
    assert event.digest == alone(single, sampled(1)[0])[2]


def test_a_full_pool_takes_capsules_that_nobody_needs() -> None:
    """Red when kept ends fill the pool for good, or a trunk goes while branches begin at it."""
    worker = Worker(opened(lanes=1, pool_bytes=300_000))
    try:
        address = worker.prefill(PROMPT)
        submit(worker, address, sampled(40, max_tokens=3), keep=True)
        events = collected(worker, Finished, 40)
        assert all(isinstance(e, Finished) and e.error is None for e in events)
        capsules = worker.state().capsules
        assert len(capsules) < 40
        assert {str(e.digest) for e in events[-2:] if isinstance(e, Finished)} <= set(capsules)
        worker.forget(list(capsules))
        assert worker.state().capsules == ()
    finally:
        worker.close()


def test_no_room_for_an_end_is_an_error_of_its_branch(single: flashrt.Engine) -> None:
    """Red when it ends the worker, or the next branch finds no lane."""
    with single.session() as session:
        session.prefill(PROMPT)
        room = session.snapshot().nbytes
    worker = Worker(opened(lanes=1, pool_bytes=room + room // 4))
    try:
        address = worker.prefill(PROMPT)
        submit(worker, address, sampled(2), keep=True)
        for event in collected(worker, Finished, 2):
            assert isinstance(event, Finished)
            assert isinstance(event.error, flashrt.PoolFull)
        submit(worker, address, sampled(1), boundary_every=4)
        (event,) = collected(worker, Finished, 1)
        assert isinstance(event, Finished)
        assert event.digest == alone(single, sampled(1)[0])[2]
    finally:
        worker.close()


def test_an_engine_that_fails_is_the_end_of_its_worker(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when whoever waits goes on waiting, or the worker takes more."""
    worker = workers[0]
    address = worker.prefill(PROMPT)

    def fails(*arguments: object) -> None:
        raise BackendError("the device is lost")

    monkeypatch.setattr(worker._engine, "replay", fails)
    submit(worker, address, sampled(3))
    began = time.monotonic()
    with pytest.raises(FleetError, match="the device is lost"):
        worker.collect(RUN, 60)
    assert time.monotonic() - began < 30
    with pytest.raises(FleetError, match="the device is lost"):
        worker.state()
