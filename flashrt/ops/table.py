"""The one table of op signatures: what each kernel reads, writes and means, on every backend.

IS: names, shapes, dtypes and meanings. IS NOT: code; see backends/cpu/kernels and cuda_src.
Called by: models (record launches), engine (hands the table to a backend), tests.

Symbols: T rows of the launch (a bucket; `cursor.rows` of them are valid, the others must neither be
read nor influence anything), H hidden, V vocabulary, S max positions, Nq/Nk query and key/value
heads, D head size, Hk/Hv and dk/dv the same of the delta rule, C its conv channels (2*Hk*dk +
Hv*dv), W conv window (kernel size - 1), I intermediate size.

`cursor` is int32[16]: [0] position of the launch's first row, [1] valid rows, [2] last sampled
token, the rest 0. `sampler` and `bias` are the parameters of sampling: see ops/sampler.

Drafting has a cursor of its own (`draft`), and one per row of a verify (`samples`), of the same
words: so its launches are those of decoding, with another cursor.

Policies have a cursor of their own words (see ops/policy_cursor), and further symbols: O
observation, A action, E encoder, M memory, H rows of a chunk of actions; everything is float32.
"""

from __future__ import annotations

from flashrt.core.op import Access, Attr, Op, Param
from flashrt.core.region import DType, Layout

CURSOR_WORDS = 16
SAMPLER_WORDS = 16
BIAS_ENTRIES = 512  # tokens that may have a logit bias
ATTENTION_BLOCK = 256  # keys per partial softmax, in absolute positions
IDENTITY, SILU = 0, 1  # activations of `dense`
REQUEST_WORDS = 16  # [0] rows of a chunk that a plan is to keep, the rest 0
ACT = (DType.ACT,)
KV = (DType.F32, DType.BF16)

_CURSOR = Param("cursor", "r", (CURSOR_WORDS,), (DType.I32,))


def _f32(name: str, access: Access, *dims: int | str, strided: bool = False) -> Param:
    return Param(name, access, dims, is_strided=strided)


def _act(name: str, access: Access, *dims: int | str) -> Param:
    return Param(name, access, dims, ACT)


def _matrix(name: str, *dims: int | str) -> Param:
    return Param(name, "r", dims, (DType.BF16,), Layout.MATRIX)


def _rows(name: str, access: Access, layout: Layout) -> Param:
    return Param(name, access, ("Nk", "S", "D"), KV, layout)


def _words(name: str, access: Access, *dims: int | str) -> Param:
    return Param(name, access, dims, (DType.I32,))


_CONV = (  # what both ops on the window read first
    _f32("u", "r", "T", "C", strided=True),
    _f32("w", "r", "W1", "C"),  # W1 = W + 1 taps, oldest first
)
_DELTA = (
    _f32("y", "r", "T", "C"),
    _f32("decay", "r", "T", "Hv"),
    _f32("beta", "r", "T", "Hv"),
)


def _state(access: Access) -> Param:
    return Param("state", access, ("Hv", "dk", "dv"), (DType.F32,), Layout.COLUMN_BLOCKS)


