"""Tapes: the launches of one graph in order, and the scratch regions that live inside it.

IS: what a model records once per (phase, rows) and an engine captures once per lane. IS NOT: bound
to a lane or to addresses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flashrt.base.errors import PlanError
from flashrt.core.op import AttrValue, Launch, Op, bind
from flashrt.core.region import DType, Operand, Region, Role, View


@dataclass(slots=True)
class Tape:
    """Launches of one phase for a bucket of `rows` rows, of at most `max_runs` lanes, each of which
    has at most `run_rows` of them: all, if it is 0.

    `is_apart`: it is recorded as for one lane, and each run has scratch of its own.
    """

    phase: str
    rows: int
    max_runs: int = 1
    run_rows: int = 0
    is_apart: bool = False
    launches: list[Launch] = field(default_factory=list)
    scope: str = ""  # before names of scratch: for what is recorded again, as a step of a loop is
    _scratch: dict[str, Region] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run_rows = self.run_rows or self.rows

    def scratch(self, name: str, *shape: int, dtype: DType = DType.F32) -> Region:
        """A region that lives from the first to the last launch which uses it. One name, one region
        per tape.
        """
        name = self.scope + name
        if name in self._scratch:
            raise PlanError(f"tape {self.phase}/{self.rows}: scratch {name!r} is declared twice")
        region = Region(name, shape, dtype, Role.SCRATCH)
        self._scratch[name] = region
        return region

    def scratched(self, name: str) -> Region:
        """What `scratch` made of this name, in the scope at hand."""
        return self._scratch[self.scope + name]

    def record(self, op: Op, **bindings: Operand | AttrValue) -> None:
        """Append a launch: operands and attributes by name. Raises PlanError if a shape does not
        fit.
        """
        operands = {k: v for k, v in bindings.items() if isinstance(v, Region | View)}
        attrs = {k: v for k, v in bindings.items() if not isinstance(v, Region | View)}
        self.launches.append(bind(op, operands, attrs))

    def lifetimes(self) -> dict[Region, tuple[int, int]]:
        """First and last launch (both inclusive) that uses each scratch region.

        Raises PlanError for a region that is read before it is written, or never used.
        """
        spans: dict[Region, tuple[int, int]] = {}
        for i, launch in enumerate(self.launches):
            for param, view in zip(launch.op.params, launch.operands, strict=True):
                region = view.region
                if region.role is not Role.SCRATCH:
                    continue
                if region not in spans and param.access != "w":
                    raise PlanError(
                        f"{launch.op.name}.{param.name} reads scratch {region.name!r} before it "
                        f"is written"
                    )
                spans[region] = (spans.get(region, (i, i))[0], i)
        if unused := set(self._scratch.values()) - set(spans):
            raise PlanError(
                f"tape {self.phase}/{self.rows}: unused scratch {sorted(r.name for r in unused)}"
            )
        return spans
