"""The fleet: engines on many devices, and rollouts over all of them.

IS: the public face: starting workers, making trunks, runs, what was moved. IS NOT: a run itself
(run), or an engine (worker).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from flashrt.base.checks import as_integer, shown
from flashrt.base.errors import CapsuleError, FleetError
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.parcel import pack
from flashrt.fleet.actor import WorkerSpec
from flashrt.fleet.branch import Branch, Progress, Rollout, Trunk
from flashrt.fleet.member import BytesLost, Incarnation, Member, WorkerLost
from flashrt.fleet.message import Wanted, WorkerState
from flashrt.fleet.run import Run
from flashrt.fleet.runtime import ray, start
from flashrt.fleet.worker import stored
from flashrt.load import load
from flashrt.session.session import Session
from flashrt.session.speculate import Draft
from flashrt.store.store import Store

_STATE_S = 30.0  # that a worker has to say how it is
_OURS = {"checkpoint", "device", "max_positions", "lanes", "progress"}  # of load's arguments


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """A worker, and what came to it. `moved`: by incarnation, bytes of capsules by address."""

    index: int
    incarnations: int
    moved: tuple[Mapping[str, int], ...]
    state: WorkerState | None  # None: it is gone, and nobody has missed it yet


@dataclass(frozen=True, slots=True)
class FleetStats:
    """What `Fleet.stats` found."""

    fingerprint: str
    workers: tuple[WorkerStats, ...]

    @property
    def restarts(self) -> int:
        """Workers that were started in the place of lost ones."""
        return sum(w.incarnations - 1 for w in self.workers)


class Fleet:
    """Engines of one checkpoint, each in a process of its own.

    with Fleet("checkpoint", workers=4) as fleet:
        async for rollout in fleet.rollouts(prompt, [Branch(seed=i) for i in range(1000)]):
            ...
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        workers: int = 1,
        device: str = "auto",
        *,
        lanes: int = 8,
        max_positions: int = 4096,
        store: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        resources: Mapping[str, Any] | None = None,
        address: str | None = None,
        start_timeout_s: float = 300.0,
        **options: Any,
    ) -> None:
        """Start the workers and wait until each has loaded. `checkpoint`, `device`, `lanes`,
        `max_positions` and `options` are those of `flashrt.load`, for every worker.

        store: an fsspec URL or a folder; trunks travel through it then, else through Ray's object
        store. threads: of the CPU, for each worker; None: its share of this machine's, or what
        `flashrt.load` takes on a Ray that runs already. resources: what Ray keeps for a worker;
        default one CPU, and one GPU where the device is one. address: of a Ray that runs ("auto":
        of this machine); None: this process's, else one of its own, which `close` ends.

        Raises FleetError when a worker does not start or is foreign to the others, and what
        `flashrt.load` raises there.
        """
        n_workers = as_integer(workers)
        if n_workers is None or not 1 <= n_workers <= 4096:
            raise FleetError(f"workers={shown(workers)} is not an integer in [1, 4096]")
        unknown = set(options) - (set(inspect.signature(load).parameters) - _OURS)
        if unknown:
            raise FleetError(f"Fleet: flashrt.load takes no {', '.join(sorted(unknown))}")
        cores = os.cpu_count() or 1
        self._owns_ray = start(address, max(cores, n_workers))
        if threads is None:
            threads = max(1, cores // n_workers) if self._owns_ray and address is None else 0
        if device == "auto" and ray.cluster_resources().get("GPU"):
            device = "cuda"
        kept = {"num_cpus": 1, **({"num_gpus": 1} if device == "cuda" else {}), **(resources or {})}
        chosen = {"device": device, "max_positions": max_positions, "lanes": lanes, **options}
        self._store = None if store is None else Store(store)
        where = None if store is None else os.fspath(store)
        spec = WorkerSpec(os.fspath(checkpoint), chosen, where, threads)
        self._names = itertools.count()
        self._gone: deque[str] = deque()  # addresses of trunks that were collected
        self._known: weakref.WeakValueDictionary[str, Trunk] = weakref.WeakValueDictionary()
        self._members: list[Member] = []
        self._is_closed = False
        try:
            for index in range(n_workers):
                self._members.append(Member(index, spec, kept, start_timeout_s))
            states = [self._members[0].wait(None)]
            self.fingerprint = states[0].fingerprint
            states += [member.wait(self.fingerprint) for member in self._members[1:]]
        except BaseException:
            self.close()
            raise
        self._lanes = states[0].n_lanes

    # -- trunks -----------------------------------------------------------------------------------

    async def trunk(
        self, source: Trunk | Session | Capsule | Iterable[int] | NDArray[np.integer] | str
    ) -> Trunk:
        """A state for branches to begin at: the present one of a session, a capsule, tokens that
        one of the workers will prefill, or the name of a capsule in the fleet's store.

        Raises CapsuleError for one that is foreign to the fleet, and what `Session.prefill` raises
        for tokens.
        """
        self._check_open()
        await self._forget()
        if isinstance(source, Trunk):
            return source
        if isinstance(source, Session):
            capsule = source.snapshot()
            try:
                return self._published(capsule)
            finally:
                capsule.drop()
        if isinstance(source, Capsule):
            return self._published(source)
        if isinstance(source, str):
            return self._in_store(source)
        tokens = source if isinstance(source, np.ndarray) else np.array(list(source))
        return await self._prefilled(tokens)

    def _published(self, capsule: Capsule) -> Trunk:
        """The bytes of this process's own capsule."""
        fingerprint = capsule.owner.fingerprint
        if fingerprint != self.fingerprint:
            raise CapsuleError(
                f"{capsule}: made by another model, precision, plan or kernel version: its "
                f"fingerprint is {fingerprint}, the fleet's {self.fingerprint}"
            )
        known = self._known.get(capsule.digest)
        if known is not None:
            return known
        if self._store is not None:
            place = self._store.save(capsule).place
            parcel = stored(self._store, place)
            return self._noted(
                Trunk(parcel.digest, parcel.position, parcel.nbytes, ray.put(parcel))
            )
        packed = pack(capsule)
        return self._noted(Trunk(packed.digest, packed.position, packed.nbytes, ray.put(packed)))

    def _in_store(self, name: str) -> Trunk:
        if self._store is None:
            raise FleetError(f"trunk {name!r}: the fleet has no store: Fleet(..., store=URL)")
        place = self._store.resolve(name)
        parcel = stored(self._store, place)
        return self._noted(Trunk(parcel.digest, parcel.position, parcel.nbytes, ray.put(parcel)))

    async def _prefilled(self, tokens: NDArray[Any]) -> Trunk:
        """By the worker with the fewest capsules."""
        while True:
            member = min(self._members, key=lambda m: (m.is_lost, len(m.present.holds), m.index))
            actor = member.present
            try:
                return await self._prefilled_by(actor, tokens)
            except (WorkerLost, BytesLost):
                await member.revive(actor)

    async def _prefilled_by(self, actor: Incarnation, tokens: NDArray[Any]) -> Trunk:
        address = await actor.call("prefill", tokens)
        actor.holds.add(address)
        if (known := self._known.get(address)) is not None:
            return known
        if self._store is not None:
            parcel = await actor.call("publish", address)
            return self._noted(Trunk(address, parcel.position, parcel.nbytes, ray.put(parcel)))
        reference, nbytes = await actor.fetch(address)
        node = (await actor.call("state")).node
        if node != ray.get_runtime_context().get_node_id():  # it would go with that machine
            reference = ray.put(await reference)
        return self._noted(Trunk(address, len(tokens), nbytes, reference))

    def _noted(self, trunk: Trunk) -> Trunk:
        """The trunk of this state that is known already, else this one."""
        known = self._known.setdefault(trunk.address, trunk)
        if known is trunk:
            weakref.finalize(trunk, self._gone.append, trunk.address)
        return known

    async def _forget(self) -> None:
        """Workers give back the capsules of trunks that nobody has any more."""
        gone = set[str]()
        while self._gone:
            gone.add(self._gone.popleft())
        gone -= set(self._known)
        for member in self._members:
            actor = member.present
            if mine := gone & actor.holds:
                actor.holds -= mine
                with contextlib.suppress(WorkerLost):  # whoever needs it next finds out
                    await actor.call("forget", sorted(mine))

    # -- rollouts ---------------------------------------------------------------------------------

    async def rollouts(
        self,
        trunk: Trunk | Session | Capsule | Iterable[int] | NDArray[np.integer] | str,
        branches: Iterable[Branch],
        *,
        ordered: bool = False,
        logprobs: bool = False,
        keep: bool = False,
        boundary_every: int = 128,
        in_flight: int | None = None,
        retries: int = 8,
        draft: Draft = 0,
        progress: Callable[[Progress], object] | None = None,
    ) -> AsyncGenerator[Rollout, None]:
        """What becomes of each branch, as they end, or `ordered` as they were given.

        trunk: see `trunk`. branches: taken as there is room for them. logprobs: of each token.
        keep: the state at the end of each, as a trunk. boundary_every: tokens after which a branch
        leaves a boundary that outlives its worker; 0: none, it begins anew. in_flight: branches
        taken and results not handed out, at most; None: four per lane. retries: workers that may
        die with a branch. draft: see `Session.generate`. progress: is called with each result.

        Breaking out of the loop, or a cancellation, stops all branches within a step. What is wrong
        with a branch is its result's `error`. Raises FleetError when no worker can be started any
        more, and what `trunk` raises.
        """
        for name, value, least in (
            ("boundary_every", boundary_every, 0),
            ("in_flight", 1 if in_flight is None else in_flight, 1),
            ("retries", retries, 0),
        ):
            if as_integer(value) is None or value < least:
                raise FleetError(f"rollouts: {name}={shown(value)} is not an integer >= {least}")
        begin = await self.trunk(trunk)
        wanted = Wanted(logprobs, keep, boundary_every, draft)
        run = Run(
            f"run {next(self._names)} of {id(self):x}",
            self._members,
            self._lanes,
            begin,
            branches,
            wanted,
            is_ordered=ordered,
            in_flight=in_flight or 4 * self._lanes * len(self._members),
            retries=retries,
            progress=progress,
            made=self._noted,
        )
        results = run.results()
        try:
            async for rollout in results:
                yield rollout
        finally:
            await results.aclose()

    # -- the fleet --------------------------------------------------------------------------------

    def stats(self) -> FleetStats:
        """How the workers are, and what came to them. Waits for a step of each."""
        self._check_open()
        found = []
        for m in self._members:
            actors = [*m.past, m.present]
            moved = tuple(dict(actor.moved) for actor in actors)
            found.append(WorkerStats(m.index, len(actors), moved, m.present.state(_STATE_S)))
        return FleetStats(self.fingerprint, tuple(found))

    def close(self) -> None:
        """End all workers, and Ray if it was started here. A second close does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for member in self._members:
            member.close()
        if self._owns_ray:
            ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise FleetError("the fleet is closed; start another one")
