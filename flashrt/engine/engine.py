"""The engine: a model, its weights and a backend; planned, loaded, captured and sealed.

IS: what every engine has, whatever its model predicts: the arena, graphs, lanes and who has them,
capsules and room for them, identity, counters. IS NOT: the verbs on lanes; see `tokens` and
`actions`, which derive from it.

    model -> regions + tapes -> plan -> arena -> weights -> capture -> seal

After `seal` nothing allocates, compiles or captures.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from threading import active_count
from typing import Any, Self, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from flashrt.base import tracing
from flashrt.base.checks import as_integer, shown
from flashrt.base.errors import LaneBusy, PlanError, PoolFull, SessionError
from flashrt.base.flags import flags
from flashrt.capsule.capsule import Capsule
from flashrt.capsule.eviction import Budgets, make_room
from flashrt.capsule.extent import Shelf
from flashrt.capsule.file import CapsuleHeader
from flashrt.capsule.lineage import Lane
from flashrt.capsule.table import CapsuleTable
from flashrt.capsule.turn import Turn, in_turn
from flashrt.core.arena import Arena
from flashrt.core.backend import Backend, Bytes, Progress
from flashrt.core.graph import GraphKey, GraphTable
from flashrt.core.op import Op
from flashrt.core.planner import ArenaPlan, Band, StorageOf, plan_arena, plan_band
from flashrt.core.region import Region, Role
from flashrt.core.runs import Run
from flashrt.core.tape import Tape
from flashrt.models.model import Model, tapes_of
from flashrt.ops import OPS
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.loader import LoadReport, check_sources, fill_weights
from flashrt.weights.rules import WeightRule

Fill = Callable[[Sequence[WeightRule], Checkpoint, Arena, Progress | None], LoadReport]
MAX_LANES = 4096
MAX_POOL_NBYTES = 1 << 46
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class PoolDefault:
    """Room for capsules when the user does not say how much: counted in what a lane takes."""

    fixed: int  # capsules' fixed bands
    lanes: int = 0  # lanes' worth of rows, besides

    def nbytes(self, model: Model, storage_of: StorageOf) -> int:
        """Bytes of such a pool."""
        fixed, rows = (
            plan_band([r for r in model.lane_regions if r.role is role], storage_of).nbytes
            for role in (Role.FIXED, Role.ROWS)
        )
        return self.fixed * fixed + self.lanes * rows


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of an engine lies; there is no memory behind it."""

    model: Model
    tapes: tuple[Tape, ...]
    arena: ArenaPlan
    weights: Band


def lay_out(
    model: Model,
    storage_of: StorageOf,
    *,
    pool_default: PoolDefault,
    lanes: int = 1,
    pool_bytes: int | None = None,
) -> Layout:
    """What an engine of a model allocates, on a backend that stores regions so; see Engine for the
    options. Raises PlanError.
    """
    lanes = _checked_size("lanes", lanes, 1, MAX_LANES)
    if pool_bytes is None:
        pool_bytes = pool_default.nbytes(model, storage_of)
    else:
        pool_bytes = _checked_size("pool_bytes", pool_bytes, 0, MAX_POOL_NBYTES)
    tapes = tapes_of(model, lanes)
    arena = plan_arena(model.lane_regions, tapes, storage_of, lanes=lanes, pool_nbytes=pool_bytes)
    weights = plan_band([rule.region for rule in model.weights], storage_of)
    return Layout(model, tapes, arena, weights)


