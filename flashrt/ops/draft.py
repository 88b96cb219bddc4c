"""Drafting and verifying: the draft head's input, and bookkeeping on cursors.

IS: signatures. IS NOT: code; see `table`. A draft has a cursor of its own (`draft`), and each row
of a verify has one (`samples`), of the words of a lane's cursor: so the launches of a draft are
those of decoding, with another cursor.
"""

from __future__ import annotations

from flashrt.core.op import Attr, Op
from flashrt.ops.cursor import VerdictWord
from flashrt.ops.params import CURSOR, act, cursors, f32, i32, matrix

DRAFT_INPUT = Op(
    "draft_input",
    "y[t] = [rmsnorm(table[tokens[t]]) | rmsnorm(h[t - 1])], h[-1] = last; norm weights hold "
    "1 + weight",
    (
        i32("tokens", "r", "T"),
        matrix("table", "V", "H"),
        act("hidden", "r", "T", "H"),
        act("last", "r", 1, "H"),
        f32("w_token", "r", "H"),
        f32("w_hidden", "r", "H"),
        CURSOR,
        act("y", "w", "T", "2*H"),
    ),
    (Attr("eps", "float32"),),
)
DRAFT_BEGIN = Op("draft_begin", "draft = cursor, of one row", (CURSOR, cursors("draft", "w")))
DRAFT_NOTE = Op(
    "draft_note",
    "drafted[draft.position - cursor.position] = journal[draft.position] = draft.token, which "
    "becomes 0 if it is no token",
    (
        CURSOR,
        cursors("draft", "rw"),
        i32("journal", "rw", 1, "S", 1),
        i32("drafted", "rw", "N"),
    ),
)
VERIFY_CURSORS = Op(
    "verify_cursors",
    "samples[t] = a cursor of one row at position + t + 1; of no row if row t is not valid",
    (CURSOR, cursors("samples", "w", "T")),
)
ACCEPT = Op(
    "accept",
    "verdict = [n, tokens that were sampled after each of the n accepted rows]: row 0, and the "
    "longest run of drafted tokens that equal what was sampled before them",
    (
        i32("drafted", "r", "T"),
        cursors("samples", "r", "T"),
        CURSOR,
        i32("verdict", "w", "T+1", words=VerdictWord),
    ),
)
TAKE_TOKEN = Op(
    "take_token",
    "cursor.token = samples[rows - 1].token",
    (cursors("samples", "r", "T"), cursors("cursor", "rw")),
)
