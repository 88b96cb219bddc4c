"""Regions: named, typed ranges of device memory, and views of them that an op can be bound to.

IS: the nouns of the planner: what a range holds (shape, dtype), how it behaves (role), how it is
stored (layout). IS NOT: memory. A region has no address until the planner gives it an offset and a
backend allocates the arena.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from flashrt.base.errors import PlanError
from flashrt.core.groups import Groups


class Role(enum.StrEnum):
    """What may happen to a region's bytes; capsules derive from this alone what they must hold."""

    FIXED = "fixed"  # overwritten in place; a capsule stores all of it
    ROWS = "rows"  # append-only along positions; a capsule stores the rows since its parent
    IO = "io"  # between the host and a replay, or from one replay to the next; not state
    SCRATCH = "scratch"  # lives inside one tape; overlapped by lifetime
    POOL = "pool"  # where capsules live
    WEIGHT = "weight"  # immutable, in an allocation of its own


class DType(enum.StrEnum):
    """Element types. `ACT` and `ACT_WIDE` are whatever the backend feeds its matrix units with (see
    ActDTypes).
    """

    F32 = "float32"
    BF16 = "bfloat16"
    BF16X2 = "bfloat16x2"  # a value as hi + lo, two bfloat16 planes interleaved per element
    I32 = "int32"
    U32 = "uint32"
    U8 = "uint8"
    F16 = "float16"
    I8 = "int8"
    U4 = "uint4"
    U5 = "uint5"
    U6 = "uint6"
    E4M3 = "float8_e4m3"  # finite: S.1111.111 is NaN, no infinity
    E2M1 = "float4_e2m1"
    ACT = "act"
    ACT_WIDE = "act_wide"

    @property
    def nbytes(self) -> int:
        """Bytes of one element. `ACT` has none until a backend resolves it; codes of less than a
        byte have `bits` alone.
        """
        return _DTYPE_NBYTES[self]

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return _DTYPE_BITS.get(self) or 8 * self.nbytes

    @property
    def code(self) -> int:
        """Number of the dtype in kernel argument blocks (the `<param>_dtype` fields)."""
        return _DTYPE_CODE[self]


