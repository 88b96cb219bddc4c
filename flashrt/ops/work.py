"""How much an op asks of a machine, counted from its dims: the one table of FLOP and bytes.

IS: FLOP of the products and bytes that must move at least once, of a launch and of a tape. IS NOT:
measurement, nor what a kernel really moves: a rate beyond the limit is a cache at work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from flashrt.core.backend import Backend
from flashrt.core.op import Launch, Op, Param
from flashrt.core.region import ActDTypes, Layout, Region, Role, View, resolve_dtype
from flashrt.core.tape import Tape
from flashrt.ops import table as ops

# FLOP by op, two per multiply-add, of: dims, rows, pairs of a row and a key that it sees. Norms,
# gates, convolutions and the softmax are left out: they are under a percent.
_FLOP: Mapping[Op, Callable[[Mapping[str, int], int, int], int]] = {
    ops.LINEAR: lambda dims, rows, pairs: 2 * rows * dims["N"] * dims["K"],
    # per state element: k.S, the update, q.S
    ops.DELTA_RULE: lambda dims, rows, pairs: 6 * rows * dims["Hv"] * dims["dk"] * dims["dv"],
    # per state element: the update, C.S
    ops.SSM: lambda dims, rows, pairs: 4 * rows * dims["Hv"] * dims["dk"] * dims["dv"],
    ops.EXPERTS_IN: lambda dims, rows, pairs: 4 * rows * dims["P"] * dims["I"] * dims["H"],
    ops.EXPERTS_OUT: lambda dims, rows, pairs: 2 * rows * dims["P"] * dims["I"] * dims["H"],
    # per key and query element: q.k, p.v
    ops.ATTENTION: lambda dims, rows, pairs: 4 * pairs * dims["Nq"] * dims["D"],
    ops.CONV2D: lambda dims, rows, pairs: _convolution_flop(dims),
    ops.CONV2D_ADD: lambda dims, rows, pairs: _convolution_flop(dims),
    ops.ATTEND: lambda dims, rows, pairs: 4 * dims["T"] * dims["S"] * dims["C"],
    ops.ATTEND_PATCHES: lambda dims, rows, pairs: 4 * rows * rows * dims["C"],
}
_EXPERTS = (ops.EXPERTS_IN, ops.EXPERTS_OUT)


def _convolution_flop(dims: Mapping[str, int]) -> int:
    return 2 * math.prod(dims[name] for name in ("B", "Y", "X", "N", "K"))


@dataclass(frozen=True, slots=True)
class Work:
    """Of one launch."""

    nbytes: int
    flop: int


def work_of(launch: Launch, acts: ActDTypes, position: int) -> Work:
    """Work of a launch whose rows are all valid and begin at a position."""
    nbytes = sum(n for _, _, n in operand_bytes(launch, acts, position))
    return Work(nbytes, _flop(launch, launch.dims.get("T", 1), position))


def operand_bytes(
    launch: Launch, acts: ActDTypes, position: int
) -> Iterator[tuple[Param, View, int]]:
    """Bytes of `work_of`, operand by operand."""
    for param, view in zip(launch.op.params, launch.operands, strict=True):
        yield param, view, _moved_bytes(launch, param, view, acts, position)


def flop_of(tape: Tape, rows: int) -> int:
    """FLOP of a tape over so many rows from position 0, however many it was recorded for."""
    return sum(_flop(launch, rows, 0) for launch in tape.launches)


def streamed_bytes(tape: Tape, backend: Backend) -> int:
    """Bytes of weights that a tape reads, as they are stored.

    A table that is only gathered from counts for nothing; a tied head is read in whole; of experts
    those that are hit.
    """
    read: dict[Region, float] = {}  # and how much of it
    for launch in tape.launches:
        if launch.op is not ops.EMBED:
            share = _share_of_weights(launch)
            read.update(
                (view.region, share) for view in launch.operands if view.region.role is Role.WEIGHT
            )
    return round(sum(share * backend.storage(region).nbytes for region, share in read.items()))


def _share_of_weights(launch: Launch) -> float:
    """How much of a matrix a launch reads."""
    if launch.op not in _EXPERTS:
        return 1.0
    dims = launch.dims
    return experts_hit(dims["T"], dims["P"], dims["E"]) / dims["E"]


def experts_hit(rows: int, picks: int, experts: int) -> float:
    """Experts that some row picks, as many as can be expected where each of them is as likely as
    any other: E (1 - (1 - P / E)^T). A router that prefers some hits fewer.
    """
    return experts * float(1 - (1 - picks / experts) ** rows)


def _flop(launch: Launch, rows: int, position: int) -> int:
    count = _FLOP.get(launch.op)
    pairs = rows * position + rows * (rows + 1) // 2
    if launch.op is ops.ATTENTION and (seen := launch.attr("seen")) != ops.Seen.PAST:
        pairs = rows * (position + rows * (seen == ops.Seen.LAUNCH))
    return 0 if count is None else count(launch.dims, rows, pairs)


def _moved_bytes(launch: Launch, param: Param, view: View, acts: ActDTypes, position: int) -> int:
    region, dims, count = view.region, launch.dims, math.prod(view.shape)
    rows = dims.get("T", 1)
    if param.name in ("key_scales", "value_scales") and view.shape[-1] > 1:
        return 0  # keys that are no codes stand in, and are not read
    if region.role is Role.ROWS:  # those that attention sees, or those that are appended
        seen = position + rows if launch.op is ops.ATTENTION else rows
        return _nbytes_of(region, acts, count // view.shape[1] * seen)
    if launch.op in _EXPERTS:
        if region.layout is Layout.MATRIX:
            return round(_nbytes_of(region, acts, count) * _share_of_weights(launch))
        if param.name in ("groups", "members"):
            return 0  # a few words, where picks are grouped at all
        if param.name == "products":  # written, then read by the sum
            return _nbytes_of(region, acts, 2 * count)
    if launch.op is ops.EMBED and region.layout is Layout.MATRIX:
        return _nbytes_of(region, acts, rows * dims["H"])
    if param.name == "partials":  # written, then read by the merge; none when rows are many
        blocks = -(-(position + rows) // ops.ATTENTION_BLOCK) if dims["TP"] >= rows else 0
        return _nbytes_of(region, acts, 2 * count // dims["B"] * blocks)
    return _nbytes_of(region, acts, count * (2 if param.access == "rw" else 1))


def _nbytes_of(region: Region, acts: ActDTypes, count: int) -> int:
    """Bytes of so many elements; of a matrix in groups, of whole rows and their scales. What
    storage is filled up with counts for nothing.
    """
    nbytes = count * resolve_dtype(region.dtype, acts).bits // 8
    if region.groups is not None:
        columns = region.shape[-1]
        per_row = sum(
            p.dtype.itemsize * (-(-columns // p.size) if p.size else 1)
            for p in region.groups.planes
        )
        nbytes += count // columns * per_row
    return nbytes
