"""Ops that move or map rows: embedding, the last row of a launch, when the cursor advances.

IS: signatures. IS NOT: code; see `table`.
"""

from __future__ import annotations

from flashrt.core.op import Attr, Op
from flashrt.ops.params import CURSOR, act, cursors, f32, i32, matrix

EMBED = Op(
    "embed",
    "x[t] = table[tokens[t]]; journal[position + t] = tokens[t]",
    (
        i32("tokens", "r", "T"),
        matrix("table", "V", "H"),
        CURSOR,
        i32("journal", "w", 1, "S", 1),
        f32("x", "w", "T", "H"),
    ),
)
SILU_MUL = Op(
    "silu_mul",
    "y = silu(u[:, :I]) * u[:, I:]",
    (f32("u", "r", "T", "2*I"), CURSOR, act("y", "w", "T", "I")),
)
RELU_SQUARED = Op(
    "relu_squared",
    "y = max(u, 0)^2",
    (f32("u", "r", "T", "I"), CURSOR, act("y", "w", "T", "I")),
)
ADD_BIAS = Op(
    "add_bias",
    "x += b, per row",
    (f32("x", "rw", "T", "N"), f32("b", "r", "N"), CURSOR),
)
LAST_ROW = Op(
    "last_row",
    "y = x[rows - 1]",
    (act("x", "r", "T", "H"), CURSOR, act("y", "w", 1, "H")),
)
LAST_VALUES = Op(
    "last_values",
    "y = x[rows - 1], in float32",
    (f32("x", "r", "T", "C", strided=True), CURSOR, f32("y", "w", 1, "C")),
)
KEEP_ROWS = Op(
    "keep_rows",
    "y[t] = x[t], of valid rows",
    (act("x", "r", "T", "H"), CURSOR, act("y", "w", "T", "H")),
)
KEEP_VALUES = Op(
    "keep_values",
    "y[t] = x[t], of valid rows, in float32",
    (f32("x", "r", "T", "C", strided=True), CURSOR, f32("y", "w", "T", "C", strided=True)),
)
LAST_CURSOR = Op(
    "last_cursor",
    "last = a cursor of one row, the last of the launch; of no row if there is none",
    (CURSOR, cursors("last", "w")),
)
GEGLU = Op(
    "geglu",
    "y = gelu(u[:, :I]) * u[:, I:], gelu as where `tanh`",
    (f32("u", "r", "T", "2*I"), CURSOR, act("y", "w", "T", "I")),
)
ALL_ROWS = Op(
    "all_rows",
    "all = a cursor of `rows` rows from position 0, for launches of a constant number of rows",
    (cursors("all", "w"),),
    (Attr("rows"),),
)
ADVANCE = Op("advance", "cursor.position += cursor.rows", (cursors("cursor", "rw"),))
SCALE_ROWS = Op(
    "scale_rows",
    "x *= factor, per row",
    (f32("x", "rw", "T", "N"), CURSOR),
    (Attr("factor", "float32"),),
)
STOP_WORDS = 16
HOLD = Op(
    "hold",
    "cursor.rows = 0 where cursor.token is none, or one of the stops[0] words after stops[0]: what "
    "is launched for no row changes nothing",
    (i32("stops", "r", STOP_WORDS), cursors("cursor", "rw")),
    constants=(("STOP_WORDS", STOP_WORDS),),
)