_DTYPE_NBYTES = {
    DType.F32: 4, DType.BF16: 2, DType.BF16X2: 4, DType.I32: 4, DType.U32: 4, DType.U8: 1,
    DType.F16: 2, DType.I8: 1, DType.E4M3: 1,
}  # fmt: skip
_DTYPE_BITS = {DType.U4: 4, DType.U5: 5, DType.U6: 6, DType.E2M1: 4}
_DTYPE_CODE = {
    DType.F32: 0, DType.BF16: 1, DType.BF16X2: 2, DType.I32: 3, DType.U32: 4, DType.U8: 5,
    DType.F16: 6, DType.I8: 7, DType.U4: 8, DType.U5: 9, DType.U6: 10, DType.E4M3: 11,
    DType.E2M1: 12,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ActDTypes:
    """What a backend feeds its matrix units with. `wide` is for activations whose rounding would
    show: one step finer than `narrow`, unless speed was asked for.
    """

    narrow: DType
    wide: DType

    def __str__(self) -> str:
        """Part of fingerprints: `narrow`, and `wide` where it is no finer."""
        is_usual = self.narrow is not self.wide or self.narrow is DType.F32
        return str(self.narrow) if is_usual else f"{self.narrow} throughout"


def resolve_dtype(dtype: DType, acts: ActDTypes) -> DType:
    """`ACT` and `ACT_WIDE` as what the backend feeds its matrix units with, others as they are."""
    if dtype is DType.ACT_WIDE:
        return acts.wide
    return acts.narrow if dtype is DType.ACT else dtype


class Layout(enum.StrEnum):
    """What a region is for, so that a backend can choose its storage. The leading axis is always
    outermost.
    """

    PLAIN = "plain"  # C order
    MATRIX = "matrix"  # weights [N, K] of `linear`; also gathered by row
    COLUMN_BLOCKS = "column_blocks"  # per-head state [heads, rows, cols], worked on by column
    # ROWS only, [planes, positions, cols]: scanned for dot products with one vector
    ROWS_IN_LANES = "rows_in_lanes"
    COLS_IN_LANES = (
        "cols_in_lanes"  # ROWS only, [planes, positions, cols]: summed over positions with weights
    )


# Elements that only a scale makes a value.
CODE_DTYPES = (DType.I8, DType.U4, DType.U5, DType.U6, DType.E4M3, DType.E2M1)


@dataclass(frozen=True, slots=True)
class Region:
    """A named typed range.

    `shape` is logical; for role ROWS it is (planes, max_positions, cols). `is_digested` says
    whether the bytes belong to what the next logits depend on (see `core.digest`). `groups`: of a
    quantised matrix, how its codes become values; None for one that holds values themselves.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    role: Role
    layout: Layout = Layout.PLAIN
    is_digested: bool = False
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if not self.name or any(n < 1 for n in self.shape) or not self.shape:
            raise PlanError(
                f"region {self.name!r}: shape {self.shape} needs a name and positive extents"
            )
        if self.role is Role.ROWS and len(self.shape) != 3:
            raise PlanError(
                f"region {self.name!r}: rows need (planes, max_positions, cols), got {self.shape}"
            )
        if self.groups is not None and (
            self.layout is not Layout.MATRIX or self.dtype not in CODE_DTYPES
        ):
            raise PlanError(
                f"region {self.name!r}: groups are of matrices of codes, not of {self.layout} "
                f"{self.dtype}"
            )
        in_lanes = self.layout in (Layout.ROWS_IN_LANES, Layout.COLS_IN_LANES)
        if in_lanes and self.role is not Role.ROWS:
            raise PlanError(
                f"region {self.name!r}: layout {self.layout} is for rows, role is {self.role}"
            )

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    def view(self) -> View:
        """The whole region as an operand."""
        return View(self, self.shape, 0, 0, self.shape[-1])

    def at(self, index: int) -> View:
        """Entry `index` of the leading axis, that axis dropped."""
        view = self.span(index, 1)
        return replace(view, shape=self.shape[1:])

    def span(self, start: int, count: int) -> View:
        """Entries [start, start + count) of the leading axis."""
        if not 0 <= start < start + count <= self.shape[0]:
            raise PlanError(
                f"region {self.name!r}: [{start}, {start + count}) leaves axis 0 of {self.shape}"
            )
        return View(self, (count, *self.shape[1:]), start, 0, self.shape[-1])


@dataclass(frozen=True, slots=True)
class View:
    """A region, or a part of it, as an operand of a launch: a window over axis 0, or over columns
    of a plain region.
    """

    region: Region
    shape: tuple[int, ...]
    lead: int  # first entry of the region's leading axis
    col: int  # first column (PLAIN only)
    row_stride: int  # elements from one row to the next along the last axis but one
    run_lead: int = 0  # entries of the region's leading axis from one run to the next: see `runs`

    @property
    def lead_elements(self) -> int:
        """Elements from one entry of the leading axis to the next."""
        if len(self.shape) == 1:
            return 1
        return self.row_stride * math.prod(self.shape[1:-1])

    def per_run(self) -> View:
        """The entries that a launch sees as this view are those of its run: the first run has this
        view, the next one as many entries further on. A region of scratch has them for all runs.
        """
        return replace(self, run_lead=self.shape[0])

    def cols(self, start: int, stop: int) -> View:
        """Columns [start, stop) of the last axis; rows keep the region's stride."""
        if self.region.layout is not Layout.PLAIN:
            raise PlanError(
                f"region {self.region.name!r}: columns can be cut from a plain layout only"
            )
        if not 0 <= start < stop <= self.shape[-1]:
            raise PlanError(
                f"region {self.region.name!r}: columns [{start}, {stop}) leave {self.shape}"
            )
        return replace(self, shape=(*self.shape[:-1], stop - start), col=self.col + start)

    def reshape(self, *shape: int) -> View:
        """Another shape of the same elements; the columns must be whole."""
        if math.prod(shape) != math.prod(self.shape) or self.row_stride != self.shape[-1]:
            raise PlanError(f"region {self.region.name!r}: cannot see {self.shape} as {shape}")
        return replace(self, shape=shape, row_stride=shape[-1])


Operand = Region | View


def as_view(operand: Operand) -> View:
    """The operand as a view."""
    return operand.view() if isinstance(operand, Region) else operand
