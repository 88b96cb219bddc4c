"""Images and rows of features: convolution, pooling, layer norm, attention to all keys.

IS: signatures. IS NOT: code; see `table`. Images are [B, H, W, C]: B of them, channels last. A row
of features is a pixel of one column: a dense layer over T rows is the convolution of 1 x 1 taps
over an image of T x 1. Ops with a cursor are of a tower, whose images have any number of patches: a
row of T is a patch, and `cursor.rows` of them are the image's. The last ones are of a text model
that sees: its rows have three places each, in time, by rows and by columns of an image.
"""

from __future__ import annotations

from dataclasses import replace

from flashrt.core.op import Attr, Op
from flashrt.ops.attention import ROPE_APPEND
from flashrt.ops.draft import DRAFT_INPUT
from flashrt.ops.linear import Activation
from flashrt.ops.params import CURSOR, act, f32, f32_matrix, i32, matrix

_GEOMETRY = (
    Attr("taps_y"),
    Attr("taps_x"),
    Attr("stride"),
    Attr("padding"),
    Attr("dilation"),
    Attr("activation", names=Activation),
)
CONV2D = Op(
    "conv2d",
    "y = f(b + sum over taps and channels of w x), f the identity, silu or relu; beyond its border "
    "an image is 0; w holds [N, taps_y, taps_x, C]; the order of each sum depends on K alone",
    (
        f32("x", "r", "B", "H", "W", "C"),
        f32_matrix("w", "N", "K"),
        f32("b", "r", "N"),
        f32("y", "w", "B", "Y", "X", "N"),
    ),
    _GEOMETRY,
)
CONV2D_ADD = Op(
    "conv2d_add",
    "y = f(y + (b + sum over taps and channels of w x)), else as conv2d",
    (
        f32("x", "r", "B", "H", "W", "C"),
        f32_matrix("w", "N", "K"),
        f32("b", "r", "N"),
        f32("y", "rw", "B", "Y", "X", "N"),
    ),
    _GEOMETRY,
)
MAX_POOL = Op(
    "max_pool",
    "y = the largest x of a window of taps x taps pixels, those beyond the border left out",
    (f32("x", "r", "B", "H", "W", "C"), f32("y", "w", "B", "Y", "X", "C")),
    (Attr("taps"), Attr("stride"), Attr("padding")),
)
LAYER_NORM = Op(
    "layer_norm",
    "y = (x - mean) / sqrt(variance + eps) * w + b, mean and variance of each row",
    (
        f32("x", "r", "T", "C"),
        f32("w", "r", "C"),
        f32("b", "r", "C"),
        f32("y", "w", "T", "C"),
    ),
    (Attr("eps", "float32"),),
)
ADD_ROWS = Op(
    "add_rows",
    "y = x + r",
    (f32("x", "r", "T", "C"), f32("r", "r", "T", "C"), f32("y", "w", "T", "C")),
)
NORMALIZE = Op(
    "normalize",
    "y = (x - mean) / std - shift, per column",
    (
        f32("x", "r", "T", "C"),
        f32("mean", "r", "C"),
        f32("std", "r", "C"),
        f32("y", "w", "T", "C"),
    ),
    (Attr("shift", "float32"),),
)
ATTEND = Op(
    "attend",
    "y = softmax(q k^T / sqrt(D)) v per head of D = C / heads columns: each row sees all S keys, in"
    " their order, which fixes the order of each sum",
    (
        f32("q", "r", "T", "C", strided=True),
        f32("k", "r", "S", "C", strided=True),
        f32("v", "r", "S", "C", strided=True),
        f32("y", "w", "T", "C"),
    ),
    (Attr("heads"),),
)

# -- of a tower --------------------------------------------------------------------------------