class Engine:
    """What all engines share. Built by `flashrt.load` and `flashrt.load_policy`."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        backend: Backend,
        *,
        pool_default: PoolDefault,
        lanes: int = 1,
        pool_bytes: int | None = None,
        shelf: Shelf | None = None,
        fill: Fill = fill_weights,
        before_seal: Callable[[Arena, Sequence[Tape]], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Plan, allocate, load, capture, seal. Raises FlashrtError from any of these.

        pool_bytes: room for capsules; None is `pool_default`. shelf: the disk tier, if there is
        one. fill: what puts weights into the arena. before_seal: is called once all graphs of the
        model are captured, and may capture more.
        """
        self.model = model
        self.backend = backend
        self.checkpoint = checkpoint
        check_sources(model.weights, checkpoint)  # before time or memory is spent
        layout = lay_out(
            model, backend.storage, pool_default=pool_default, lanes=lanes, pool_bytes=pool_bytes
        )
        plan, tapes, lanes = layout.arena, layout.tapes, len(layout.arena.lanes)
        backend.build(_with_own_ops(tapes), progress)
        self.arena = Arena(backend, plan, layout.weights)
        self.load_report = fill(model.weights, checkpoint, self.arena, progress)
        self.fingerprint = _fingerprint(model, self.load_report, backend, plan, tapes)
        self.max_positions = max_positions_of(model)
        journal = max(self.max_positions, 0)
        self.lanes = [Lane(i, np.zeros(journal, np.int32)) for i in range(lanes)]
        self.capsules = CapsuleTable(self.arena, self.lanes, self.fingerprint)
        self.capsules.shelf = shelf
        # Whoever changes a session, loop, capsule or lane of this engine has it.
        self.turn: Turn = self.capsules.turn
        self.budgets = Budgets()
        self.graphs = GraphTable(backend, self.arena)
        self._tapes = {(t.phase, t.rows): t for t in tapes}
        self._owners: list[weakref.ref[object] | None] = [None] * lanes
        self.is_closed = False
        self._capture(tapes, progress)
        if before_seal is not None:
            before_seal(self.arena, tapes)
        self.graphs.seal()
        backend.seal()
        tracing.trace(tracing.PLAN, f"{self.stats()}")

    @property
    def device(self) -> str:
        """Name of the backend."""
        return self.backend.name

    # -- lanes ----------------------------------------------------------------------------------

    @property
    def free_lanes(self) -> tuple[Lane, ...]:
        """Lanes that nobody has, the next one to be taken last. Whose owner is gone is free: no
        finaliser has to say so, and no exception can lose a lane.
        """
        owners = self._owners
        return tuple(
            lane
            for lane in reversed(self.lanes)
            if (o := owners[lane.index]) is None or o() is None
        )

    def take_lane(self, owner: object) -> Lane:
        """A free lane, in whatever state its last user left it, until `release` or until the owner
        is no more. Raises LaneBusy when none is free.

        The owner resets it, restores a capsule into it, or forks another lane into it.
        """
        self.check_open()
        if not self.free_lanes:
            gc.collect()
        free = self.free_lanes
        if not free:
            raise LaneBusy(f"all {len(self.lanes)} lanes are in use; close one, or load more lanes")
        lane = free[-1]
        self._owners[lane.index] = weakref.ref(owner)
        self._drop_waypoints(lane)
        lane.owed = None
        return lane

    def release(self, lane: Lane) -> None:
        """Take a lane back. Its rows stay: a next user who needs the same ones copies less."""
        self._owners[lane.index] = None
        self._drop_waypoints(lane)

    def release_from(self, lane: Lane, owner: object) -> None:
        """The same, if the lane is still the owner's; may be said more than once."""
        held = self._owners[lane.index]
        if held is not None and held() is owner:
            self.release(lane)

    def lane_array(self, lane: Lane, name: str) -> NDArray[np.generic]:
        """A lane's region as a logical array (bfloat16 as uint16 bits)."""
        return self.arena.read(self.arena.lane(lane.index).slot(name))

    def set_lane_array(self, lane: Lane, name: str, array: NDArray[np.generic]) -> None:
        """Overwrite a lane's region, for ablations and experiments. Raises PlanError for a wrong
        name, shape or dtype.
        """
        slot = self.arena.lane(lane.index).slot(name)
        wanted = self.arena.read(slot).dtype
        if array.dtype != wanted:
            raise PlanError(f"region {name!r} is {wanted}, got {array.dtype}")
        self.arena.write(slot, array)

    def poison_lane(self, lane: Lane) -> None:
        """0xFF over a lane: nothing of it may be used before a restore brings it all back."""
        self.arena.poison_lane(lane.index)
        lane.hold(None, 0)

    # -- capsules -------------------------------------------------------------------------------

    @in_turn
    def load_capsule(self, path: str | os.PathLike[str]) -> Capsule:
        """A capsule from a file that `Capsule.save` wrote.

        Raises CapsuleError when the file is foreign, truncated or damaged, or holds what kernels
        could not be let loose on; PoolFull when there is no room. Nothing is changed then.
        """
        self.check_open()
        return self.with_room(lambda: self.capsules.load(path, self.admit))

    def admit(
        self, header: CapsuleHeader, tensors: Mapping[str, Bytes], tokens: NDArray[np.int32]
    ) -> None:
        """Raises CapsuleError unless what was read is a state that kernels may run on."""
        raise NotImplementedError

    def with_room(self, take: Callable[[], _T]) -> _T:
        """`take()`, others giving way while the pool is full: waypoints cost only speed, so they
        are dropped oldest first; then capsules go to slower tiers, as far as `budgets` allow.
        """
        while True:
            try:
                return take()
            except PoolFull:
                lane = max(self.lanes, key=lambda lane: len(lane.waypoints))
                if lane.waypoints:
                    self.capsules.drop_waypoint(lane, lane.waypoints[0])
                    continue
                free = self.free_lanes
                busy = [lane for lane in self.lanes if lane not in free]
                if not make_room(self.capsules, self.budgets, busy):
                    raise

    # -- the rest -------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, in bytes."""
        plan, pool = self.arena.plan, self.capsules.pool
        return {
            **dataclasses.asdict(self.backend.counters),
            "device": self.device,
            "graphs": len(self.graphs.graphs),
            "lanes": len(self.lanes),
            "arena_bytes": plan.nbytes,
            "weights_bytes": self.arena.weights.nbytes,
            "fixed_bytes": plan.lanes[0].fixed.nbytes,
            "rows_bytes": plan.lanes[0].rows.nbytes,
            "scratch_bytes": plan.scratch.nbytes,
            "pool_bytes": pool.nbytes,
            "pool_used_bytes": pool.used_nbytes,
            "capsules": len(self.capsules.capsules),
        }

    @in_turn
    def close(self) -> None:
        """Give all memory back. Sessions, loops and capsules of the engine refuse from here on.

        A second close does nothing; leaving a `with engine:` block closes too.
        """
        if not self.is_closed:
            self.is_closed = True
            self.capsules.close()
            self.graphs.close()
            self.arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- for verbs ------------------------------------------------------------------------------

    def replay(self, phase: str, rows: int, runs: tuple[Run, ...]) -> None:
        """One graph on rows of lanes; at FLASHRT_DEBUG=2 launch by launch, with microseconds."""
        asked = flags()
        if asked.debug >= tracing.LAUNCHES:
            self._replay_traced(phase, rows, runs)
        else:
            key = GraphKey(phase, rows)
            if (rows == 1 and active_count() == 1) or asked.poison:
                # A short kernel and nobody to wait for it; or nobody may poison scratch meanwhile.
                self.graphs.replay(key, runs)
            else:
                with self.turn.given_up(): self.graphs.replay(key, runs)  # noqa: E701  # fmt: skip

    def boundary(self) -> None:
        """Between two verbs: scratch is dead, and with FLASHRT_POISON it shows who relies on it."""
        if flags().poison:
            self.arena.poison_scratch()

    # -- inside ---------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raises SessionError once the engine is closed."""
        if self.is_closed:
            raise SessionError("the engine is closed; load another one")

    def _drop_waypoints(self, lane: Lane) -> None:
        for waypoint in lane.waypoints:
            self.capsules.drop_waypoint(lane, waypoint)

    def _capture(self, tapes: Sequence[Tape], progress: Progress | None) -> None:
        for i, tape in enumerate(tapes):
            self.graphs.capture(tape)
            if progress is not None:
                progress("graphs", i + 1, len(tapes))

    def _replay_traced(self, phase: str, rows: int, runs: tuple[Run, ...]) -> None:
        self.arena.write_runs(runs)
        for i, bound in enumerate(self.arena.bind(self._tapes[phase, rows])):
            start = time.perf_counter()
            self.backend.eager([bound])
            self.backend.sync()
            spent_us = (time.perf_counter() - start) * 1e6
            op, dims = bound.launch.op.name, dict(bound.launch.dims)
            tracing.trace(
                tracing.LAUNCHES, f"{phase}/{rows} {i:4d} {op:14s} {spent_us:9.1f} us {dims}"
            )


