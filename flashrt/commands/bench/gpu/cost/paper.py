"""An engine's memory on paper: what it would allocate on a GPU, and launches with their addresses.

IS: the engine's plan, and an arena over no memory, so that launches are those that a device would
capture. IS NOT: a backend: nothing can be read, written or run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, cast

from flashrt.backends.cuda import layouts
from flashrt.backends.cuda.device import Capacities, CudaDevice
from flashrt.backends.cuda.fusion import SendTo, fuse
from flashrt.commands.bench.gpu.cost.formats import model_of
from flashrt.core.arena import Arena
from flashrt.core.backend import Backend, BoundLaunch, Storage
from flashrt.core.planner import ArenaPlan, Band, plan_arena, plan_band
from flashrt.core.region import ActDTypes, Region, Role
from flashrt.core.tape import Tape
from flashrt.engine.buckets import prefill_rows
from flashrt.engine.tokens import POOL_DEFAULT
from flashrt.models.model import Model, tapes_of

ADDRESS: Final = 1 << 32


class _Nowhere:
    """What an arena asks of a backend before it has addresses, and the memory that it gets."""

    address, nbytes = ADDRESS, 0
    most_rows = CudaDevice.most_rows

    def __init__(self, acts: ActDTypes) -> None:
        self.acts = acts

    def storage(self, region: Region) -> Storage:
        """See Backend."""
        return layouts.storage(region, self.acts)

    def allocate(self, name: str, nbytes: int) -> _Nowhere:
        """All allocations have one address: nobody follows it."""
        del name, nbytes
        return self

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """There is nothing to fill."""


class Paper(NamedTuple):
    """A model's memory on a GPU, and its launches by phase and rows, in order."""

    plan: ArenaPlan
    weights: Band
    bound: Mapping[tuple[str, int], Sequence[BoundLaunch]]


def lay_out(model: Model, acts: ActDTypes, tapes: Sequence[Tape], pool_nbytes: int = 0) -> Paper:
    """One lane, and the tapes as `Arena.bind` gives them. Raises PlanError as loading would."""
    nowhere = cast(Backend, _Nowhere(acts))
    plan = plan_arena(model.lane_regions, tapes, nowhere.storage, lanes=1, pool_nbytes=pool_nbytes)
    weights = plan_band([rule.region for rule in model.weights], nowhere.storage)
    arena = Arena(nowhere, plan, weights)
    return Paper(plan, weights, {(tape.phase, tape.rows): arena.bind(tape) for tape in tapes})


class PaperEngine:
    """One lane of a model, with the default room for capsules, and the activations of a precision
    (`ACTS` of the device). Its graphs are as a device captures them: launches are fused.
    """

    def __init__(self, shape: str, form: str, max_positions: int, acts: ActDTypes) -> None:
        """Of a named shape with its weights in a format: see `model_of`. Raises CheckpointError for
        unknown names, PlanError as loading would.
        """
        nowhere = cast(Backend, _Nowhere(acts))
        usual = model_of(shape, form, max_positions)
        rows = prefill_rows(usual, nowhere, max_positions)
        model = model_of(shape, form, max_positions, rows)
        fixed, per_position = (
            plan_band([r for r in model.lane_regions if r.role is role], nowhere.storage).nbytes
            for role in (Role.FIXED, Role.ROWS)
        )
        pool_bytes = POOL_DEFAULT.fixed * fixed + POOL_DEFAULT.lanes * per_position
        paper = lay_out(model, acts, tapes_of(model, lanes=1), pool_bytes)
        self.model, self.acts = model, acts
        self.weights_bytes = paper.weights.nbytes
        self.arena_bytes = paper.plan.nbytes
        send_to = SendTo(ADDRESS, ADDRESS)
        self._graphs = {
            key: fuse(bound, acts, ADDRESS, send_to) for key, bound in paper.bound.items()
        }

    @property
    def nbytes(self) -> int:
        """All that a device must have, with what it keeps for kernels and graphs."""
        return self.weights_bytes + self.arena_bytes + Capacities().reserve_bytes

    @property
    def graphs(self) -> Mapping[tuple[str, int], Sequence[BoundLaunch]]:
        """The launches of every tape, by phase and rows, in order."""
        return self._graphs