IMAGE_PATCHES = Op(
    "image_patches",
    "rows of `linear`, one per patch of patch x patch pixels of an image of side x side: 2 v - 1 "
    "by channel, row and column of the patch. x is resized to height x width by the four pixels "
    "around each point, edges repeated, and lies there at (top, left); elsewhere v is `fill`. Rows "
    "go by squares of group x group patches, both in raster order",
    (f32("x", "r", "H", "W", 3), act("y", "w", "T", "C")),
    (
        Attr("side"),
        Attr("patch"),
        Attr("group"),
        Attr("height"),
        Attr("width"),
        Attr("top"),
        Attr("left"),
        Attr("fill", "float32"),
    ),
)
ACTIVATIONS = Op(
    "activations",
    "y = x, as `linear` reads it",
    (f32("x", "r", "T", "C"), CURSOR, act("y", "w", "T", "C")),
)
MIX_ROWS = Op(
    "mix_rows",
    "y[t] = the sum over four rows of the table, ascending i, of weights[t, i] table[rows[t, i]]",
    (
        f32("table", "r", "N", "C"),
        i32("rows", "r", "T", 4),
        f32("weights", "r", "T", 4),
        CURSOR,
        f32("y", "w", "T", "C"),
    ),
)
ADD_LAYER_NORM = Op(
    "add_layer_norm",
    "x += r; y as of layer_norm",
    (
        f32("x", "rw", "T", "C"),
        f32("r", "r", "T", "C"),
        f32("w", "r", "C"),
        f32("b", "r", "C"),
        CURSOR,
        act("y", "w", "T", "C"),
    ),
    (Attr("eps", "float32"),),
)
GELU = Op(
    "gelu",
    "y = u Phi(u), Phi the normal distribution function; where `tanh`, its approximation "
    "(1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2",
    (f32("u", "r", "T", "I"), CURSOR, act("y", "w", "T", "I")),
    (Attr("tanh"),),
)
TURN_PATCHES = Op(
    "turn_patches",
    "rope in place over heads of D = 4 R dims: dims j and j + 2 R, j < 2 R, turn by the angle "
    "places[t, 0] inv_freq[j] where j < R, else places[t, 1] inv_freq[j - R]",
    (
        f32("x", "rw", "T", "C", strided=True),
        i32("places", "r", "T", 2),
        f32("inv_freq", "r", "R"),
        CURSOR,
    ),
)
ATTEND_PATCHES = Op(
    "attend_patches",
    "as attend, of the valid rows among themselves",
    (
        f32("q", "r", "T", "C", strided=True),
        f32("k", "r", "T", "C", strided=True),
        f32("v", "r", "T", "C", strided=True),
        CURSOR,
        act("y", "w", "T", "C"),
    ),
    (Attr("heads"),),
)

# -- of a text model that sees -----------------------------------------------------------------

PLACE_ROWS = Op(
    "place_rows",
    "places[t] = position + t + delta[0], where `given` plus offsets[t]; then, where `given`, "
    "delta[0] += growth[0]",
    (
        i32("offsets", "r", "T", 3),  # both are read only where `given`
        i32("growth", "r", 1),
        CURSOR,
        i32("delta", "rw", 1),
        i32("places", "w", "T", 3),
    ),
    (Attr("given"),),
)
EMBED_SEEN = Op(
    "embed_seen",
    "as embed; x[t] = seen[t] where tokens[t] is not in [0, V)",
    (
        i32("tokens", "r", "T"),
        matrix("table", "V", "H"),
        f32("seen", "r", "T", "H"),
        CURSOR,
        i32("journal", "w", 1, "S", 1),
        f32("x", "w", "T", "H"),
    ),
)
DRAFT_INPUT_SEEN = replace(
    DRAFT_INPUT,
    name="draft_input_seen",
    doc="as draft_input; seen[t] in place of table[tokens[t]] where tokens[t] is not in [0, V)",
    params=(*DRAFT_INPUT.params, f32("seen", "r", "T", "H")),
)
ROPE_PLACED = replace(
    ROPE_APPEND,
    name="rope_placed",
    doc="as rope_append, by the angle of places[t, axis] - shift: pair j has axis 1 where j % 3 = 1"
    " and j < 3 by_rows, axis 2 where j % 3 = 2 and j < 3 by_columns, else 0",
    params=(*ROPE_APPEND.params, i32("places", "r", "T", 3)),
    attrs=(*ROPE_APPEND.attrs, Attr("by_rows"), Attr("by_columns")),
)
