"""Attention: rotary embedding with the append to the cache, and the softmax over it.

IS: signatures. IS NOT: code; see `table`. Nq and Nk are query and key/value heads, D the head size.
"""

from __future__ import annotations

from flashrt.core.op import Attr, Op
from flashrt.core.region import Layout
from flashrt.ops.params import CURSOR, act, cache_rows, f32

ATTENTION_BLOCK = 256  # keys per partial softmax, in absolute positions

ROPE_APPEND = Op(
    "rope_append",
    "per row, from u = [per head: q, gate | k | v]: q = rope(rmsnorm(q)), keys[position + t] = "
    "rope(rmsnorm(k)), values[position + t] = v; the first 2*R2 dims of a head turn, in halves, by "
    "the angle of position + t - shift; norm weights hold 1 + weight",
    (
        f32("u", "r", "T", "2*Nq*D+2*Nk*D"),
        f32("q_norm", "r", "D"),
        f32("k_norm", "r", "D"),
        f32("inv_freq", "r", "R2"),
        CURSOR,
        f32("q", "w", "T", "Nq", "D"),
        cache_rows("keys", "rw", Layout.ROWS_IN_LANES),
        cache_rows("values", "rw", Layout.COLS_IN_LANES),
    ),
    (Attr("eps", "float32"), Attr("shift")),
)
ATTENTION = Op(
    "attention",
    "softmax(q K^T / sqrt(D), causal) V, times sigmoid(gate), the gate read from u (see "
    "rope_append); query head h uses key/value head h / (Nq / Nk); rows below `shift` are no keys; "
    "keys in absolute blocks of 256, partials merged in ascending order",
    (
        f32("q", "r", "T", "Nq", "D"),
        f32("u", "r", "T", "2*Nq*D+2*Nk*D"),
        cache_rows("keys", "r", Layout.ROWS_IN_LANES),
        cache_rows("values", "r", Layout.COLS_IN_LANES),
        CURSOR,
        # block partials (m, l, o[D]) for launches of few rows, so that blocks can be spread over
        # cores
        f32("partials", "w", "TP", "Nq", "B", "D+2"),
        act("y", "w", "T", "Nq*D"),
    ),
    (Attr("shift"),),
    constants=(("ATTENTION_BLOCK", ATTENTION_BLOCK),),
)