EMBED = Op(
    "embed",
    "x[t] = table[tokens[t]]; journal[position + t] = tokens[t]",
    (
        Param("tokens", "r", ("T",), (DType.I32,)),
        _matrix("table", "V", "H"),
        _CURSOR,
        Param("journal", "w", (1, "S", 1), (DType.I32,)),
        _f32("x", "w", "T", "H"),
    ),
)
RMSNORM = Op(
    "rmsnorm",
    "y = x * rsqrt(mean(x^2) + eps) * w, per row; w holds 1 + weight",
    (_f32("x", "r", "T", "H"), _f32("w", "r", "H"), _CURSOR, _act("y", "w", "T", "H")),
    (Attr("eps", "float32"),),
)
ADD_RMSNORM = Op(
    "add_rmsnorm",
    "x += r; y = x * rsqrt(mean(x^2) + eps) * w, per row; w holds 1 + weight",
    (
        _f32("x", "rw", "T", "H"),
        _f32("r", "r", "T", "H"),
        _f32("w", "r", "H"),
        _CURSOR,
        _act("y", "w", "T", "H"),
    ),
    (Attr("eps", "float32"),),
)
LINEAR = Op(
    "linear",
    "y = x w^T; the order of each output's sum depends on K alone",
    (_act("x", "r", "T", "K"), _matrix("w", "N", "K"), _CURSOR, _f32("y", "w", "T", "N")),
)
CONV_WINDOW = Op(
    "conv_window",
    "causal depthwise conv of window ++ u, then silu; the window becomes the last W raw rows "
    "(w[W] meets the newest)",
    (*_CONV, _f32("window", "rw", "W", "C"), _CURSOR, _f32("y", "w", "T", "C")),
)
CONV_VERIFY = Op(
    "conv_verify",
    "y as of conv_window, bit for bit; the window stays as it is",
    (*_CONV, _f32("window", "r", "W", "C"), _CURSOR, _f32("y", "w", "T", "C")),
)
DELTA_GATES = Op(
    "delta_gates",
    "q = l2norm(q) / sqrt(dk), k = l2norm(k) in place (columns [0, 2*Hk*dk) of y); decay = "
    "exp(-exp(a_log) * "
    "softplus(a + dt_bias)); beta = sigmoid(b)",
    (
        _f32("y", "rw", "T", "C"),
        _f32("a", "r", "T", "Hv", strided=True),
        _f32("b", "r", "T", "Hv", strided=True),
        _f32("a_log", "r", "Hv"),
        _f32("dt_bias", "r", "Hv"),
        _CURSOR,
        _f32("decay", "w", "T", "Hv"),
        _f32("beta", "w", "T", "Hv"),
    ),
    (Attr("key_heads"), Attr("key_dim")),
)
DELTA_RULE = Op(
    "delta_rule",
    "per value head, row after row: S *= decay; S += k (beta (v - S^T k))^T; o = S^T q; y holds "
    "q, k, v; value head h "
    "uses key head h / (Hv / key_heads)",
    (*_DELTA, _state("rw"), _CURSOR, _f32("o", "w", "T", "Hv*dv")),
    (Attr("key_heads"),),
)
DELTA_VERIFY = Op(
    "delta_verify",
    "o as of delta_rule, bit for bit; the state stays as it is",
    (*_DELTA, _state("r"), _CURSOR, _f32("o", "w", "T", "Hv*dv")),
    (Attr("key_heads"),),
)
GATED_RMSNORM = Op(
    "gated_rmsnorm",
    "y = w * (o * rsqrt(mean(o^2) + eps)) * silu(z), per head over dv; w is plain",
    (
        _f32("o", "r", "T", "C"),
        _f32("z", "r", "T", "C", strided=True),
        _f32("w", "r", "dv"),
        _CURSOR,
        _act("y", "w", "T", "C"),
    ),
    (Attr("eps", "float32"),),
)
ROPE_APPEND = Op(
    "rope_append",
    "per row, from u = [per head: q, gate | k | v]: q = rope(rmsnorm(q)), keys[position + t] = "
    "rope(rmsnorm(k)), "
    "values[position + t] = v; the first 2*R2 dims of a head turn, in halves, by the angle of "
    "position + t - shift; norm weights hold 1 + weight",
    (
        _f32("u", "r", "T", "2*Nq*D+2*Nk*D"),
        _f32("q_norm", "r", "D"),
        _f32("k_norm", "r", "D"),
        _f32("inv_freq", "r", "R2"),
        _CURSOR,
        _f32("q", "w", "T", "Nq", "D"),
        _rows("keys", "rw", Layout.ROWS_IN_LANES),
        _rows("values", "rw", Layout.COLS_IN_LANES),
    ),
    (Attr("eps", "float32"), Attr("shift")),
)
ATTENTION = Op(
    "attention",
    "softmax(q K^T / sqrt(D), causal) V, times sigmoid(gate), the gate read from u (see "
    "rope_append); query head h uses "
    "key/value head h / (Nq / Nk); rows below `shift` are no keys; keys in absolute blocks of 256, "
    "partials merged in ascending order",
    (
        _f32("q", "r", "T", "Nq", "D"),
        _f32("u", "r", "T", "2*Nq*D+2*Nk*D"),
        _rows("keys", "r", Layout.ROWS_IN_LANES),
        _rows("values", "r", Layout.COLS_IN_LANES),
        _CURSOR,
        # block partials (m, l, o[D]) for launches of few rows, so that blocks can be spread over
        # cores
        _f32("partials", "w", "TP", "Nq", "B", "D+2"),
        _act("y", "w", "T", "Nq*D"),
    ),
    (Attr("shift"),),
)
SILU_MUL = Op(
    "silu_mul",
    "y = silu(u[:, :I]) * u[:, I:]",
    (_f32("u", "r", "T", "2*I"), _CURSOR, _act("y", "w", "T", "I")),
)
LAST_ROW = Op(
    "last_row",
    "y = x[rows - 1]",
    (_act("x", "r", "T", "H"), _CURSOR, _act("y", "w", 1, "H")),
)
LAST_VALUES = Op(
    "last_values",
    "y = x[rows - 1], in float32",
    (_f32("x", "r", "T", "C", strided=True), _CURSOR, _f32("y", "w", 1, "C")),
)
LAST_CURSOR = Op(
    "last_cursor",
    "last = a cursor of one row, the last of the launch; of no row if there is none",
    (_CURSOR, _words("last", "w", CURSOR_WORDS)),
)
ADVANCE = Op(
    "advance",
    "cursor.position += cursor.rows",
    (Param("cursor", "rw", (CURSOR_WORDS,), (DType.I32,)),),
)
SAMPLE = Op(
    "sample",
    "cursor.token = Gumbel-max over the logits that temperature, top_k, top_p and min_p leave, "
    "after bias and penalties over the journal below the position; noise is Philox keyed by "
    "(seed, position); temperature 0 = argmax, the lowest id of equals; -1 for NaN",
    (
        _f32("logits", "r", 1, "V"),
        Param("sampler", "r", (SAMPLER_WORDS,), (DType.U32,)),
        Param("bias", "r", (BIAS_ENTRIES, 2), (DType.U32,)),
        _words("journal", "r", 1, "S", 1),
        _f32("work", "w", 2, "V"),
        _words("cursor", "rw", CURSOR_WORDS),
    ),
)
DRAFT_INPUT = Op(
    "draft_input",
    "y[t] = [rmsnorm(table[tokens[t]]) | rmsnorm(h[t - 1])], h[-1] = last; norm weights hold "
    "1 + weight",
    (
        _words("tokens", "r", "T"),
        _matrix("table", "V", "H"),
        _act("hidden", "r", "T", "H"),
        _act("last", "r", 1, "H"),
        _f32("w_token", "r", "H"),
        _f32("w_hidden", "r", "H"),
        _CURSOR,
        _act("y", "w", "T", "2*H"),
    ),
    (Attr("eps", "float32"),),
)
DRAFT_BEGIN = Op(
    "draft_begin",
    "draft = cursor, of one row",
    (_CURSOR, _words("draft", "w", CURSOR_WORDS)),
)
DRAFT_NOTE = Op(
    "draft_note",
    "drafted[draft.position - cursor.position] = journal[draft.position] = draft.token, which "
    "becomes 0 if it is no token",
    (
        _CURSOR,
        _words("draft", "rw", CURSOR_WORDS),
        _words("journal", "rw", 1, "S", 1),
        _words("drafted", "rw", "N"),
    ),
)
VERIFY_CURSORS = Op(
    "verify_cursors",
    "samples[t] = a cursor of one row at position + t + 1; of no row if row t is not valid",
    (_CURSOR, _words("samples", "w", "T", CURSOR_WORDS)),
)
ACCEPT = Op(
    "accept",
    "verdict = [n, tokens that were sampled after each of the n accepted rows]: row 0, and the "
    "longest run of drafted tokens that equal what was sampled before them",
    (
        _words("drafted", "r", "T"),
        _words("samples", "r", "T", CURSOR_WORDS),
        _CURSOR,
        _words("verdict", "w", "T+1"),
    ),
)
TAKE_TOKEN = Op(
    "take_token",
    "cursor.token = samples[rows - 1].token",
    (_words("samples", "r", "T", CURSOR_WORDS), _words("cursor", "rw", CURSOR_WORDS)),
)


