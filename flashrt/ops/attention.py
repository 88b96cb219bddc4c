"""Attention: rotary embedding with the append to the cache, and the softmax over it.

IS: signatures. IS NOT: code; see `table`. Nq and Nk are query and key/value heads, D the head size,
U the columns of the projections u: [per head: q, gate | k | v] where `gated`, else [q | k | v].

Keys and values of one byte are codes: x = code * scale, one float32 scale per row and head, which
is the largest |x| of the row over 127 (int8) or 448 (float8 e4m3); codes are rounded to nearest
even. A row without a finite largest has the scale NaN, one whose scale were below 1e-30 scale 0.
"""

from __future__ import annotations

from enum import IntEnum

from flashrt.core.op import Attr, Op, Param
from flashrt.core.region import DType, Layout
from flashrt.ops.params import CURSOR, act, cache_rows, cache_scales, f32

ATTENTION_BLOCK = 256  # keys per partial softmax, in absolute positions


class Seen(IntEnum):
    """Which keys a row of a launch of attention sees: those of positions [shift, stop)."""

    PAST = 0  # stop: one past its own
    LAUNCH = 1  # one past the last row's: all rows of the launch see each other
    BEFORE = 2  # the launch's: none of its own rows


def _rows(name: str, layout: Layout) -> Param:
    """Rows of the cache that are values, not codes."""
    return Param(name, "rw", ("Nk", "S", "D"), (DType.F32, DType.BF16), layout)


ROPE_APPEND = Op(
    "rope_append",
    "per row of u: q = rope(norm(q)), keys[position + t] = rope(norm(k)), values[position + t] = "
    "v; norm is rmsnorm where `normed` (its weights are applied as they are), else nothing; rope "
    "turns the first 2*R2 dims of a head, in halves, by the angle of position + t - shift, and "
    "multiplies them by `magnitude`",
    (
        f32("u", "r", "T", "U"),
        f32("q_norm", "r", "D"),  # both are read only where `normed`
        f32("k_norm", "r", "D"),
        f32("inv_freq", "r", "R2"),
        CURSOR,
        f32("q", "w", "T", "Nq", "D"),
        cache_rows("keys", "rw", Layout.ROWS_IN_LANES),
        cache_rows("values", "rw", Layout.COLS_IN_LANES),
        cache_scales("key_scales", "rw"),  # of codes, else not used
        cache_scales("value_scales", "rw"),
    ),
    (
        Attr("eps", "float32"),
        Attr("shift"),
        Attr("gated"),
        Attr("normed"),
        Attr("magnitude", "float32"),
    ),
)
ATTENTION = Op(
    "attention",
    "softmax(q K^T / sqrt(D)) V of the keys that are `seen`, where `gated` times sigmoid(gate), "
    "the gate read from u; query head h uses key/value head h / (Nq / Nk); rows below `shift` are "
    "no keys; keys in absolute blocks of 256, partials merged in ascending order",
    (
        f32("q", "r", "T", "Nq", "D"),
        f32("u", "r", "T", "U"),  # read only where `gated`: q itself will do elsewhere
        cache_rows("keys", "r", Layout.ROWS_IN_LANES),
        cache_rows("values", "r", Layout.COLS_IN_LANES),
        cache_scales("key_scales", "r"),  # of codes, else not read
        cache_scales("value_scales", "r"),
        CURSOR,
        # block partials (m, l, o[D]) for launches of few rows, so that blocks can be spread over
        # cores
        f32("partials", "w", "TP", "Nq", "B", "D+2"),
        act("y", "w", "T", "Nq*D"),
    ),
    (Attr("shift"), Attr("gated"), Attr("seen", names=Seen)),
    constants=(("ATTENTION_BLOCK", ATTENTION_BLOCK),),
)

# -- for rows that attend to what another model left in the cache -----------------------------

ROPE_ROWS = Op(
    "rope_rows",
    "y[t] = rope(x[t]) of each head: its first 2*R2 dims in halves, by the angle of t, where "
    "`placed` of position + t",
    (
        f32("x", "r", "T", "N*D", strided=True),
        f32("inv_freq", "r", "R2"),
        CURSOR,
        f32("y", "w", "T", "N", "D"),
    ),
    (Attr("placed"),),
)
APPEND_ROWS = Op(
    "append_rows",
    "keys[position + t] = k[t], values[position + t] = v[t]",
    (
        f32("k", "r", "T", "Nk*D", strided=True),
        f32("v", "r", "T", "Nk*D", strided=True),
        CURSOR,
        _rows("keys", Layout.ROWS_IN_LANES),
        _rows("values", Layout.COLS_IN_LANES),
    ),
)
