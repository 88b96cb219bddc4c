"""Launches of the ops that drafting adds, and of attention with rows shifted against positions.

IS: inputs only, as in cases.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flashrt.ops.table import CURSOR_WORDS
from tests.backend.cases import (
    EPS,
    ROWS,
    Grid,
    attention,
    conv_window,
    cursor,
    delta_rule,
    randn,
    rope_append,
    valid,
    weights,
)
from tests.backend.runner import Case, rng_for

# Rows that are not at the positions they speak of: the draft head's.
SHIFTED: Grid = (
    (rope_append, (
        {"heads": (4, 2), "D": 32, "R2": 4, "position": 0, "S": 77, "kv": "f32", "shift": 1},
    )),
    (attention, (
        {"heads": (4, 2), "D": 32, "position": 0, "S": 77, "kv": "bf16", "shift": 1},
        {"heads": (2, 2), "D": 80, "position": 250, "S": 700, "kv": "f32", "shift": 260},
    )),
)  # fmt: skip


def draft_input(T: int, n: int, V: int, H: int) -> Case:
    rng = rng_for("draft_input", T, n, V, H)
    tokens = rng.integers(0, V, T).astype(np.int32)
    tokens[n:] = -(2**31)
    operands = {
        "tokens": tokens, "table": weights(rng, V, H), "hidden": valid(weights(rng, T, H), n),
        "last": weights(rng, 1, H), "w_token": 1 + randn(rng, H), "w_hidden": 1 + randn(rng, H),
        "cursor": cursor(5, n), "y": (T, 2 * H),
    }  # fmt: skip
    return Case("draft_input", operands, {"eps": EPS})


def draft_input_seen(T: int, n: int, V: int, H: int) -> Case:
    """Every third row is no token."""
    case = draft_input(T, n, V, H)
    tokens = np.array(case.operands["tokens"])
    tokens[::3] += np.int32(1 << 30)
    seen = valid(randn(rng_for("draft_input_seen", T, n, H), T, H), n)
    operands = {**case.operands, "tokens": tokens, "seen": seen}
    return Case("draft_input_seen", operands, case.attrs)


def samples(T: int, tokens: list[int]) -> NDArray[np.int32]:
    words = np.zeros((T, CURSOR_WORDS), np.int32)
    words[: len(tokens), 2] = tokens
    words[len(tokens) :] = -1
    return words


def accept(T: int, drafted: list[int], sampled: list[int]) -> Case:
    tokens = np.full(T, 9, np.int32)
    tokens[: len(drafted)] = drafted
    operands = {
        "drafted": tokens, "samples": samples(T, sampled), "cursor": cursor(5, len(drafted)),
        "verdict": (T + 1,),
    }  # fmt: skip
    return Case("accept", operands, label=f"accept[{drafted},{sampled}]")


def draft_note(position: int, token: int) -> Case:
    draft = cursor(position, 1)
    draft[2] = token
    operands = {
        "cursor": cursor(11, 3), "draft": draft, "journal": np.full((1, 20, 1), 4, np.int32),
        "drafted": np.full(5, 4, np.int32),
    }  # fmt: skip
    return Case("draft_note", operands, label=f"draft_note[{position},{token}]")


def drafting_cases() -> list[Case]:
    """Ops of drafting, and the verify forms of ops on the state."""
    window, delta = {"C": 240, "W": 3, "margin": (0, 0)}, {"heads": (1, 2), "size": (100, 60)}
    cases = [draft_input(T, n, 77, H) for (T, n), H in zip(ROWS, (96, 96, 200, 96, 7), strict=True)]
    cases += [draft_input_seen(T, n, 77, H) for T, n, H in ((9, 5, 200), (9, 9, 7))]
    for T, n in ((1, 1), (9, 4), (9, 9)):
        cases += [replace(conv_window(T, n, **window), op="conv_verify")]
        cases += [replace(delta_rule(T, n, **delta), op="delta_verify")]
        cases += [Case("verify_cursors", {"cursor": cursor(40, n), "samples": (T, CURSOR_WORDS)})]
        taken = {"samples": samples(T, [*range(20, 20 + n)]), "cursor": cursor(5, n)}
        cases += [Case("take_token", taken)]
    cases += [accept(1, [7], [3]), accept(9, [7, 3, 8], [3, 8, 2]), accept(9, [7, 3, 8], [3, 1, 8])]
    cases += [accept(4, [7, 3, 8, 1], [2, 8, 1, 5]), accept(4, [7, 3, 0, 1], [3, -1, 1, 5])]
    cases += [draft_note(11, 6), draft_note(15, 6), draft_note(13, -1), draft_note(20, 6)]
    begin = {"cursor": cursor(30, 8), "draft": np.full(CURSOR_WORDS, 5, np.int32)}
    return [*cases, Case("draft_begin", begin)]
