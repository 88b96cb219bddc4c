"""The one table of op signatures: what each kernel reads, writes and means, on every backend.

IS: the union of the families of this folder, in the order that backends build. IS NOT: code; see
backends/cpu/kernels and cuda_src.

Symbols: T rows of the launch (a bucket; `cursor.rows` of them are valid, the others must neither be
read nor influence anything), H hidden, V vocabulary, S max positions, I intermediate size; others
where a family says so. `cursor` is int32[16], words as in `cursor`; `sampler` and `bias` are the
parameters of sampling, see `sample`.
"""

from __future__ import annotations

from flashrt.core.op import Op
from flashrt.ops.attention import (
    APPEND_ROWS,
    ATTENTION,
    ATTENTION_BLOCK,
    ROPE_APPEND,
    ROPE_ROWS,
    Seen,
)
from flashrt.ops.cursor import CURSOR_WORDS, REQUEST_WORDS
from flashrt.ops.delta_rule import (
    CONV_VERIFY,
    CONV_WINDOW,
    DELTA_GATES,
    DELTA_RULE,
    DELTA_VERIFY,
)
from flashrt.ops.draft import (
    ACCEPT,
    DRAFT_BEGIN,
    DRAFT_INPUT,
    DRAFT_NOTE,
    TAKE_TOKEN,
    VERIFY_CURSORS,
)
from flashrt.ops.experts import ADD_GATED, EXPERTS_IN, EXPERTS_OUT, ROUTE, Scoring
from flashrt.ops.gated_conv import GATED_CONV
from flashrt.ops.linear import DENSE, DENSE_ADD, IDENTITY, LINEAR, RELU, SILU
from flashrt.ops.norm import ADAPTIVE_RMSNORM, ADD_RMSNORM, GATED_RMSNORM, RMSNORM
from flashrt.ops.policy import (
    CHUNK_BEGIN,
    CHUNK_END,
    ENSEMBLE,
    EULER,
    FLOW_BEGIN,
    FLOW_END,
    FLOW_NOISE,
    FLOW_STEP,
    GRU_CELL,
    GUIDE,
    OBSERVE,
    SEE,
    TAKE_ACTION,
)
from flashrt.ops.rows import (
    ADD_BIAS,
    ADVANCE,
    ALL_ROWS,
    EMBED,
    GEGLU,
    HOLD,
    KEEP_ROWS,
    KEEP_VALUES,
    LAST_CURSOR,
    LAST_ROW,
    LAST_VALUES,
    RELU_SQUARED,
    SCALE_ROWS,
    SILU_MUL,
    STOP_WORDS,
)
from flashrt.ops.sample import BIAS_ENTRIES, SAMPLE, SAMPLER_WORDS, mask_words
from flashrt.ops.ssm import CONV_BIASED, SILU_RMSNORM, SSM
from flashrt.ops.vision import (
    ACTIVATIONS,
    ADD_LAYER_NORM,
    ADD_ROWS,
    ATTEND,
    ATTEND_PATCHES,
    CONV2D,
    CONV2D_ADD,
    DRAFT_INPUT_SEEN,
    EMBED_SEEN,
    GELU,
    IMAGE_PATCHES,
    LAYER_NORM,
    MAX_POOL,
    MIX_ROWS,
    NORMALIZE,
    PLACE_ROWS,
    ROPE_PLACED,
    TURN_PATCHES,
)

__all__ = [
    "ACCEPT", "ACTIVATIONS", "ADAPTIVE_RMSNORM", "ADD_BIAS", "ADD_GATED", "ADD_LAYER_NORM",
    "ADD_RMSNORM", "ADD_ROWS", "ADVANCE", "ALL_ROWS", "APPEND_ROWS", "ATTEND", "ATTEND_PATCHES",
    "ATTENTION", "ATTENTION_BLOCK", "BIAS_ENTRIES", "CHUNK_BEGIN", "CHUNK_END", "CONV2D",
    "CONV2D_ADD", "CONV_BIASED", "CONV_VERIFY", "CONV_WINDOW", "CURSOR_WORDS", "DELTA_GATES",
    "DELTA_RULE", "DELTA_VERIFY", "DENSE", "DENSE_ADD", "DRAFT_BEGIN", "DRAFT_INPUT",
    "DRAFT_INPUT_SEEN", "DRAFT_NOTE", "EMBED", "EMBED_SEEN", "ENSEMBLE", "EULER", "EXPERTS_IN",
    "EXPERTS_OUT", "FLOW_BEGIN", "FLOW_END", "FLOW_NOISE", "FLOW_STEP", "GATED_CONV",
    "GATED_RMSNORM", "GEGLU", "GELU", "GRU_CELL", "GUIDE", "HOLD", "IDENTITY", "IMAGE_PATCHES",
    "KEEP_ROWS", "KEEP_VALUES", "LAST_CURSOR", "LAST_ROW", "LAST_VALUES", "LAYER_NORM", "LINEAR",
    "MAX_POOL", "MIX_ROWS", "NORMALIZE", "OBSERVE", "OPS", "PLACE_ROWS", "RELU", "RELU_SQUARED",
    "REQUEST_WORDS", "RMSNORM", "ROPE_APPEND", "ROPE_PLACED", "ROPE_ROWS", "ROUTE", "SAMPLE",
    "SAMPLER_WORDS", "SCALE_ROWS", "SEE", "SILU", "SILU_MUL", "SILU_RMSNORM", "SSM", "STOP_WORDS",
    "TAKE_ACTION", "TAKE_TOKEN", "TURN_PATCHES", "VERIFY_CURSORS", "Scoring", "Seen", "mask_words",
]  # fmt: skip

OPS: tuple[Op, ...] = (
    EMBED, RMSNORM, ADD_RMSNORM, LINEAR, CONV_WINDOW, DELTA_GATES, DELTA_RULE, GATED_RMSNORM,
    ROPE_APPEND, ATTENTION, SILU_MUL, ADD_BIAS, LAST_ROW, LAST_VALUES, LAST_CURSOR, ADVANCE, SAMPLE,
    CONV_VERIFY, DELTA_VERIFY, DRAFT_INPUT, DRAFT_BEGIN, DRAFT_NOTE, VERIFY_CURSORS, ACCEPT,
    TAKE_TOKEN, KEEP_ROWS, KEEP_VALUES, HOLD, OBSERVE, DENSE, DENSE_ADD, GRU_CELL, FLOW_BEGIN,
    FLOW_STEP, FLOW_END, TAKE_ACTION, GATED_CONV, CONV_BIASED, SSM, SILU_RMSNORM, SCALE_ROWS,
    RELU_SQUARED, SEE, CHUNK_BEGIN, CHUNK_END, CONV2D, CONV2D_ADD, MAX_POOL, LAYER_NORM, ADD_ROWS,
    NORMALIZE, ATTEND, ENSEMBLE, ACTIVATIONS, MIX_ROWS, ADD_LAYER_NORM, GELU, TURN_PATCHES,
    ATTEND_PATCHES, PLACE_ROWS, EMBED_SEEN, ROPE_PLACED, ROUTE, EXPERTS_IN, EXPERTS_OUT, ADD_GATED,
    DRAFT_INPUT_SEEN,
    ROPE_ROWS, APPEND_ROWS, FLOW_NOISE, GUIDE, EULER,
    IMAGE_PATCHES, ALL_ROWS, GEGLU, ADAPTIVE_RMSNORM,
)  # fmt: skip
