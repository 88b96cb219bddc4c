"""The time of graphs: a decoded token, a prompt in launches of the engine, the first token.

IS: tapes as the engine records them, expanded for a GPU that need not be there, and sums. IS NOT:
the time of one launch (launch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from flashrt.backends.cuda.kernels import KernelLaunch, expand
from flashrt.commands.bench.gpu.cost.code import Codes
from flashrt.commands.bench.gpu.cost.devices import Gpu
from flashrt.commands.bench.gpu.cost.effort import Task, moved_by
from flashrt.commands.bench.gpu.cost.launch import LaunchCost, Limit, cost_of, side_by_side
from flashrt.commands.bench.gpu.cost.paper import PaperEngine
from flashrt.commands.bench.gpu.cost.parts import parts_of
from flashrt.core.backend import Progress
from flashrt.core.op import Launch
from flashrt.core.region import Layout, Role
from flashrt.models.model import DECODE, PREFILL, SAMPLE

# From the end of a replay to the first kernel of the next one, which is queued already. Assumed; no
# copy is between them: the replay of a token sends it by itself (launch.BUS_TRIP_US).
REPLAY_US: Final = 6.25


@dataclass(slots=True)
class OpCost:
    """All launches of one op and size in a graph, or in several replays of it."""

    op: str
    dims: Mapping[str, int]
    weights: str  # how its weight matrix is stored, if it has one
    kernels: tuple[str, ...]
    launches: int = 0  # of the op
    us: float = 0.0
    dram_bytes: int = 0
    by_limit: dict[Limit, float] = field(default_factory=dict)  # us

    @property
    def limit(self) -> Limit:
        """What most of its time is for."""
        return max(self.by_limit, key=lambda limit: self.by_limit[limit])

    def add(self, costs: Sequence[LaunchCost], times: int) -> None:
        """So many launches of the op, each of these kernels."""
        self.launches += times
        for cost in costs:
            self.us += times * cost.us
            self.dram_bytes += times * cost.dram_bytes
            for limit, us in ((Limit.LAUNCH, cost.launch), (cost.need, cost.busy)):
                self.by_limit[limit] = self.by_limit.get(limit, 0.0) + times * us


@dataclass(frozen=True, slots=True)
class GraphCost:
    """One graph replayed once, or the replays of a prompt. `replays` cost REPLAY_US each."""

    phase: str
    rows: int  # of a replay, the widest
    position: int  # where the first row is
    replays: int
    kernels: int  # launches of CUDA kernels
    ops: tuple[OpCost, ...]

    @property
    def us(self) -> float:
        """All of it."""
        return sum(op.us for op in self.ops) + self.replays * REPLAY_US

    @property
    def dram_bytes(self) -> int:
        """Read and written."""
        return sum(op.dram_bytes for op in self.ops)

    @property
    def by_limit(self) -> dict[Limit, float]:
        """Microseconds of each limit; starting a replay counts as launch."""
        found = dict.fromkeys(Limit, 0.0)
        found[Limit.LAUNCH] += self.replays * REPLAY_US
        for op in self.ops:
            for limit, us in op.by_limit.items():
                found[limit] += us
        return found


_Key = tuple[object, ...]


class CostModel:
    """An engine on a GPU."""

    def __init__(
        self,
        engine: PaperEngine,
        gpu: Gpu,
        codes: Codes | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Without `codes`, instructions are not counted: issue and latency are nothing."""
        self.engine, self.gpu, self.codes = engine, gpu, codes
        self._progress = progress
        self._tapes: dict[tuple[str, int], list[tuple[Launch, int]]] = {}
        self._expanded: dict[_Key, tuple[KernelLaunch, ...]] = {}

    # -- what is asked --------------------------------------------------------------------------

    def decode(self, position: int) -> GraphCost:
        """One token at a position, sampled greedily."""
        return self._graph(DECODE, [(1, 1, position)])

    def prefill(self, n_tokens: int) -> GraphCost:
        """A prompt from position 0, in launches of the largest bucket, as the engine makes them."""
        widest, parts = self.engine.model.buckets[-1], []
        for start in range(0, n_tokens, widest):
            rows = min(widest, n_tokens - start)
            parts.append((next(b for b in self.engine.model.buckets if b >= rows), rows, start))
        return self._graph(PREFILL, parts)

    def first_token(self) -> GraphCost:
        """What follows a prompt: head and sampling."""
        return self._graph(SAMPLE, [(1, 1, 0)])

    def launches(self, phase: str, rows: int) -> list[KernelLaunch]:
        """The kernel launches of a graph, in no order."""
        found = []
        for launch, times in self._grouped(phase, rows):
            found += list(self._expand(launch)) * times
        return found

    @property
    def fits(self) -> bool:
        """Whether the GPU has room for what loading would allocate."""
        return self.engine.nbytes <= self.gpu.memory_bytes

    # -- how it is found ------------------------------------------------------------------------

    def _graph(self, phase: str, parts: Sequence[tuple[int, int, int]]) -> GraphCost:
        """Replays of (rows of the tape, valid rows, position)."""
        if self.codes is not None:
            wanted = [
                of_part
                for rows in {rows for rows, _, _ in parts}
                for launch, _ in self._grouped(phase, rows)
                for kernel in self._expand(launch)
                for _, of_part in parts_of(launch, kernel)
            ]
            self.codes.prepare(wanted, self._progress)
        found: dict[_Key, OpCost] = {}
        n_kernels = 0
        for tape_rows, rows, position in parts:
            is_resident = self._lasting_bytes(phase, tape_rows) <= self.gpu.l2_bytes
            for launch, times in self._grouped(phase, tape_rows):
                kernels = self._expand(launch)
                n_kernels += times * len(kernels)
                costs = self._costs(launch, kernels, rows, position, is_resident)
                key = (launch.op.name, tuple(launch.dims.items()), _stored(launch))
                one = found.setdefault(key, OpCost(
                    launch.op.name, dict(launch.dims), _stored(launch),
                    tuple(dict.fromkeys(k.kernel for k in kernels)),
                ))  # fmt: skip
                one.add(costs, times)
        widest = max(rows for rows, _, _ in parts)
        ops = tuple(sorted(found.values(), key=lambda op: -op.us))
        return GraphCost(phase, widest, parts[0][2], len(parts), n_kernels, ops)

    def _costs(
        self,
        launch: Launch,
        kernels: Sequence[KernelLaunch],
        rows: int,
        position: int,
        is_resident: bool,
    ) -> list[LaunchCost]:
        valid = min(rows, launch.dims.get("T", 1))
        costs = []
        for i, kernel in enumerate(kernels):
            beside = []
            for one, of_part in parts_of(launch, kernel):
                moved = moved_by(one, self.engine.acts, position)
                task = Task(of_part, one, self.engine.acts, valid, position, moved, i == 0)
                code = None if self.codes is None else self.codes.of(of_part)
                beside.append(cost_of(task, self.gpu, code, is_resident))
            costs.append(side_by_side(beside))
        return costs

    def _grouped(self, phase: str, rows: int) -> list[tuple[Launch, int]]:
        """Launches of a graph that cost the same, and how many of them there are."""
        if (phase, rows) not in self._tapes:
            groups: dict[_Key, list[Launch]] = {}
            for bound in self.engine.graphs[phase, rows]:
                groups.setdefault(_cost_key(bound.launch), []).append(bound.launch)
            self._tapes[phase, rows] = [(some[0], len(some)) for some in groups.values()]
        return self._tapes[phase, rows]

    def _expand(self, launch: Launch) -> tuple[KernelLaunch, ...]:
        key = _cost_key(launch)
        if key not in self._expanded:
            gpu = self.gpu
            self._expanded[key] = expand(launch, self.engine.acts, gpu.multiprocessors, gpu.arch)
        return self._expanded[key]

    def _lasting_bytes(self, phase: str, rows: int) -> int:
        """What a replay at position 0 moves that outlives it."""
        tape = self._grouped(phase, rows)
        return sum(times * moved_by(launch, self.engine.acts, 0).lasting for launch, times in tape)


def _cost_key(launch: Launch) -> _Key:
    views = (
        (v.shape, v.region.dtype, v.region.groups, v.region.role, v.region.layout)
        for v in launch.operands
    )
    return (launch.op.name, tuple(launch.dims.items()), launch.attrs, tuple(views))


def _stored(launch: Launch) -> str:
    """How the weight matrices of a launch are stored; empty where it has none."""
    found = []
    for view in launch.operands:
        region = view.region
        if region.role is Role.WEIGHT and region.layout is Layout.MATRIX:
            groups = region.groups
            found.append(str(region.dtype) + (f", groups of {groups.size}" if groups else ""))
    return " and ".join(found)