def _weights(name: str, *dims: int | str) -> Param:
    return Param(name, "r", dims, (DType.F32,), Layout.MATRIX)


OBSERVE = Op(
    "observe",
    "x = [clip((observation - mean) / std, -10, 10) | previous]; cursor.observed = cursor.tick",
    (
        _f32("observation", "r", "O"),
        _f32("mean", "r", "O"),
        _f32("std", "r", "O"),
        _f32("previous", "r", "A"),
        _words("cursor", "rw", CURSOR_WORDS),
        _f32("x", "w", "O+A"),
    ),
)
DENSE = Op(
    "dense",
    "y = f(x w^T + b) per row, f the identity or silu; the order of each sum depends on K alone",
    (
        _f32("x", "r", "T", "K"),
        _weights("w", "N", "K"),
        _f32("b", "r", "N"),
        _f32("y", "w", "T", "N"),
    ),
    (Attr("activation"),),
)
DENSE_ADD = Op(
    "dense_add",
    "y += x w^T + b per row",
    (
        _f32("x", "r", "T", "K"),
        _weights("w", "N", "K"),
        _f32("b", "r", "N"),
        _f32("y", "rw", "T", "N"),
    ),
)
GRU_CELL = Op(
    "gru_cell",
    "r, z = sigmoid(u + v), n = tanh(u + r v), each of its third; memory = (1 - z) n + z memory",
    (_f32("u", "r", "3*M"), _f32("v", "r", "3*M"), _f32("memory", "rw", "M")),
)
FLOW_BEGIN = Op(
    "flow_begin",
    "a plan for the observed tick t: context = [memory | encoded]; flow = [x | mask]. In the first "
    "`committed` rows j, mask is 1 and x the promised action of tick t + j (the previous one for a "
    "tick that is done); in the others mask is 0 and x standard normal noise, Philox keyed by "
    "(seed, t). Sets the cursor's words of the plan",
    (
        _f32("memory", "r", "M"),
        _f32("encoded", "r", "E"),
        _f32("previous", "r", "A"),
        _f32("queue", "r", "H", "A"),
        _words("request", "r", REQUEST_WORDS),
        _words("cursor", "rw", CURSOR_WORDS),
        _f32("context", "w", "M+E"),
        _f32("flow", "w", "H*A+H"),
    ),
    (Attr("steps"), Attr("execute")),  # Euler steps; rows to execute after the committed ones
)
FLOW_STEP = Op(
    "flow_step",
    "x += (z w^T + b) / steps in rows whose mask is 0; cursor.plan_steps_left -= 1",
    (
        _f32("z", "r", 1, "K"),
        _weights("w", "N", "K"),
        _f32("b", "r", "N"),
        _f32("mask", "r", "H"),
        _f32("x", "rw", "N"),
        _words("cursor", "rw", CURSOR_WORDS),
    ),
    (Attr("steps"),),
)
FLOW_END = Op(
    "flow_end",
    "queue = clip(x, -1, 1); cursor.chunk, .stop = those of the plan",
    (
        _f32("x", "r", "H*A"),
        _f32("queue", "w", "H", "A"),
        _words("cursor", "rw", CURSOR_WORDS),
    ),
)
TAKE_ACTION = Op(
    "take_action",
    "previous = the queue's row for cursor.tick, or stays where there is none; action = previous * "
    "scale + offset; cursor.tick += 1",
    (
        _f32("queue", "r", "H", "A"),
        _f32("scale", "r", "A"),
        _f32("offset", "r", "A"),
        _f32("previous", "rw", "A"),
        _words("cursor", "rw", CURSOR_WORDS),
        _f32("action", "w", "A"),
    ),
)

OPS: tuple[Op, ...] = (
    EMBED, RMSNORM, ADD_RMSNORM, LINEAR, CONV_WINDOW, DELTA_GATES, DELTA_RULE, GATED_RMSNORM,
    ROPE_APPEND, ATTENTION, SILU_MUL, LAST_ROW, LAST_VALUES, LAST_CURSOR, ADVANCE, SAMPLE,
    CONV_VERIFY, DELTA_VERIFY, DRAFT_INPUT, DRAFT_BEGIN, DRAFT_NOTE, VERIFY_CURSORS, ACCEPT,
    TAKE_TOKEN, OBSERVE, DENSE, DENSE_ADD, GRU_CELL, FLOW_BEGIN, FLOW_STEP, FLOW_END, TAKE_ACTION,
)  # fmt: skip
