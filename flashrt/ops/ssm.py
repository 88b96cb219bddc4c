"""State-space layers as in Mamba-2: a biased convolution window, the recurrence, its norm.

IS: signatures; formulas of Dao and Gu, "Transformers are SSMs" (2024), and of transformers'
modeling_granitemoehybrid. IS NOT: code; see `table`. Hv heads of size dv with a state of size dk,
inputs and outputs of which `groups` groups of heads share; C the convolution's channels,
W its window (kernel size - 1).
"""

from __future__ import annotations

from flashrt.core.op import Attr, Op, Param
from flashrt.core.region import DType, Layout
from flashrt.ops.params import CURSOR, act, f32

CONV_BIASED = Op(
    "conv_biased",
    "conv_window with a bias: silu(b + causal depthwise conv of window ++ u); the window becomes "
    "the last W raw rows (w[W] meets the newest)",
    (
        f32("u", "r", "T", "C", strided=True),
        f32("w", "r", "W1", "C"),  # W1 = W + 1 taps, oldest first
        f32("b", "r", "C"),
        f32("window", "rw", "W", "C"),
        CURSOR,
        f32("y", "w", "T", "C"),
    ),
)
SSM = Op(
    "ssm",
    "per head, row after row: t = softplus(dt + dt_bias) within [dt_min, dt_max]; S = "
    "exp(-exp(a_log) t) S + B (t x)^T; o = S^T C + d x; y holds [x | B | C], x of Hv heads, B and "
    "C of `groups`; head h uses group h / (Hv / groups)",
    (
        f32("y", "r", "T", "C"),
        f32("dt", "r", "T", "Hv", strided=True),
        f32("a_log", "r", "Hv"),
        f32("dt_bias", "r", "Hv"),
        f32("d", "r", "Hv"),
        Param("state", "rw", ("Hv", "dk", "dv"), (DType.F32,), Layout.COLUMN_BLOCKS),
        CURSOR,
        f32("o", "w", "T", "Hv*dv"),
    ),
    (Attr("groups"), Attr("dt_min", "float32"), Attr("dt_max", "float32")),
)
SILU_RMSNORM = Op(
    "silu_rmsnorm",
    "v = o * silu(z); y = v * rsqrt(mean(v^2) + eps) * w, the mean over each of `groups` parts of "
    "a row: the gate comes before the norm",
    (
        f32("o", "r", "T", "C"),
        f32("z", "r", "T", "C", strided=True),
        f32("w", "r", "C"),
        CURSOR,
        act("y", "w", "T", "C"),
    ),
    (Attr("groups"), Attr("eps", "float32")),
)
