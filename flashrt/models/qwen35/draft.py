"""Drafting with Qwen3.5's multi-token-prediction head: regions and tapes of draft, verify, commit.

IS: one line per launch. IS NOT: how many tokens to draft (session/speculate), or the filling of the
head's rows, which is part of every forward pass (qwen35_tapes). Called by: qwen35.

draft         the boundary's token and hidden state -> one drafted token; a cursor of its own moves
draft_next    the same from the last drafted token and the head's own output
verify        boundary's token + drafted ones through the model: samples, and how many agree. Rows
              of keys and values beyond the position are written, nothing else of the state is
commit        the first cursor.rows of what was verified become state, by the ops of decoding
"""

from __future__ import annotations

from typing import ClassVar

from flashrt.core.op import Op
from flashrt.core.region import DType, Layout, Operand, Region, Role, View
from flashrt.core.tape import Tape
from flashrt.models.qwen35.config import LayerKind, Qwen35Config
from flashrt.models.qwen35.tapes import DRAFT_SHIFT, Recorder, columns
from flashrt.models.qwen35.weights import DRAFT, layer_name
from flashrt.ops import table as ops

DRAFT_PHASE, DRAFT_NEXT, VERIFY, COMMIT = "draft", "draft_next", "verify", "commit"
MAX_DRAFT = 8
MAX_ROWS = MAX_DRAFT + 1  # of a verify: the boundary's token comes first
VERIFY_BUCKETS = (8, MAX_ROWS)  # 8 tokens are one tile of a matrix unit
# A guess may come from the first ids alone, which byte-pair encoding gives to the commonest tokens.
# With a vocabulary of 248,320 the head's matrix is a third of all weights; drafts stream a quarter.
DRAFT_VOCABULARY = 1 << 16
PHASES = (
    (DRAFT_PHASE, 1), (DRAFT_NEXT, 1), *((VERIFY, rows) for rows in VERIFY_BUCKETS),
    (COMMIT, MAX_ROWS),
)  # fmt: skip


def lane_regions(c: Qwen35Config, max_positions: int, kv_dtype: DType) -> tuple[Region, ...]:
    """The head's rows, and what passes between draft, verify, commit and the host."""
    rows = (c.kv_heads, max_positions, c.head_dim)
    in_proj = c.conv_channels + c.value_heads * c.value_dim + 2 * c.value_heads
    kept = MAX_ROWS * c.n_linear
    regions = [
        Region("draft_keys", rows, kv_dtype, Role.ROWS, Layout.ROWS_IN_LANES, is_digested=True),
        Region("draft_values", rows, kv_dtype, Role.ROWS, Layout.COLS_IN_LANES, is_digested=True),
        Region("draft_cursor", (ops.CURSOR_WORDS,), DType.I32, Role.IO),
        Region("draft_hidden", (1, c.hidden), DType.ACT, Role.IO),
        Region("draft_logits", (1, _vocabulary(c)), DType.F32, Role.IO),
        Region("drafted", (MAX_ROWS,), DType.I32, Role.IO),
        Region("samples", (MAX_ROWS, ops.CURSOR_WORDS), DType.I32, Role.IO),
        Region("verdict", (MAX_ROWS + 1,), DType.I32, Role.IO),
        Region("verify_logits", (MAX_ROWS, c.vocab_size), DType.F32, Role.IO),
        Region("verify_hidden", (MAX_ROWS, c.hidden), DType.ACT, Role.IO),
    ]
    if kept:  # layer-major: what a commit needs of each linear layer
        regions += [
            Region("verify_u", (kept, in_proj), DType.F32, Role.IO),
            Region("verify_qkv", (kept, c.conv_channels), DType.F32, Role.IO),
            Region("verify_decay", (kept, c.value_heads), DType.F32, Role.IO),
            Region("verify_beta", (kept, c.value_heads), DType.F32, Role.IO),
        ]
    return tuple(regions)


def _vocabulary(c: Qwen35Config) -> int:
    return min(c.vocab_size, DRAFT_VOCABULARY)


def record(
    config: Qwen35Config, max_positions: int, regions: dict[str, Region], tape: Tape
) -> None:
    """Fill a tape of one of PHASES."""
    if tape.phase in (DRAFT_PHASE, DRAFT_NEXT):
        _DraftRecorder(config, max_positions, regions, tape).draft(tape.phase == DRAFT_PHASE)
    elif tape.phase == VERIFY:
        _VerifyRecorder(config, max_positions, regions, tape).verify()
    else:
        _VerifyRecorder(config, max_positions, regions, tape).commit()


