"""The gated short convolution: its two gates, its taps, and the window of rows before a launch.

IS: signatures. IS NOT: code; see `table`. C is the channels, W the window (kernel size - 1).
"""

from __future__ import annotations

from flashrt.core.op import Attr, Op
from flashrt.ops.params import CURSOR, act, f32

GATED_CONV = Op(
    "gated_conv",
    "u holds [b | c | x]; y = c * (causal depthwise conv of window ++ b * x, + bias where `biased` "
    "is 1); the window becomes the last W rows of b * x (w[W] meets the newest); bias is not read "
    "where `biased` is 0",
    (
        f32("u", "r", "T", "3*C"),
        f32("w", "r", "W1", "C"),  # W1 = W + 1 taps, oldest first
        f32("bias", "r", "C"),
        f32("window", "rw", "W", "C"),
        CURSOR,
        act("y", "w", "T", "C"),
    ),
    (Attr("biased"),),
)
