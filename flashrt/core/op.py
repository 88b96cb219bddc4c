"""Ops: the signatures of kernels; launches: ops with regions bound; and the argument block that all
backends read.

IS: shape, dtype and access checks at record time, and the one definition of a kernel's argument
struct. IS NOT: code. A backend maps an op's name to its kernel.

The argument block of op `f` is the C struct `f_args` (see `c_struct`): pointers of the params; as
int32 the dims by first appearance, `<param>_stride` where strided, `_dtype` where there is a
choice, `_group`, `_outer`, `_scales` where there may be groups (0, 0, -1 without); the attributes;
the table of runs, NULL where operands stay, and their strides (see runs). `ACT` is void: a constant
of the backend. CPU kernels get a pointer to it, moved already; CUDA kernels a copy, and move it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from flashrt.base.errors import PlanError
from flashrt.core.region import (
    ActDTypes,
    DType,
    Layout,
    Operand,
    Role,
    View,
    as_view,
    resolve_dtype,
)
from flashrt.core.runs import Stride

Access = Literal["r", "w", "rw"]
AttrValue = int | float
_SYMBOL = re.compile(r"[A-Za-z]\w*")
_C_TYPE = {
    DType.F32: "float", DType.BF16: "uint16_t", DType.BF16X2: "uint32_t", DType.I32: "int32_t",
    DType.U32: "uint32_t", DType.U8: "uint8_t",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Param:
    """One operand of an op: dims are sizes, symbols, or products and sums of symbols (checked,
    never solved for).
    """

    name: str
    access: Access
    dims: tuple[int | str, ...]
    dtypes: tuple[DType, ...] = (DType.F32,)
    layout: Layout = Layout.PLAIN
    is_strided: bool = False  # a window over columns of a wider region is welcome
    words: type[IntEnum] | None = None  # names of elements of the last dimension: see core.header
    may_be_grouped: bool = False  # quantised matrices are welcome

    @property
    def c_type(self) -> str:
        """Of the pointer in the argument block."""
        pointee = _C_TYPE.get(self.dtypes[0], "void") if len(self.dtypes) == 1 else "void"
        return f"{'const ' if self.access == 'r' else ''}{pointee} *"


@dataclass(frozen=True, slots=True)
class Attr:
    """A constant of a launch."""

    name: str
    kind: Literal["int32", "float32"] = "int32"
    names: type[IntEnum] | None = None  # of its values: see core.header


@dataclass(frozen=True, slots=True)
class Op:
    """A signature: what a kernel reads and writes, and how the shapes hang together."""

    name: str
    doc: str
    params: tuple[Param, ...]
    attrs: tuple[Attr, ...] = ()
    constants: tuple[tuple[str, int], ...] = ()  # that its kernels share with Python
    multiples: tuple[tuple[str, int], ...] = ()  # dims, and what divides them
    at_most: tuple[tuple[str, str], ...] = ()  # dims, and those that they may not exceed

    @property
    def signature(self) -> str:
        """All of it but the doc, as text: what fingerprints cover."""
        params = [
            f"{p.access} {p.name} {p.dims} {','.join(p.dtypes)} {p.layout} {p.is_strided}"
            + " grouped" * p.may_be_grouped
            for p in self.params
        ]
        attrs = [f"{a.kind} {a.name}" for a in self.attrs]
        return "\n".join([self.name, *params, *attrs])

    @property
    def symbols(self) -> tuple[str, ...]:
        """Dimension symbols in order of first appearance: the dims of the argument block."""
        seen: dict[str, None] = {}
        for param in self.params:
            for dim in param.dims:
                if isinstance(dim, str):
                    seen.update(dict.fromkeys(_SYMBOL.findall(dim)))
        return tuple(seen)

    @property
    def struct_format(self) -> str:
        """`struct` format of the argument block."""
        return f"{self._still_format}P{3 * len(self.params)}i0P"

    @property
    def runs_offset(self) -> int:
        """Where in the argument block the table of runs stands, and behind it the strides."""
        return struct.calcsize(f"{self._still_format}0P")

    @property
    def _still_format(self) -> str:
        ints = len(self.symbols)
        ints += sum(p.is_strided for p in self.params) + sum(len(p.dtypes) > 1 for p in self.params)
        ints += 3 * sum(p.may_be_grouped for p in self.params)
        attrs = "".join("i" if a.kind == "int32" else "f" for a in self.attrs)
        return f"@{len(self.params)}P{ints}i{attrs}"

    def c_struct(self) -> str:
        """The argument block as a C declaration (uint8_t .. int32_t must be defined)."""
        lines = []
        for p in self.params:
            dims = ", ".join(str(d) for d in p.dims)
            lines.append(f"  {p.c_type}{p.name};  /* {p.access} [{dims}] {p.layout} */")
        lines += [f"  int32_t {s};" for s in self.symbols]
        lines += [f"  int32_t {p.name}_stride;" for p in self.params if p.is_strided]
        lines += [f"  int32_t {p.name}_dtype;" for p in self.params if len(p.dtypes) > 1]
        lines += [
            f"  int32_t {p.name}_{what};"
            for p in self.params
            if p.may_be_grouped
            for what in ("group", "outer", "scales")
        ]
        lines += [f"  {'int32_t' if a.kind == 'int32' else 'float'} {a.name};" for a in self.attrs]
        lines.append("  const int32_t *runs;  /* NULL: operands stay */")
        lines.append(f"  int32_t strides[{len(self.params)}][3];  /* lane, row, run */")
        doc = self.doc.replace("*/", "* /")  # which would end the comment
        return (
            f"/* {self.name}: {doc} */\ntypedef struct {{\n"
            + "\n".join(lines)
            + f"\n}} {self.name}_args;\n"
        )

    def c_mover(self) -> str:
        """A C function that moves an argument block to a run, and says whether there is such a run:
        `RUN_FUNCTION int <op>_enter_run(<op>_args *a, int run)`.
        """
        word = "RUNS_FIRST + RUN_WORDS * run"
        lines = [
            "  const int32_t *runs = a->runs;",
            "  if (!runs) return run == 0;",
            "  if (run >= runs[RUNS_COUNT]) return 0;",
            f"  const int64_t lane = runs[{word} + RUN_LANE] * (int64_t)RUNS_STRIDE_UNIT;",
            f"  const int64_t row = runs[{word} + RUN_FIRST_ROW];",
        ]
        for i, p in enumerate(self.params):
            if p.layout is not Layout.MATRIX:  # a weight, which stays
                by = f"a->strides[{i}]"
                move = f"lane * {by}[0] + row * {by}[1] + (int64_t)run * {by}[2]"
                lines.append(f"  a->{p.name} = ({p.c_type})((const char *)a->{p.name} + ({move}));")
        return (
            f"RUN_FUNCTION int {self.name}_enter_run({self.name}_args *a, int run) {{\n"
            + "\n".join(lines)
            + "\n  return 1;\n}\n"
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """An op with its operands and constants, shapes checked."""

    op: Op
    operands: tuple[View, ...]  # in the order of op.params
    dims: Mapping[str, int]
    attrs: tuple[AttrValue, ...]
    _by_name: Mapping[str, View] = field(repr=False)

    def operand(self, name: str) -> View:
        """The operand bound to a param."""
        return self._by_name[name]

    def attr(self, name: str) -> AttrValue:
        """The value of an attribute."""
        return self.attrs[[a.name for a in self.op.attrs].index(name)]

    def pack(
        self,
        addresses: Sequence[int],
        acts: ActDTypes,
        runs: int = 0,
        strides: Sequence[Stride] = (),
    ) -> bytes:
        """The argument block, given the device address of each operand; and of the table of runs,
        where operands move with it.
        """
        values: list[int | float] = list(addresses)
        values += [self.dims[s] for s in self.op.symbols]
        pairs = list(zip(self.op.params, self.operands, strict=True))
        values += [v.row_stride for p, v in pairs if p.is_strided]
        values += [resolve_dtype(v.region.dtype, acts).code for p, v in pairs if len(p.dtypes) > 1]
        for p, v in pairs:
            if p.may_be_grouped:
                groups = v.region.groups
                values += (
                    (0, 0, -1)
                    if groups is None
                    else (groups.size, groups.outer, groups.scales.code)
                )
        moves = [n for s in strides for n in (s.lane, s.row, s.run)] or [0] * 3 * len(pairs)
        return struct.pack(self.op.struct_format, *values, *self.attrs, runs, *moves)


def bind(op: Op, operands: Mapping[str, Operand], attrs: Mapping[str, AttrValue]) -> Launch:
    """Check operands against the signature and solve its symbols.

    Raises PlanError naming op, param and both values.
    """
    wanted, given = {p.name for p in op.params}, set(operands)
    if wanted != given:
        raise PlanError(
            f"{op.name}: missing operands {sorted(wanted - given)}, "
            f"unknown {sorted(given - wanted)}"
        )
    names = [a.name for a in op.attrs]
    if set(names) != set(attrs):
        raise PlanError(f"{op.name}: attributes are {names}, got {sorted(attrs)}")
    views = {p.name: as_view(operands[p.name]) for p in op.params}
    dims: dict[str, int] = {}
    for p in op.params:
        _check(op, p, views[p.name])
        for dim, size in zip(p.dims, views[p.name].shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier() and dims.setdefault(dim, size) != size:
                raise PlanError(
                    f"{op.name}.{p.name}: {dim} is {dims[dim]}, got {size} in {views[p.name].shape}"
                )
    for p in op.params:
        for dim, size in zip(p.dims, views[p.name].shape, strict=True):
            want = dim if isinstance(dim, int) else evaluate(op, dim, dims)
            if want != size:
                raise PlanError(
                    f"{op.name}.{p.name}: {dim} is {want}, got {size} in {views[p.name].shape}"
                )
    for dim, divisor in op.multiples:
        if dims[dim] % divisor:
            raise PlanError(
                f"{op.name}: {dim} is {dims[dim]}, no multiple of {divisor}: pad the weights"
            )
    for dim, most in op.at_most:
        if dims[dim] > dims[most]:
            raise PlanError(f"{op.name}: {dim} is {dims[dim]}, of {most} {dims[most]}")
    values = tuple(attrs[n] for n in names)
    return Launch(op, tuple(views[p.name] for p in op.params), dims, values, views)


def _check(op: Op, param: Param, view: View) -> None:
    region = view.region
    if len(view.shape) != len(param.dims):
        raise PlanError(
            f"{op.name}.{param.name}: wants {param.dims}, region {region.name!r} is {view.shape}"
        )
    dtype = DType.ACT if region.dtype is DType.ACT_WIDE else region.dtype
    if dtype not in param.dtypes:
        wanted = ", ".join(param.dtypes)
        raise PlanError(
            f"{op.name}.{param.name}: wants {wanted}, region {region.name!r} is {region.dtype}"
        )
    if region.groups is not None and not param.may_be_grouped:
        raise PlanError(f"{op.name}.{param.name}: region {region.name!r} is quantised")
    if region.layout is not param.layout:
        raise PlanError(
            f"{op.name}.{param.name}: wants {param.layout}, "
            f"region {region.name!r} is {region.layout}"
        )
    has_rows = (
        len(view.shape) > 1
    )  # a window over a vector is contiguous whatever the region's stride
    if has_rows and not param.is_strided and view.row_stride != view.shape[-1]:
        raise PlanError(f"{op.name}.{param.name}: columns of {region.name!r} are not contiguous")
    if param.access != "r" and region.role is Role.WEIGHT:
        raise PlanError(f"{op.name}.{param.name}: writes weight {region.name!r}")


def evaluate(op: Op, expression: str, dims: Mapping[str, int]) -> int:
    """A sum of products of symbols and integers, e.g. `2*Nq*D+2*Nk*D`."""
    total = 0
    for term in expression.split("+"):
        product = 1
        for factor in term.split("*"):
            word = factor.strip()
            if not word.isdigit() and word not in dims:
                raise PlanError(f"{op.name}: nothing binds dimension {word} of {expression}")
            product *= int(word) if word.isdigit() else dims[word]
        total += product
    return total
