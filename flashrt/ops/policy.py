"""A robot policy between its layers: observe, remember, plan by Euler steps or at once, act.

IS: signatures. IS NOT: code; see `table`. O observation, A action, E encoder, M memory, H rows of a
chunk of actions; everything is float32. The cursor's words are those of cursor.PolicyWord.
"""

from __future__ import annotations

from flashrt.core.op import Attr, Op
from flashrt.ops.cursor import CURSOR_WORDS, REQUEST_WORDS, PolicyWord, RequestWord
from flashrt.ops.params import POLICY_CURSOR, f32, f32_matrix, i32

OBSERVE = Op(
    "observe",
    "x = [clip((observation - mean) / std, -10, 10) | previous]; cursor.observed = cursor.tick",
    (
        f32("observation", "r", "O"),
        f32("mean", "r", "O"),
        f32("std", "r", "O"),
        f32("previous", "r", "A"),
        POLICY_CURSOR,
        f32("x", "w", "O+A"),
    ),
)
GRU_CELL = Op(
    "gru_cell",
    "r, z = sigmoid(u + v), n = tanh(u + r v), each of its third; memory = (1 - z) n + z memory",
    (f32("u", "r", "3*M"), f32("v", "r", "3*M"), f32("memory", "rw", "M")),
)
FLOW_BEGIN = Op(
    "flow_begin",
    "a plan for the observed tick t: context = [memory | encoded]; flow = [x | mask]. In the first "
    "`committed` rows j, mask is 1 and x the promised action of tick t + j (the previous one for a "
    "tick that is done); in the others mask is 0 and x standard normal noise, Philox keyed by "
    "(seed, t). Sets the cursor's words of the plan",
    (
        f32("memory", "r", "M"),
        f32("encoded", "r", "E"),
        f32("previous", "r", "A"),
        f32("queue", "r", "H", "A"),
        i32("request", "r", REQUEST_WORDS, words=RequestWord),
        POLICY_CURSOR,
        f32("context", "w", "M+E"),
        f32("flow", "w", "H*A+H"),
    ),
    (Attr("steps"), Attr("execute")),  # Euler steps; rows to execute after the committed ones
)
FLOW_STEP = Op(
    "flow_step",
    "x += (z w^T + b) / steps in rows whose mask is 0; cursor.plan_steps_left -= 1",
    (
        f32("z", "r", 1, "K"),
        f32_matrix("w", "N", "K"),
        f32("b", "r", "N"),
        f32("mask", "r", "H"),
        f32("x", "rw", "N"),
        POLICY_CURSOR,
    ),
    (Attr("steps"),),
)
FLOW_END = Op(
    "flow_end",
    "queue = clip(x, -1, 1); cursor.chunk, .stop = those of the plan",
    (
        f32("x", "r", "H*A"),
        f32("queue", "w", "H", "A"),
        POLICY_CURSOR,
    ),
)
SEE = Op(
    "see",
    "an observation is there: cursor.observed = cursor.tick",
    (POLICY_CURSOR,),
)
CHUNK_BEGIN = Op(
    "chunk_begin",
    "a plan for the observed tick t: kept = [x | mask]. In the first `committed` rows j, mask is 1 "
    "and x the promised action of tick t + j (the previous one for a tick that is done); in the "
    "others both are 0. Sets the cursor's words of the plan",
    (
        f32("previous", "r", "A"),
        f32("queue", "r", "H", "A"),
        i32("request", "r", REQUEST_WORDS, words=RequestWord),
        POLICY_CURSOR,
        f32("kept", "w", "H*A+H"),
    ),
    (Attr("steps"), Attr("execute")),  # of the plan; rows to execute after the committed ones
)
CHUNK_END = Op(
    "chunk_end",
    "queue = x in rows whose mask is 1, chunk in the others; cursor.chunk, .stop = those of the "
    "plan",
    (
        f32("kept", "r", "H*A+H"),
        f32("chunk", "r", "H", "A", strided=True),
        f32("queue", "w", "H", "A"),
        POLICY_CURSOR,
    ),
)
FLOW_NOISE = Op(
    "flow_noise",
    "x = what is given where request.given, else standard normal noise as of flow_begin, for the "
    "tick of the plan",
    (
        f32("given", "r", "H", "D"),
        i32("request", "r", REQUEST_WORDS, words=RequestWord),
        i32("cursor", "r", CURSOR_WORDS, words=PolicyWord),
        f32("x", "w", "H", "D"),
    ),
)
GUIDE = Op(
    "guide",
    "v -= strength weights[j] (target - (x - time v)), in rows j whose weight is not 0",
    (
        f32("x", "r", "H", "D"),
        f32("target", "r", "H", "D"),
        f32("weights", "r", "H"),
        f32("v", "rw", "H", "D"),
    ),
    (Attr("time", "float32"), Attr("strength", "float32")),
)
EULER = Op(
    "euler",
    "x += step v; cursor.plan_steps_left -= 1",
    (f32("v", "r", "H", "D"), POLICY_CURSOR, f32("x", "rw", "H", "D")),
    (Attr("step", "float32"),),
)
ENSEMBLE = Op(
    "ensemble",
    "a chunk from tick t, averaged with those before it. Is the queue of tick t - 1, row j + 1 of "
    "average is for the tick of row j, of c = counts[j + 1] chunks: with c in [1, H), average[j] = "
    "(average[j + 1] sums[c - 1] + chunk[j] weights[c]) / sums[c] and counts[j] = c + 1. Else "
    "average[j] = chunk[j] and counts[j] = 1",
    (
        f32("chunk", "r", "H", "A"),
        f32("weights", "r", "H"),
        f32("sums", "r", "H"),  # of the first weights, that one included
        POLICY_CURSOR,
        f32("average", "rw", "H", "A"),
        f32("counts", "rw", "H"),
    ),
)
TAKE_ACTION = Op(
    "take_action",
    "previous = the queue's row for cursor.tick, or stays where there is none; action = previous * "
    "scale + offset; cursor.tick += 1",
    (
        f32("queue", "r", "H", "A"),
        f32("scale", "r", "A"),
        f32("offset", "r", "A"),
        f32("previous", "rw", "A"),
        POLICY_CURSOR,
        f32("action", "w", "A"),
    ),
)
