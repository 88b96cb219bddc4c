"""Norms: root mean square over a row, with a sum before it or a gate after it.

IS: signatures. IS NOT: code; see `table`.
"""

from __future__ import annotations

from flashrt.core.op import Attr, Op
from flashrt.ops.params import CURSOR, act, f32

RMSNORM = Op(
    "rmsnorm",
    "y = x * rsqrt(mean(x^2) + eps) * w, per row; w holds 1 + weight",
    (f32("x", "r", "T", "H"), f32("w", "r", "H"), CURSOR, act("y", "w", "T", "H")),
    (Attr("eps", "float32"),),
)
ADD_RMSNORM = Op(
    "add_rmsnorm",
    "x += r; y = x * rsqrt(mean(x^2) + eps) * w, per row; w holds 1 + weight",
    (
        f32("x", "rw", "T", "H"),
        f32("r", "r", "T", "H"),
        f32("w", "r", "H"),
        CURSOR,
        act("y", "w", "T", "H"),
    ),
    (Attr("eps", "float32"),),
)
ADAPTIVE_RMSNORM = Op(
    "adaptive_rmsnorm",
    "x += gate r where `added`; y = x * rsqrt(mean(x^2) + eps) * (1 + scale) + shift, per row; all "
    "rows have the same gate, scale and shift",
    (
        f32("x", "rw", "T", "H"),
        f32("r", "r", "T", "H"),  # both are read only where `added`
        f32("gate", "r", "H"),
        f32("scale", "r", "H"),
        f32("shift", "r", "H"),
        CURSOR,
        act("y", "w", "T", "H"),
    ),
    (Attr("eps", "float32"), Attr("added")),
)
GATED_RMSNORM = Op(
    "gated_rmsnorm",
    "y = w * (o * rsqrt(mean(o^2) + eps)) * silu(z), per head over dv; w is plain",
    (
        f32("o", "r", "T", "C"),
        f32("z", "r", "T", "C", strided=True),
        f32("w", "r", "dv"),
        CURSOR,
        act("y", "w", "T", "C"),
    ),
    (Attr("eps", "float32"),),
)
