"""Fused ops: signatures of launches that stand for several launches of a tape.

IS: ops like those of a tape, which the CUDA backend alone knows: each has the bits of the launches
that it stands for. IS NOT: what may be fused (fusion), geometry (kernels), or code (cuda_src).
"""

from __future__ import annotations

from typing import Final

from flashrt.core.op import Access, Attr, Op, Param
from flashrt.core.region import CODE_DTYPES, DType, Layout, Region, Role
from flashrt.core.runs import MAX_RUNS, RunsWord

_CURSOR = Param("cursor", "r", (RunsWord.LAST_ROWS - RunsWord.ROWS,), (DType.I32,))
Dim = int | str


def _f32(name: str, access: Access, *dims: Dim, strided: bool = False) -> Param:
    return Param(name, access, dims, is_strided=strided)


def _act(name: str, access: Access, *dims: Dim) -> Param:
    return Param(name, access, dims, (DType.ACT,))


def _matrix(*dims: Dim, name: str = "w") -> Param:
    dtypes = (DType.BF16, DType.F16, DType.F32, *CODE_DTYPES)
    return Param(name, "r", dims, dtypes, Layout.MATRIX, may_be_grouped=True)


def _parts(n: int) -> tuple[Param, ...]:
    """Matrices over the same x, and where their products go."""
    matrices = (_matrix(f"N{i}", "K", name=f"w{i}") for i in range(n))
    sums = (_f32(f"y{i}", "w", "T", f"N{i}", strided=True) for i in range(n))
    return *matrices, *sums


LINEAR_SILU: Final = Op(
    "linear_silu",
    "linear, silu_mul: y = silu(x g^T) (x u^T), w = [g; u]",
    (_act("x", "r", "T", "K"), _matrix("2*I", "K"), _CURSOR, _act("y", "w", "T", "I")),
)
LINEAR_ADD: Final = Op(
    "linear_add",
    "linear and the sum of add_rmsnorm: y += x w^T",
    (
        _act("x", "r", "T", "K"),
        _matrix("N", "K"),
        _CURSOR,
        _f32("y", "rw", "T", "N", strided=True),
    ),
)
NORM_LINEAR: Final = Op(
    "norm_linear",
    "rmsnorm, linear: y = h w^T, where h is the norm of x in bfloat16 parts, so many",
    (
        _f32("x", "r", "T", "K"),
        _f32("norm", "r", "K"),
        _matrix("N", "K"),
        _CURSOR,
        _f32("y", "w", "T", "N", strided=True),
    ),
    (Attr("eps", "float32"), Attr("parts")),
)
NORM_SILU: Final = Op(
    "norm_silu",
    "rmsnorm, linear, silu_mul: y = silu(h g^T) (h u^T), where h is the norm of x, w = [g; u]",
    (
        _f32("x", "r", "T", "K"),
        _f32("norm", "r", "K"),
        _matrix("2*I", "K"),
        _CURSOR,
        _act("y", "w", "T", "I"),
    ),
    (Attr("eps", "float32"),),
)
MOST_PARTS: Final = (
    3  # of a launch of several matrices; a longer row of them goes in several launches
)
LINEARS: Final = {
    n: Op(
        f"linears_{n}",
        "linear, several times: y<i> = x w<i>^T, matrices stored in any formats",
        (_act("x", "r", "T", "K"), _CURSOR, *_parts(n)),
    )
    for n in range(2, MOST_PARTS + 1)
}
NORM_LINEARS: Final = {
    n: Op(
        f"norm_linears_{n}",
        "rmsnorm, then linear several times: y<i> = h w<i>^T, where h is the norm of x in bfloat16 "
        "parts, so many",
        (_f32("x", "r", "T", "K"), _f32("norm", "r", "K"), _CURSOR, *_parts(n)),
        (Attr("eps", "float32"), Attr("parts")),
    )
    for n in range(2, MOST_PARTS + 1)
}
DELTA_FEW: Final = Op(
    "delta_few",
    "conv_window, delta_gates, delta_rule, gated_rmsnorm, one after the other: y from u and z; "
    "counters are words that are 0 between launches, one per run and key head",
    (
        _f32("u", "r", "T", "C", strided=True),
        _f32("w", "r", "W1", "C"),
        _f32("window", "rw", "W", "C"),
        _f32("z", "r", "T", "Hv*dv", strided=True),
        _f32("b", "r", "T", "Hv", strided=True),
        _f32("a", "r", "T", "Hv", strided=True),
        _f32("a_log", "r", "Hv"),
        _f32("dt_bias", "r", "Hv"),
        Param("state", "rw", ("Hv", "dk", "dv"), (DType.F32,), Layout.COLUMN_BLOCKS),
        _f32("norm", "r", "dv"),
        _CURSOR,
        Param("counters", "rw", ("n",), (DType.U32,)),
        _act("y", "w", "T", "Hv*dv"),
    ),
    (Attr("key_heads"), Attr("eps", "float32")),
)

MOST_KEY_HEADS: Final = 256  # that counters are for
COUNTERS: Final = Region("counters", (MAX_RUNS * MOST_KEY_HEADS,), DType.U32, Role.IO)

# A slot is a line of cache. There are more of them than a host is ever replays behind.
WORD_RING: Final = Region("word_ring", (8, 16), DType.U32, Role.IO)
SENT: Final = Region("sent", (1,), DType.U32, Role.IO)
HOLD_SEND: Final = Op(
    "hold_send",
    "hold, and a word of the cursor goes to the host: ring[sent % slots] = (cursor[word], sent), "
    "which is host memory; then sent += 1",
    (
        Param("stops", "r", ("S",), (DType.I32,)),
        Param("cursor", "rw", ("C",), (DType.I32,)),
        Param("ring", "w", ("slots", "words"), (DType.U32,)),
        Param("sent", "rw", (1,), (DType.U32,)),
    ),
    (Attr("word"),),
)

FUSED_OPS: Final = (
    DELTA_FEW, LINEAR_SILU, LINEAR_ADD, NORM_LINEAR, NORM_SILU, *LINEARS.values(),
    *NORM_LINEARS.values(), HOLD_SEND,
)  # fmt: skip