def _checked_size(name: str, value: object, least: int, most: int) -> int:
    number = as_integer(value)
    if number is None or not least <= number <= most:
        raise PlanError(f"{name}={shown(value)} is not a whole number in [{least}, {most:,}]")
    return number


def _with_own_ops(tapes: Sequence[Tape]) -> tuple[Op, ...]:
    """The table of ops, and ops outside it that a model records: kernels of the user's own."""
    recorded = dict.fromkeys(launch.op for tape in tapes for launch in tape.launches)
    return (*OPS, *(op for op in recorded if op not in OPS))


def max_positions_of(model: Model) -> int:
    """Rows of the append-only regions; 0 where a model has none."""
    return next((r.shape[1] for r in model.lane_regions if r.role is Role.ROWS), 0)


def _fingerprint(
    model: Model, report: LoadReport, backend: Backend, plan: ArenaPlan, tapes: Sequence[Tape]
) -> str:
    """Identity of weights + config + kernels + what capsules look like; 32 hex digits.

    Context length, lane count and the buckets of a phase are not part of it: a capsule fits
    wherever its position does.
    """
    own = tapes[: len(model.phases)]  # what lanes share gives the same bits
    first = {tape.phase: tape for tape in reversed(own)}
    described: Mapping[str, object] = {
        "format": 2,
        "model": model.name,
        "config": model.identity,
        "weights": report.digest,
        "formats": [_format(r.region) for r in model.weights if r.is_matrix],
        "constants": [r.constant for r in model.weights if r.constant],
        "launches": {
            phase: [(launch.op.name, launch.attrs) for launch in tape.launches]
            for phase, tape in first.items()
        },
        "kernels": backend.kernel_digest,
        "device": backend.name,
        "act": str(backend.acts),
        "fixed": [_describe(s.region) for s in plan.lanes[0].fixed.slots],
        "rows": [
            (_describe(s.region)[0::2], s.storage.row_nbytes) for s in plan.lanes[0].rows.slots
        ],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())


def _format(region: Region) -> str:
    """How a matrix holds its weights: the same source may be loaded in several formats."""
    return f"{region.dtype} {region.groups}"


def _describe(region: Region) -> tuple[str, tuple[int, ...], str, str]:
    return region.name, region.shape, str(region.dtype), str(region.layout)
