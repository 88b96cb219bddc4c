"""The planner: an offset for every region, once, before anything is allocated.

IS: arithmetic on sizes and lifetimes. IS NOT: memory. The result is checked in tests against an
oracle that recomputes lifetimes by itself.

The arena, low to high: per lane [fixed | rows], per lane io, what all lanes share, scratch
(overlapped by lifetime, one layout per tape over the same bytes), pool. A region of a lane lies at
a constant stride from the same one of the lane before. Regions start at multiples of 256 bytes; a
guard of 256 bytes follows each one outside scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flashrt.base.errors import PlanError
from flashrt.core.backend import Storage
from flashrt.core.region import Region, Role
from flashrt.core.runs import RUNS
from flashrt.core.tape import Tape

ALIGN = 256
GUARD_NBYTES = 256
FEW_ROWS = 32  # tapes of up to so many rows have launches that a backend may fuse
StorageOf = Callable[[Region], Storage]
TapeKey = tuple[str, int]  # (phase, rows)


def align(nbytes: int) -> int:
    """The next multiple of 256."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Slot:
    """A region in the arena: [offset, offset + storage.nbytes)."""

    region: Region
    offset: int
    storage: Storage

    @property
    def stop(self) -> int:
        """One past the last byte."""
        return self.offset + self.storage.nbytes


@dataclass(frozen=True, slots=True)
class Band:
    """A run of slots with nothing of another role between them: [offset, offset + nbytes)."""

    offset: int
    nbytes: int
    slots: tuple[Slot, ...]

    def slot(self, name: str) -> Slot:
        """The slot of a region. Raises PlanError when there is none."""
        for slot in self.slots:
            if slot.region.name == name:
                return slot
        raise PlanError(f"no region {name!r} here; there are {[s.region.name for s in self.slots]}")


@dataclass(frozen=True, slots=True)
class LanePlan:
    """The bands of one lane; all lanes have the same shape."""

    fixed: Band
    rows: Band
    io: Band

    def slot(self, name: str) -> Slot:
        """The slot of a region of this lane."""
        for band in (self.fixed, self.rows, self.io):
            for slot in band.slots:
                if slot.region.name == name:
                    return slot
        raise PlanError(f"no lane region {name!r}")


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """Where everything is."""

    nbytes: int
    lanes: tuple[LanePlan, ...]
    shared: Band  # by all lanes: the table of runs
    scratch: Band  # no slots: see `tapes`
    tapes: Mapping[TapeKey, tuple[Slot, ...]]
    pool: Band
    scratch_unshared_nbytes: int  # what scratch would take without overlap, for the report

    def slots(self) -> Iterable[Slot]:
        """All slots outside scratch."""
        for lane in self.lanes:
            for band in (lane.fixed, lane.rows, lane.io):
                yield from band.slots
        yield from self.shared.slots

    def lane_stride(self, role: Role) -> int:
        """Bytes from a lane's region of this role to the next lane's."""
        first = self.lanes[0]
        return first.io.nbytes if role is Role.IO else first.fixed.nbytes + first.rows.nbytes


def plan_arena(
    lane_regions: Sequence[Region],
    tapes: Sequence[Tape],
    storage_of: StorageOf,
    *,
    lanes: int,
    pool_nbytes: int,
) -> ArenaPlan:
    """Lay out an arena. Raises PlanError for duplicate names or roles that do not belong."""
    _check_names(lane_regions)
    by_role = {role: [r for r in lane_regions if r.role is role] for role in Role}
    cursor = 0
    states: list[tuple[Band, Band]] = []
    for _ in range(lanes):
        fixed = _band(by_role[Role.FIXED], cursor, storage_of)
        rows = _band(by_role[Role.ROWS], fixed.offset + fixed.nbytes, storage_of)
        states.append((fixed, rows))
        cursor = rows.offset + rows.nbytes
    plans: list[LanePlan] = []
    for fixed, rows in states:
        io = _band(by_role[Role.IO], cursor, storage_of)
        plans.append(LanePlan(fixed, rows, io))
        cursor = io.offset + io.nbytes
    shared = _band([RUNS], cursor, storage_of)
    cursor += shared.nbytes
    per_tape = {
        (t.phase, t.rows): place_scratch(_lifetimes(t), _scratch_storage(t, storage_of), cursor)
        for t in tapes
    }
    stop = max((s.stop for slots in per_tape.values() for s in slots), default=cursor)
    scratch = Band(cursor, align(stop) - cursor + GUARD_NBYTES, ())
    pool = Band(scratch.offset + scratch.nbytes, align(pool_nbytes), ())
    unshared = sum(align(s.storage.nbytes) for slots in per_tape.values() for s in slots)
    total = pool.offset + pool.nbytes + GUARD_NBYTES
    return ArenaPlan(total, tuple(plans), shared, scratch, per_tape, pool, unshared)


def plan_band(regions: Sequence[Region], storage_of: StorageOf) -> Band:
    """One band from offset 0: the weights."""
    _check_names(regions)
    return _band(regions, 0, storage_of)


def place_scratch(
    lifetimes: Mapping[Region, tuple[int, int]], storage_of: StorageOf, base: int
) -> tuple[Slot, ...]:
    """Offsets from `base` for regions with inclusive lifetimes, largest first, lowest gap that
    fits.

    Two regions whose lifetimes touch never overlap. Greedy by size is the standard heuristic for
    offset assignment (Pisarchyk and Lee, 2020, arXiv 2001.03288).
    """
    placed: list[tuple[Slot, tuple[int, int]]] = []
    order = sorted(lifetimes, key=lambda r: (-storage_of(r).nbytes, lifetimes[r], r.name))
    for region in order:
        first, last = lifetimes[region]
        storage = storage_of(region)
        busy = sorted(
            (slot.offset, align(slot.stop))
            for slot, (other_first, other_last) in placed
            if other_first <= last and first <= other_last
        )
        offset = base
        for start, stop in busy:
            if offset + storage.nbytes <= start:
                break
            offset = max(offset, stop)
        placed.append((Slot(region, offset, storage), (first, last)))
    return tuple(slot for slot, _ in placed)


def _lifetimes(tape: Tape) -> Mapping[Region, tuple[int, int]]:
    """Of scratch. On a tape of few rows, regions have their place a launch before they are written:
    a backend may do two launches as one, which then writes while it still reads what the first one
    has read.
    """
    early = int(tape.rows <= FEW_ROWS)
    return {region: (first - early, last) for region, (first, last) in tape.lifetimes().items()}


def _scratch_storage(tape: Tape, storage_of: StorageOf) -> StorageOf:
    """Of scratch: one after the other for each run, where runs are apart."""
    if not tape.is_apart:
        return storage_of

    def of_all_runs(region: Region) -> Storage:
        storage = storage_of(region)
        return replace(storage, nbytes=align(storage.nbytes) * tape.max_runs)

    return of_all_runs


def _band(regions: Sequence[Region], offset: int, storage_of: StorageOf) -> Band:
    slots: list[Slot] = []
    cursor = offset
    for region in regions:
        storage = storage_of(region)
        slots.append(Slot(region, cursor, storage))
        cursor = align(cursor + storage.nbytes) + GUARD_NBYTES
    return Band(offset, cursor - offset, tuple(slots))


def _check_names(regions: Sequence[Region]) -> None:
    names = [r.name for r in regions]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise PlanError(f"regions declared twice: {twice}")
    if wrong := [r.name for r in regions if r.role in (Role.SCRATCH, Role.POOL)]:
        raise PlanError(f"not regions of a lane: {wrong}; scratch belongs to a tape")
