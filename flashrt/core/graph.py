"""Graphs: captured tapes, keyed by (phase, rows), captured once and replayed for every position of
every lane.

IS: the table and the seal. IS NOT: capture itself; a backend does it. A key holds neither position
nor lane: kernels read the cursor, and the table of runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flashrt.base.errors import PlanError, SealedError
from flashrt.core.arena import Arena
from flashrt.core.backend import Backend, Graph
from flashrt.core.runs import Run, table_of
from flashrt.core.tape import Tape


class GraphKey(NamedTuple):
    """What a graph is captured for; a plain tuple, because every replay makes one."""

    phase: str
    rows: int


class GraphTable:
    """All graphs of an engine."""

    def __init__(self, backend: Backend, arena: Arena) -> None:
        self._backend = backend
        self._arena = arena
        self._runs_at = arena.runs_address
        self._graphs: dict[GraphKey, Graph] = {}
        self._is_sealed = False

    def capture(self, tape: Tape) -> GraphKey:
        """Capture a tape. Raises SealedError after `seal`, PlanError for a key twice."""
        key = GraphKey(tape.phase, tape.rows)
        if self._is_sealed:
            raise SealedError(f"capture of {key} after seal; graphs are captured at load")
        if key in self._graphs:
            raise PlanError(f"{key} is captured already")
        self._graphs[key] = self._backend.capture(self._arena.bind(tape))
        return key

    def replay(self, key: GraphKey, runs: tuple[Run, ...]) -> None:
        """Launch a graph on rows of lanes. Raises PlanError for a key that was not captured."""
        try:
            graph = self._graphs[key]
        except KeyError:
            raise PlanError(f"no graph {key}; captured: {sorted(self._graphs)}") from None
        self._backend.replay(graph, table_of(runs), self._runs_at)

    def seal(self) -> None:
        """Nothing is captured from here on."""
        self._is_sealed = True

    def close(self) -> None:
        """No graph is left: their launches name memory that is given back."""
        self._graphs = {}

    @property
    def graphs(self) -> Mapping[GraphKey, Graph]:
        """What was captured."""
        return self._graphs
