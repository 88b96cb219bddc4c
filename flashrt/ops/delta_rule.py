"""The gated delta rule: its convolution window, its gates, its state; and reading both in a verify.

IS: signatures. IS NOT: code; see `table`. Hk and Hv are key and value heads, dk and dv their sizes,
C the convolution's channels (2*Hk*dk + Hv*dv), W its window (kernel size - 1).
"""

from __future__ import annotations

from flashrt.core.op import Access, Attr, Op, Param
from flashrt.core.region import DType, Layout
from flashrt.ops.params import CURSOR, f32

_CONV = (  # what both ops on the window read first
    f32("u", "r", "T", "C", strided=True),
    f32("w", "r", "W1", "C"),  # W1 = W + 1 taps, oldest first
)
_DELTA = (  # what both ops on the state read first
    f32("y", "r", "T", "C"),
    f32("decay", "r", "T", "Hv"),
    f32("beta", "r", "T", "Hv"),
)


def _state(access: Access) -> Param:
    return Param("state", access, ("Hv", "dk", "dv"), (DType.F32,), Layout.COLUMN_BLOCKS)


CONV_WINDOW = Op(
    "conv_window",
    "causal depthwise conv of window ++ u, then silu; the window becomes the last W raw rows "
    "(w[W] meets the newest)",
    (*_CONV, f32("window", "rw", "W", "C"), CURSOR, f32("y", "w", "T", "C")),
)
CONV_VERIFY = Op(
    "conv_verify",
    "y as of conv_window, bit for bit; the window stays as it is",
    (*_CONV, f32("window", "r", "W", "C"), CURSOR, f32("y", "w", "T", "C")),
)
DELTA_GATES = Op(
    "delta_gates",
    "q = l2norm(q) / sqrt(dk), k = l2norm(k) in place (columns [0, 2*Hk*dk) of y); decay = "
    "exp(-exp(a_log) * softplus(a + dt_bias)); beta = sigmoid(b)",
    (
        f32("y", "rw", "T", "C"),
        f32("a", "r", "T", "Hv", strided=True),
        f32("b", "r", "T", "Hv", strided=True),
        f32("a_log", "r", "Hv"),
        f32("dt_bias", "r", "Hv"),
        CURSOR,
        f32("decay", "w", "T", "Hv"),
        f32("beta", "w", "T", "Hv"),
    ),
    (Attr("key_heads"), Attr("key_dim")),
)
DELTA_RULE = Op(
    "delta_rule",
    "per value head, row after row: S *= decay; S += k (beta (v - S^T k))^T; o = S^T q; y holds "
    "q, k, v; value head h uses key head h / (Hv / key_heads)",
    (*_DELTA, _state("rw"), CURSOR, f32("o", "w", "T", "Hv*dv")),
    (Attr("key_heads"),),
)
DELTA_VERIFY = Op(
    "delta_verify",
    "o as of delta_rule, bit for bit; the state stays as it is",
    (*_DELTA, _state("r"), CURSOR, f32("o", "w", "T", "Hv*dv")),
    (Attr("key_heads"),),
)
