"""A fleet on Ray, on this machine: every bit is a single engine's, whoever dies; a trunk comes to a
worker once; what is stopped leaves nothing; what is foreign is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

import flashrt
from flashrt.base.errors import FleetError
from flashrt.fleet import Branch, Fleet, Rollout, Trunk
from flashrt.fleet.branch import Progress
from flashrt.fleet.member import BytesLost, Incarnation, WorkerLost
from flashrt.fleet.runtime import LOOPBACK, SETTINGS, ray, start
from flashrt.store.remote import Remote
from flashrt.store.store import Store
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.weights.random_checkpoint import write_random_checkpoint

TINY = Path(__file__).parents[1] / "golden/tiny"
pytestmark = pytest.mark.slow
PROMPT = np.arange(100, dtype=np.int32)
BEFORE = {name: os.environ.get(name) for name in SETTINGS}
LANES, WORKERS, LOAD = 4, 2, {"device": "cpu", "max_positions": 256}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Of an S3 server on this machine. Workers find it by the environment that Ray started in."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything",
    }  # fmt: skip
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("capsules")
        yield "s3://capsules"
    server.stop()


@pytest.fixture(scope="module")
def ray_here(bucket: str) -> Iterator[None]:
    start(None, 2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def fleet(ray_here: None) -> Iterator[Fleet]:
    resources = {"num_cpus": 0}  # other fleets come and go beside this one
    with Fleet(
        bundled_checkpoint(), WORKERS, lanes=LANES, threads=1, resources=resources, **LOAD
    ) as made:
        yield made


@pytest.fixture(scope="module")
def trunk(fleet: Fleet) -> Trunk:
    """Of PROMPT. It lives as long as the tests: what is moved twice shows."""
    return asyncio.run(fleet.trunk(PROMPT))


@pytest.fixture(scope="module")
def single() -> Iterator[flashrt.Engine]:
    with flashrt.load(bundled_checkpoint(), lanes=2, **LOAD) as engine:  # type: ignore[arg-type]
        yield engine


def branches(n: int, max_tokens: int = 24) -> list[Branch]:
    return [Branch(seed=i, temperature=0.9, max_tokens=max_tokens) for i in range(n)]


Told = tuple[list[int], str | None]


@pytest.fixture(scope="module")
def expected(single: flashrt.Engine) -> Callable[[Branch], Told]:
    """What one engine says to a branch of PROMPT."""
    root = single.session()
    root.prefill(PROMPT)
    trunk = root.snapshot()
    known: dict[tuple[int, int], Told] = {}

    def told(branch: Branch) -> Told:
        key = branch.seed, branch.max_tokens
        if key not in known:
            root.restore(trunk)
            said = list(root.generate(branch.max_tokens, temperature=0.9, seed=branch.seed))
            known[key] = said, root.digest()
        return known[key]

    return told


async def all_of(results: AsyncGenerator[Rollout, None]) -> list[Rollout]:
    return [rollout async for rollout in results]


def told(rollout: Rollout) -> Told:
    assert rollout.error is None, rollout.error
    return rollout.tokens.tolist(), rollout.digest


def is_idle(fleet: Fleet) -> bool:
    states = [w.state for w in fleet.stats().workers]
    return all(s and (s.n_busy, s.n_waiting, s.n_parcels) == (0, 0, 0) for s in states)


async def settled(fleet: Fleet) -> None:
    """Until the workers that were lost are back, and all are idle."""
    while not is_idle(fleet):
        await asyncio.sleep(0.05)


def pid_of(fleet: Fleet, worker: int) -> int:
    state = fleet.stats().workers[worker].state
    assert state is not None
    return state.pid


def test_it_is_a_single_engine_and_a_trunk_comes_once(
    fleet: Fleet, trunk: Trunk, single: flashrt.Engine, expected: Callable[[Branch], Told]
) -> None:
    """Red when a bit depends on the worker, or a trunk is sent with each branch or run."""
    seen: list[Progress] = []

    async def twice() -> list[Rollout]:
        one = fleet.rollouts(trunk, branches(40), ordered=True, logprobs=True)
        two = fleet.rollouts(trunk, iter(branches(40)), in_flight=5, progress=seen.append)
        both = await asyncio.gather(all_of(one), all_of(two))  # at the same time
        assert [r.index for r in both[0]] == list(range(40))
        assert sorted(r.index for r in both[1]) == list(range(40))
        moved = [w.moved[-1].get(trunk.address, 0) for w in fleet.stats().workers]
        assert sorted(moved) == [0, trunk.nbytes], "one prefilled it, the other was sent it"
        return [*both[0], *both[1]]

    found = asyncio.run(twice())
    assert [told(r) for r in found] == [expected(r.branch) for r in found]
    assert {r.worker for r in found} == {0, 1}
    assert max(p.in_flight for p in seen) <= 5
    assert (seen[-1].done, seen[-1].failed, seen[-1].total) == (40, 0, None)
    with single.session() as session:
        session.prefill(PROMPT)
        said = []
        for _ in session.generate(24, temperature=0.9, seed=0):
            said.append(session.logprobs()[0])
    assert found[0].logprobs is not None
    assert found[0].logprobs.tolist() == said


def test_workers_die_and_no_bit_changes(
    fleet: Fleet, trunk: Trunk, expected: Callable[[Branch], Told]
) -> None:
    """One is killed as the system kills, one by Ray. Red when a branch is lost, told twice or begun
    anew though it had a boundary, or a new worker is sent the trunk more than once.
    """

    seen: list[Progress] = []
    # Of different lengths: whoever dies has branches in the midst of their way.
    given = [Branch(seed=i, temperature=0.9, max_tokens=20 + 37 * i % 60) for i in range(40)]

    async def with_deaths() -> list[Rollout]:
        found: list[Rollout] = []
        results = fleet.rollouts(trunk, given, boundary_every=6, in_flight=8, progress=seen.append)
        async for rollout in results:
            found.append(rollout)
            if len(found) == 3:
                os.kill(pid_of(fleet, 0), signal.SIGKILL)
            if len(found) == 20:
                fleet._members[1].present.kill()
        moved = [m.get(trunk.address, 0) for w in fleet.stats().workers for m in w.moved]
        assert set(moved) <= {0, trunk.nbytes}
        return found

    found = asyncio.run(with_deaths())
    assert sorted(r.index for r in found) == list(range(40))
    assert [told(r) for r in found] == [expected(r.branch) for r in found]
    assert any(r.losses and r.resumed for r in found), "none went on from a boundary"
    assert seen[-1].losses == 2
    asyncio.run(settled(fleet))


def test_a_branch_is_given_up_after_its_last_retry(
    fleet: Fleet, expected: Callable[[Branch], Told]
) -> None:
    """Red when it goes on for ever, ends others, or the error does not name it."""

    async def with_a_death() -> list[Rollout]:
        found: list[Rollout] = []
        async for rollout in fleet.rollouts(PROMPT, branches(24, 100), retries=0):
            found.append(rollout)
            if len(found) == 2:
                os.kill(pid_of(fleet, 0), signal.SIGKILL)
        return found

    found = asyncio.run(with_a_death())
    lost = [r for r in found if r.error is not None]
    assert 0 < len(lost) <= 2 * LANES
    for r in lost:
        assert isinstance(r.error, FleetError)
        assert f"branch {r.index} (seed {r.index}): 1 workers died" in str(r.error)
    assert len(found) == 24
    assert all(told(r) == expected(r.branch) for r in found if r.error is None)


def test_an_error_of_a_branch_comes_back_as_its_own(fleet: Fleet) -> None:
    """Its type survives the way between processes."""
    given = [Branch(suffix=(10**6,)), Branch(suffix=(1,) * 200), Branch(max_tokens=3)]
    found = asyncio.run(all_of(fleet.rollouts(PROMPT, given, ordered=True)))
    assert isinstance(found[0].error, flashrt.SessionError)
    assert "max_positions" in str(found[1].error)
    assert len(told(found[2])[0]) == 3


@pytest.mark.parametrize(("is_up", "expected_error"), [(True, BytesLost), (False, WorkerLost)])
def test_bytes_that_are_gone_are_no_death_of_a_worker(
    monkeypatch: pytest.MonkeyPatch, is_up: bool, expected_error: type[Exception]
) -> None:
    """Ray raises the death of the actor that had packed a parcel from a call on another one. Red
    when the other one is taken for dead, and killed.
    """

    async def call(actor: Incarnation, verb: str, *arguments: object) -> None:
        if verb == "install" or not is_up:
            raise WorkerLost("the actor died")

    monkeypatch.setattr(Incarnation, "call", call)
    actor = Incarnation.__new__(Incarnation)
    with pytest.raises(expected_error):
        asyncio.run(actor.install(["reference"]))


async def _broken_out_of(fleet: Fleet) -> None:
    async for _ in fleet.rollouts(PROMPT, branches(60, 100), boundary_every=4):
        break
    await asyncio.wait_for(settled(fleet), 5)  # the loop closes the iterator a moment later


async def _closed(fleet: Fleet) -> None:
    async with contextlib.aclosing(fleet.rollouts(PROMPT, branches(60, 100))) as results:
        async for _ in results:
            break


async def _cancelled(fleet: Fleet) -> None:
    task = asyncio.create_task(all_of(fleet.rollouts(PROMPT, branches(60, 100))))
    await asyncio.sleep(0.3)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _failing(fleet: Fleet) -> None:
    def bad() -> Iterator[Branch]:
        yield from branches(20)
        raise RuntimeError("no more branches")

    with pytest.raises(RuntimeError, match="no more branches"):
        await all_of(fleet.rollouts(PROMPT, bad(), in_flight=4))


@pytest.mark.parametrize("way", [_broken_out_of, _closed, _cancelled, _failing])
def test_a_run_that_ends_early_leaves_workers_clean(
    fleet: Fleet, expected: Callable[[Branch], Told], way: Callable[[Fleet], Awaitable[None]]
) -> None:
    """Red when lanes go on with what nobody will read, or the next run finds another state."""

    async def both() -> list[Rollout]:
        await settled(fleet)
        await way(fleet)
        assert is_idle(fleet)
        return await all_of(fleet.rollouts(PROMPT, branches(2 * LANES)))

    found = asyncio.run(both())
    assert sorted(map(told, found)) == sorted(expected(b) for b in branches(2 * LANES))


def test_branches_are_taken_as_results_are(fleet: Fleet) -> None:
    """Backpressure: red when all branches are taken at once, whatever the consumer does."""
    taken = 0

    def counted() -> Iterator[Branch]:
        nonlocal taken
        for branch in branches(30, 4):
            taken += 1
            yield branch

    async def slowly() -> None:
        n = 0
        async for _ in fleet.rollouts(PROMPT, counted(), in_flight=3):
            n += 1
            await asyncio.sleep(0.005)
            assert taken <= n + 3

    asyncio.run(slowly())
    assert taken == 30


def test_ends_are_trunks_and_branches_go_where_they_are(
    fleet: Fleet, single: flashrt.Engine
) -> None:
    """A tree: red when an end is not the state that the branch ended in, or bytes that a worker has
    are sent to it; and a capsule of nobody stays on no worker.
    """

    async def tree() -> tuple[list[Rollout], list[Rollout]]:
        first = await all_of(fleet.rollouts(PROMPT, branches(4), ordered=True, keep=True))
        assert all(r.end is not None and r.end.position == 124 for r in first)
        again = [Branch(seed=9, temperature=0.9, max_tokens=8, start=r.end) for r in first]
        return first, await all_of(fleet.rollouts(PROMPT, again, ordered=True))

    first, second = asyncio.run(tree())
    assert [r.worker for r in second] == [r.worker for r in first]
    with single.session() as session:
        session.prefill([*PROMPT, *first[2].tokens])
        assert session.digest() == first[2].digest
        assert list(session.generate(8, temperature=0.9, seed=9)) == second[2].tokens.tolist()
        assert session.digest() == second[2].digest
    ends = {r.digest for r in first}
    del first, second
    asyncio.run(all_of(fleet.rollouts(PROMPT, branches(1))))
    states = [w.state for w in fleet.stats().workers]
    assert not ends & {address for s in states if s for address in s.capsules}


def test_a_session_here_is_a_trunk_and_a_foreign_one_is_refused(
    fleet: Fleet, single: flashrt.Engine, expected: Callable[[Branch], Told]
) -> None:
    with single.session() as session:
        session.prefill(PROMPT)
        found = asyncio.run(all_of(fleet.rollouts(session, branches(3), ordered=True)))
        assert [told(r) for r in found] == [expected(b) for b in branches(3)]
    with flashrt.load(TINY, **LOAD).session() as other:  # type: ignore[arg-type]
        other.prefill([1, 2, 3])
        with pytest.raises(flashrt.CapsuleError, match="made by another model"):
            asyncio.run(fleet.trunk(other))


def test_a_worker_that_comes_back_foreign_is_refused(ray_here: None, tmp_path: Path) -> None:
    """The checkpoint changed under a fleet: red when branches go on with other weights."""
    folder = tmp_path / "checkpoint"
    write_random_checkpoint(folder, "tiny", seed=1)
    with Fleet(folder, lanes=1, resources={"num_cpus": 0}, threads=1, **LOAD) as fleet:
        shutil.rmtree(folder)
        write_random_checkpoint(folder, "tiny", seed=2)

        async def with_a_death() -> None:
            async for _ in fleet.rollouts(PROMPT, branches(9)):
                fleet._members[0].present.kill()

        with pytest.raises(FleetError, match=r"worker 0 on .* is foreign: its fingerprint is"):
            asyncio.run(with_a_death())


def test_trunks_travel_through_a_store(
    ray_here: None, bucket: str, expected: Callable[[Branch], Told]
) -> None:
    """Through S3: no locks, no folders. Red when a worker takes bytes from elsewhere, or a stored
    capsule is another state.
    """
    url = f"{bucket}/trunks"
    made: dict[str, Any] = {"lanes": LANES, "threads": 1, "resources": {"num_cpus": 0}}
    with Fleet(bundled_checkpoint(), WORKERS, store=url, **made, **LOAD) as fleet:

        async def both() -> tuple[list[Rollout], str]:
            trunk = await fleet.trunk(PROMPT)
            store = Store(url)
            assert isinstance(store.folder, Remote)
            (place,) = store.places()
            assert await fleet.trunk(place.id) is trunk
            found = await all_of(fleet.rollouts(trunk, branches(16), ordered=True, keep=True))
            return found, trunk.address

        found, address = asyncio.run(both())
        assert [told(r) for r in found] == [expected(b) for b in branches(16)]
        moved = [w.moved[-1].get(address, 0) for w in fleet.stats().workers]
        assert sorted(n > 0 for n in moved) == [False, True]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"checkpoint": "/nowhere"}, "nowhere"),
    ({"workers": 0}, "workers=0"),
    ({"kv_type": "int8"}, "takes no kv_type"),
    ({"resources": {"num_cpus": 64}, "start_timeout_s": 1.0}, "start fewer workers"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_a_fleet_that_cannot_start_says_why(
    ray_here: None, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(flashrt.FlashrtError, match=message):
        Fleet(**{"checkpoint": TINY, **LOAD, **given})


def test_ray_listens_on_the_loopback_interface_and_tells_nobody(fleet: Fleet) -> None:
    """Of a Ray that a fleet started. Red when a release of Ray reads other settings, or they stay
    in this process, whose next Ray may be another's.
    """
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == [LOOPBACK]
    environment = Path(f"/proc/{pid_of(fleet, 0)}/environ").read_text().split("\0")
    expected = {name: BEFORE[name] or value for name, value in SETTINGS.items()}
    assert {f"{name}={value}" for name, value in expected.items()} <= set(environment)
    assert {name: os.environ.get(name) for name in SETTINGS} == BEFORE
