"""How much one launch asks of a device, counted from its dims.

IS: bytes that must move at least once, and FLOP of the products. IS NOT: measurement, nor what a
kernel really moves: a table that shows more than the limit is a cache at work. Called by:
gpu_bench_engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashrt.core.op import Launch, Param
from flashrt.core.region import DType, Layout, Role, View, resolve_dtype
from flashrt.ops import table as ops


@dataclass(frozen=True, slots=True)
class Work:
    """Of one launch."""

    nbytes: int
    flop: int


def work_of(launch: Launch, act: DType, position: int) -> Work:
    """Work of a launch whose rows are all valid and begin at a position."""
    pairs = zip(launch.op.params, launch.operands, strict=True)
    nbytes = sum(_moved_bytes(launch, param, view, act, position) for param, view in pairs)
    return Work(nbytes, _flop(launch, position))


def _moved_bytes(launch: Launch, param: Param, view: View, act: DType, position: int) -> int:
    item = resolve_dtype(view.region.dtype, act).nbytes
    dims, count = launch.dims, math.prod(view.shape)
    rows = dims.get("T", 1)
    if view.region.role is Role.ROWS:  # those that attention sees, or those that are appended
        seen = position + rows if launch.op is ops.ATTENTION else rows
        return count // view.shape[1] * seen * item
    if launch.op is ops.EMBED and view.region.layout is Layout.MATRIX:
        return rows * dims["H"] * item
    if param.name == "partials":  # written, then read by the merge; none when rows are many
        blocks = -(-(position + rows) // ops.ATTENTION_BLOCK) if dims["TP"] >= rows else 0
        return 2 * count // dims["B"] * blocks * item
    return count * item * (2 if param.access == "rw" else 1)


def _flop(launch: Launch, position: int) -> int:
    dims = launch.dims
    rows = dims.get("T", 1)
    if launch.op is ops.LINEAR:
        return 2 * rows * dims["N"] * dims["K"]
    if launch.op is ops.DELTA_RULE:  # per state element: k.S, the update, q.S
        return 6 * rows * dims["Hv"] * dims["dk"] * dims["dv"]
    if launch.op is ops.ATTENTION:  # per key and query element: q.k, p.v
        keys = rows * position + rows * (rows + 1) // 2
        return 4 * dims["Nq"] * dims["D"] * keys
    return 0
