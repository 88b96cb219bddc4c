"""An engine's memory on paper: what it would allocate on a GPU, and launches with their addresses.

IS: the engine's plan, and an arena over no memory, so that launches are those that a device would
capture. IS NOT: a backend: nothing can be read, written or run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, cast

from flashrt.backends.cuda import layouts
from flashrt.backends.cuda.device import Capacities
from flashrt.core.arena import Arena
from flashrt.core.backend import Backend, BoundLaunch, Storage
from flashrt.core.planner import plan_arena, plan_band
from flashrt.core.region import ActDTypes, Region, Role
from flashrt.engine.tokens import POOL_DEFAULT
from flashrt.models import TokenModel
from flashrt.models.model import tapes_of

_ADDRESS: Final = 1 << 32


class _Nowhere:
    """What an arena asks of a backend before it has addresses, and the memory that it gets."""

    address, nbytes = _ADDRESS, 0

    def __init__(self, acts: ActDTypes) -> None:
        self.acts = acts

    def allocate(self, name: str, nbytes: int) -> _Nowhere:
        """All allocations have one address: nobody follows it."""
        del name, nbytes
        return self

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """There is nothing to fill."""


class PaperEngine:
    """One lane of a model, with the default room for capsules, and the activations of a precision
    (`ACTS` of the device).
    """

    def __init__(self, model: TokenModel, acts: ActDTypes) -> None:
        """Raises PlanError as loading would."""

        def storage(region: Region) -> Storage:
            return layouts.storage(region, acts)

        self.model, self.acts = model, acts
        tapes = tapes_of(model, lanes=1)
        fixed, rows = (
            plan_band([r for r in model.lane_regions if r.role is role], storage).nbytes
            for role in (Role.FIXED, Role.ROWS)
        )
        pool_bytes = POOL_DEFAULT.fixed * fixed + POOL_DEFAULT.lanes * rows
        plan = plan_arena(model.lane_regions, tapes, storage, lanes=1, pool_nbytes=pool_bytes)
        weights = plan_band([rule.region for rule in model.weights], storage)
        arena = Arena(cast(Backend, _Nowhere(acts)), plan, weights)
        self.weights_bytes = weights.nbytes
        self.arena_bytes = plan.nbytes
        self._bound = {(tape.phase, tape.rows): arena.bind(tape) for tape in tapes}

    @property
    def nbytes(self) -> int:
        """All that a device must have, with what it keeps for kernels and graphs."""
        return self.weights_bytes + self.arena_bytes + Capacities().reserve_bytes

    @property
    def graphs(self) -> Mapping[tuple[str, int], Sequence[BoundLaunch]]:
        """The launches of every tape, by phase and rows, in order."""
        return self._bound
