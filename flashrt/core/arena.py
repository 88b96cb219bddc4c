"""The arena: one allocation for all mutable state, addressed by its plan; beside it the weights.

IS: region -> address, host access to regions, guards and poison. IS NOT: the layout (planner), or
policy. It exists because one base address makes a capsule a list of copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import BackendError, PlanError
from flashrt.core.backend import Backend, BoundLaunch, Bytes, Memory
from flashrt.core.op import Launch, Param
from flashrt.core.planner import (
    GUARD_NBYTES,
    ArenaPlan,
    Band,
    LanePlan,
    Slot,
    align,
)
from flashrt.core.region import Region, Role, View, resolve_dtype
from flashrt.core.runs import STRIDE_UNIT, Run, Stride, table_of
from flashrt.core.tape import Tape

GUARD_BYTE = 0xA5
POISON_BYTE = 0xFF  # NaN in float32 and bfloat16, -1 in int32


class Arena:
    """Addresses of regions in the two allocations of a backend."""

    def __init__(self, backend: Backend, plan: ArenaPlan, weights: Band) -> None:
        """Allocates both. Raises BackendError when the device has no room."""
        self.backend = backend
        self.plan = plan
        self.weights = weights
        self.memory: Memory = backend.allocate("arena", plan.nbytes)
        self.weight_memory: Memory = backend.allocate("weights", max(weights.nbytes, 1))
        self._weight_slots = {s.region: s for s in weights.slots}
        for lane in plan.lanes:
            for band in (lane.fixed, lane.io):
                backend.fill(self.memory.address + band.offset, band.nbytes, 0)
        backend.fill(self.runs_address, plan.shared.nbytes, 0)
        for offset in self._guards():
            backend.fill(self.memory.address + offset, GUARD_NBYTES, GUARD_BYTE)

    def close(self) -> None:
        """Give all memory back. Whoever asks for an address afterwards gets a BackendError."""
        self.memory = self.weight_memory = _Closed()
        self.backend.close()

    def lane(self, lane: int) -> LanePlan:
        """The bands of a lane."""
        return self.plan.lanes[lane]

    @property
    def runs_address(self) -> int:
        """Of the table of runs."""
        return self.memory.address + self.plan.shared.slots[0].offset

    def bind(self, tape: Tape) -> list[BoundLaunch]:
        """The tape's launches with addresses of lane 0, and how they move to the runs of a replay.

        A launch of which nothing is a lane's sees the rows of all runs, and does not move.
        """
        bands = (*_bands(self.lane(0)), self.plan.shared)
        slots = {s.region: s for band in bands for s in band.slots}
        slots |= {s.region: s for s in self.plan.tapes[tape.phase, tape.rows]}
        return [self._bound(launch, slots, tape) for launch in tape.launches]

    def write_runs(self, runs: tuple[Run, ...]) -> None:
        """The table, for launches outside a graph."""
        self.backend.write(self.runs_address, np.frombuffer(table_of(runs), np.uint8))

    def read(self, slot: Slot) -> NDArray[np.generic]:
        """A region as a logical array (bfloat16 as uint16 bits)."""
        raw: Bytes = np.empty(slot.storage.nbytes, np.uint8)
        self.backend.read(self.memory.address + slot.offset, raw)
        return self.backend.unpack(slot.region, raw)

    def write(self, slot: Slot, array: NDArray[np.generic]) -> None:
        """A logical array into a region."""
        if array.shape != slot.region.shape:
            raise PlanError(
                f"region {slot.region.name!r} is {slot.region.shape}, got {array.shape}"
            )
        raw: Bytes = np.empty(slot.storage.nbytes, np.uint8)
        self.backend.pack(slot.region, array, raw)
        self.backend.write(self.memory.address + slot.offset, raw)

    def poison_scratch(self) -> None:
        """0xFF over all scratch: legal at any commit boundary."""
        band = self.plan.scratch
        self._fill(band.offset, band.nbytes - GUARD_NBYTES, POISON_BYTE)

    def poison_lane(self, lane: int) -> None:
        """0xFF over everything that a restore must bring back, and over the lane's io."""
        for band in _bands(self.lane(lane)):
            for slot in band.slots:
                self._fill(slot.offset, slot.storage.nbytes, POISON_BYTE)

    def check_guards(self) -> None:
        """Every guard still holds its pattern. Raises PlanError naming what lies before a broken
        one.
        """
        raw: Bytes = np.empty(GUARD_NBYTES, np.uint8)
        for offset in self._guards():
            self.backend.read(self.memory.address + offset, raw)
            if (raw != GUARD_BYTE).any():
                before = [s.region.name for s in self.plan.slots() if s.offset < offset]
                name = before[-1] if before else "the arena"
                raise PlanError(f"a kernel wrote past {name!r}: guard at {offset} is broken")

    def _guards(self) -> Sequence[int]:
        inside = [align(s.stop) for s in self.plan.slots()]
        scratch, pool = self.plan.scratch, self.plan.pool
        after_scratch = scratch.offset + scratch.nbytes - GUARD_NBYTES
        return [*inside, after_scratch, pool.offset + pool.nbytes]

    def _fill(self, offset: int, nbytes: int, byte: int) -> None:
        if nbytes:
            self.backend.fill(self.memory.address + offset, nbytes, byte)

    def _bound(self, launch: Launch, slots: Mapping[Region, Slot], tape: Tape) -> BoundLaunch:
        addresses = tuple(self._address(v, slots) for v in launch.operands)
        pairs = zip(launch.op.params, launch.operands, strict=True)
        strides = tuple(self._stride(p, v, slots, tape) for p, v in pairs)
        if not (tape.is_apart or any(s.lane for s in strides)):
            return BoundLaunch(launch, addresses)
        return BoundLaunch(launch, addresses, self.runs_address, strides, tape.max_runs)

    def _stride(self, param: Param, view: View, slots: Mapping[Region, Slot], tape: Tape) -> Stride:
        region = view.region
        if region.role is Role.WEIGHT or slots[region] in self.plan.shared.slots:
            return Stride()
        if region.role is not Role.SCRATCH:
            return Stride(self.plan.lane_stride(region.role) // STRIDE_UNIT)
        if tape.is_apart:
            return Stride(run=slots[region].storage.nbytes // tape.max_runs)
        bits = resolve_dtype(region.dtype, self.backend.acts).bits
        if view.run_lead:
            return Stride(run=view.run_lead * slots[region].storage.lead_nbytes)
        has_rows = param.dims[0] in ("T", "TP") and view.shape[0] > 1
        return Stride(row=view.lead_elements * bits // 8 if has_rows else 0)

    def _address(self, view: View, slots: Mapping[Region, Slot]) -> int:
        if view.region.role is Role.WEIGHT:
            slot, base = self._weight_slots[view.region], self.weight_memory.address
        elif view.region in slots:
            slot, base = slots[view.region], self.memory.address
        else:
            raise PlanError(f"region {view.region.name!r} is in no band of the plan")
        bits = resolve_dtype(view.region.dtype, self.backend.acts).bits
        return base + slot.offset + view.lead * slot.storage.lead_nbytes + view.col * bits // 8


class _Closed:
    """Memory that was given back."""

    nbytes = 0

    @property
    def address(self) -> int:
        raise BackendError("the engine is closed and its memory given back; load another engine")


def _bands(lane: LanePlan) -> tuple[Band, Band, Band]:
    return lane.fixed, lane.rows, lane.io
