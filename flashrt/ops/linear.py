"""Products with weight matrices: of a language model in bfloat16, of a policy in float32.

IS: signatures. IS NOT: code; see `table`.
"""

from __future__ import annotations

from enum import IntEnum

from flashrt.core.op import Attr, Op
from flashrt.ops.params import CURSOR, act, f32, f32_matrix, matrix


class Activation(IntEnum):
    """What `dense` and `conv2d` apply to their sums."""

    IDENTITY = 0
    SILU = 1
    RELU = 2


IDENTITY, SILU, RELU = Activation

LINEAR = Op(
    "linear",
    "y = x w^T; the order of each output's sum depends on K alone",
    (act("x", "r", "T", "K"), matrix("w", "N", "K"), CURSOR, f32("y", "w", "T", "N", strided=True)),
)
DENSE = Op(
    "dense",
    "y = f(x w^T + b) per row, f the identity, silu or relu; the order of each sum depends on K "
    "alone",
    (
        f32("x", "r", "T", "K"),
        f32_matrix("w", "N", "K"),
        f32("b", "r", "N"),
        f32("y", "w", "T", "N"),
    ),
    (Attr("activation", names=Activation),),
)
DENSE_ADD = Op(
    "dense_add",
    "y += x w^T + b per row",
    (
        f32("x", "r", "T", "K"),
        f32_matrix("w", "N", "K"),
        f32("b", "r", "N"),
        f32("y", "rw", "T", "N"),
    ),
)