class _DraftRecorder(Recorder):
    """One row through the draft head; all launches on the cursor `draft_cursor`."""

    def draft(self, is_first: bool) -> None:
        """The token of the draft cursor -> the next token, there and in `drafted`."""
        regions, at = self.regions, f"{DRAFT}.layer"
        cursor, self.cursor = regions["cursor"], regions["draft_cursor"]
        if is_first:
            self.tape.record(ops.DRAFT_BEGIN, cursor=cursor, draft=self.cursor)
            self._note(cursor)
        token, own = self.cursor.view().cols(2, 3), regions["draft_hidden"]
        last = regions["last_hidden"] if is_first else own
        keys, values = regions["draft_keys"], regions["draft_values"]
        x, u, q = self._draft_qkv(token, hidden=own, last=last)
        r = self._attend(at, u, q, keys, values, DRAFT_SHIFT)
        r = self._mlp(at, x, r)
        self._add_rmsnorm(x, r, f"{DRAFT}.norm", own)
        logits = self._head(own, regions["draft_logits"], _vocabulary(self.config))
        self._launch(ops.ADVANCE)
        self._sample(logits, self.cursor)
        self._note(cursor)

    def _note(self, cursor: Region) -> None:
        journal, drafted = self.regions["journal"], self.regions["drafted"]
        self.tape.record(
            ops.DRAFT_NOTE, cursor=cursor, draft=self.cursor, journal=journal, drafted=drafted
        )


class _VerifyRecorder(Recorder):
    """Forward passes that leave the recurrent state alone, and keep what it would have become."""

    conv_op: ClassVar[Op] = ops.CONV_VERIFY
    delta_op: ClassVar[Op] = ops.DELTA_VERIFY

    def verify(self) -> None:
        """`drafted` -> `samples`, `verdict`; keeps hidden states and what the delta rule reads."""
        rows, regions = self.rows, self.regions
        tokens = regions["drafted"].view().cols(0, rows)
        h = self.layers(tokens, regions["verify_hidden"].span(0, rows))
        logits = regions["verify_logits"]
        self._head(h, logits.span(0, rows))
        samples = regions["samples"].span(0, rows)
        self._launch(ops.VERIFY_CURSORS, samples=samples)
        for row in range(rows):
            self._sample(logits.span(row, 1), regions["samples"].at(row))
        verdict = regions["verdict"].view().cols(0, rows + 1)
        self._launch(ops.ACCEPT, drafted=tokens, samples=samples, verdict=verdict)

    def commit(self) -> None:
        """The kept rows [0, cursor.rows) -> window, state, last hidden state, token, position."""
        c, regions = self.config, self.regions
        for index in range(c.n_linear):
            layer = [i for i, kind in enumerate(c.layers) if kind is LayerKind.LINEAR][index]
            at = layer_name(layer)
            u, qkv, decay, beta = self._delta_inputs(at, index)
            window, state = regions["window"].at(index), regions["state"].at(index)
            self._launch(
                ops.CONV_WINDOW, u=columns(u, c.conv_channels)[0], w=regions[f"{at}.conv"],
                window=window, y=self._scratch(f"{at}.qkv", c.conv_channels),
            )  # fmt: skip
            self._launch(
                ops.DELTA_RULE, y=qkv, decay=decay, beta=beta, state=state,
                o=self._scratch(f"{at}.o", c.value_heads * c.value_dim), key_heads=c.key_heads,
            )  # fmt: skip
        self._launch(ops.LAST_ROW, x=regions["verify_hidden"], y=regions["last_hidden"])
        self._launch(ops.TAKE_TOKEN, samples=regions["samples"])
        self._launch(ops.ADVANCE)

    def _delta_inputs(self, at: str, index: int) -> tuple[Operand, Operand, Operand, Operand]:
        kept = (self._kept(name, index) for name in ("u", "qkv", "decay", "beta"))
        u, qkv, decay, beta = kept
        return u, qkv, decay, beta

    def _kept(self, name: str, index: int) -> View:
        return self.regions[f"verify_{name}"].span(index * MAX_ROWS, self.rows)
