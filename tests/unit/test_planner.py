"""The planner against an oracle that recomputes lifetimes from the launches by itself."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.base.errors import PlanError
from flashrt.core.backend import Storage
from flashrt.core.op import Op, Param
from flashrt.core.planner import ALIGN, GUARD_NBYTES, plan_arena
from flashrt.core.region import DType, Region, Role
from flashrt.core.tape import Tape

FIRST = Op("first", "y = 1", (Param("y", "w", ("N",)),))
STEP = Op("step", "y = f(x)", (Param("x", "r", ("N",)), Param("y", "w", ("M",))))


def plain(region: Region) -> Storage:
    nbytes = region.size * region.dtype.nbytes
    return Storage(nbytes, nbytes // region.shape[0], nbytes // region.shape[0])


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    """A random tape in which every scratch region is written before it is read."""
    tape = Tape("prefill", draw(st.integers(1, 4)))
    live = [tape.scratch("s0", draw(st.integers(1, 3000)))]
    tape.record(FIRST, y=live[0])
    for i in range(1, draw(st.integers(1, 25))):
        target = draw(st.sampled_from(live)) if draw(st.booleans()) else None
        if target is None:
            target = tape.scratch(f"s{i}", draw(st.integers(1, 3000)))
        tape.record(STEP, x=draw(st.sampled_from(live)), y=target)
        live.append(target)
    return tape


@given(st.lists(tapes(), min_size=1, max_size=3, unique_by=lambda t: t.rows), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_no_two_live_regions_overlap(recorded: list[Tape], lanes: int) -> None:
    regions = [
        Region("cursor", (16,), DType.I32, Role.FIXED),
        Region("state", (3, 5), DType.F32, Role.FIXED),
        Region("rows", (2, 33, 8), DType.BF16, Role.ROWS),
        Region("logits", (7,), DType.F32, Role.IO),
    ]
    plan = plan_arena(regions, recorded, plain, lanes=lanes, pool_nbytes=1000)
    fixed = [(s.offset, s.stop) for s in plan.slots()]
    fixed.append((plan.pool.offset, plan.pool.offset + plan.pool.nbytes))
    assert len(fixed) == lanes * len(regions) + 2  # and the table of runs
    for role in (Role.FIXED, Role.ROWS, Role.IO):  # kernels find a lane by its number
        for region in (r for r in regions if r.role is role):
            at = [slot.offset for slot in plan.slots() if slot.region is region]
            assert {b - a for a, b in itertools.pairwise(at)} <= {plan.lane_stride(role)}
    for tape in recorded:
        placed = {s.region.name: s for s in plan.tapes[tape.phase, tape.rows]}
        used: dict[str, list[int]] = {}
        for i, launch in enumerate(tape.launches):
            for view in launch.operands:
                used.setdefault(view.region.name, []).append(i)
        assert set(used) == set(placed)
        everything = fixed + [(s.offset, s.stop) for s in placed.values()]
        assert all(a % ALIGN == 0 and 0 <= a < b <= plan.nbytes for a, b in everything)
        for a in placed.values():
            for b in placed.values():
                if a.region.name < b.region.name:
                    first, second = used[a.region.name], used[b.region.name]
                    starts = max(min(first), min(second)) - 1  # its place, a launch early
                    alive_together = starts <= min(max(first), max(second))
                    apart = a.stop <= b.offset or b.stop <= a.offset
                    assert apart or not alive_together
            assert all(a.stop <= o or p <= a.offset for o, p in fixed)
    for i, (a, b) in enumerate(fixed):
        assert all(b <= c or d <= a for c, d in fixed[i + 1 :])


def test_scratch_is_shared_over_time() -> None:
    tape = Tape("decode", 1)
    previous = tape.scratch("s0", 1000)
    tape.record(FIRST, y=previous)
    for i in range(1, 20):
        current = tape.scratch(f"s{i}", 1000)
        tape.record(STEP, x=previous, y=current)
        previous = current
    plan = plan_arena([], [tape], plain, lanes=1, pool_nbytes=0)
    # of a launch, and of what the next one writes
    assert plan.scratch.nbytes == 3 * 4096 + GUARD_NBYTES
    assert plan.scratch_unshared_nbytes == 20 * 4096


def test_reading_scratch_before_it_is_written_is_refused() -> None:
    tape = Tape("decode", 1)
    tape.record(STEP, x=tape.scratch("x", 3), y=tape.scratch("y", 3))
    with pytest.raises(PlanError, match="reads scratch 'x' before it is written"):
        tape.lifetimes()


def test_duplicate_names_are_refused() -> None:
    twice = [Region("a", (1,), DType.F32, Role.FIXED)] * 2
    with pytest.raises(PlanError, match="declared twice"):
        plan_arena(twice, [], plain, lanes=1, pool_nbytes=0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (Region("x", (3,), DType.BF16, Role.SCRATCH), None, "wants float32"),
        (Region("x", (3, 1), DType.F32, Role.SCRATCH), None, "wants"),
        (None, Region("w", (4,), DType.F32, Role.WEIGHT), "writes weight"),
    ],
)
def test_shapes_are_checked_at_record_time(
    x: Region | None, y: Region | None, message: str
) -> None:
    default = Region("d", (3,), DType.F32, Role.SCRATCH)
    with pytest.raises(PlanError, match=message):
        Tape("decode", 1).record(STEP, x=x or default, y=y or default)


def test_a_symbol_has_one_value_per_launch() -> None:
    add = Op("add", "y = x", (Param("x", "r", ("N",)), Param("y", "w", ("N",))))
    a, b = (Region(n, (s,), DType.F32, Role.SCRATCH) for n, s in (("a", 3), ("b", 4)))
    with pytest.raises(PlanError, match=r"add\.y: N is 3, got 4"):
        Tape("decode", 1).record(add, x=a, y=b)
