"""Drafting with Qwen3.5's multi-token-prediction head: regions and tapes of draft, verify, commit.

IS NOT: how many tokens to draft (session/speculate), or the filling of the head's rows, which is
part of every forward pass (tapes).

draft         the boundary's token and hidden state -> one drafted token; a cursor of its own moves
draft_next    the same from the last drafted token and the head's own output
verify        boundary's token + drafted ones through the model: samples, and how many agree. Rows
              of keys and values beyond the position are written, nothing else of the state is
commit        the first cursor.rows of what was verified become state, by the ops of decoding
..._each      the same of several lanes; what a lane is to keep is copied into it
"""

from __future__ import annotations

from collections.abc import Mapping

from flashrt.core.region import DType, Region, Role, as_view
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.models.blocks import DeltaInputs, sampled_token
from flashrt.models.lane import kv_regions
from flashrt.models.model import (
    COMMIT,
    COMMIT_EACH,
    DRAFT,
    DRAFT_EACH,
    DRAFT_NEXT,
    DRAFT_NEXT_EACH,
    VERIFY,
    VERIFY_EACH,
    VERIFY_EACH_ROWS,
)
from flashrt.models.qwen35.config import LayerKind, Qwen35Config
from flashrt.models.qwen35.tapes import DRAFT_SHIFT, Qwen35Recorder
from flashrt.models.qwen35.weights import DRAFT_HEAD, layer_name
from flashrt.ops import table as ops

MAX_DRAFT = 8
MAX_ROWS = MAX_DRAFT + 1  # of a verify: the boundary's token and the drafted ones
VERIFY_BUCKETS = (8, MAX_ROWS)  # 8 tokens are one tile of a matrix unit
# A guess may come from the first ids alone, which byte-pair encoding gives to the commonest tokens.
# With a vocabulary of 248,320 the head's matrix is a third of all weights; drafts stream a quarter.
DRAFT_VOCABULARY = 1 << 16
PHASES = (
    (DRAFT, 1), (DRAFT_NEXT, 1), *((VERIFY, rows) for rows in VERIFY_BUCKETS),
    (COMMIT, MAX_ROWS),
)  # fmt: skip
SHARED_PHASES = (
    (DRAFT_EACH, MAX_RUNS), (DRAFT_NEXT_EACH, MAX_RUNS), (VERIFY_EACH, VERIFY_EACH_ROWS),
    (COMMIT_EACH, MAX_ROWS),
)  # fmt: skip
# The most rows of a lane.
RUN_ROWS = {
    **dict.fromkeys((DRAFT, DRAFT_NEXT, DRAFT_EACH, DRAFT_NEXT_EACH), 1),
    **dict.fromkeys((VERIFY, COMMIT, VERIFY_EACH, COMMIT_EACH), MAX_ROWS),
}


def lane_regions(c: Qwen35Config, max_positions: int, kv_dtype: DType) -> tuple[Region, ...]:
    """The head's rows, and what passes between draft, verify, commit and the host."""
    rows = (c.kv_heads, max_positions, c.head_dim)
    in_proj = c.conv_channels + c.value_heads * c.value_dim + 2 * c.value_heads
    kept = MAX_ROWS * c.n_linear
    regions = [
        *kv_regions("draft_keys", "draft_values", rows, kv_dtype),
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


def record(config: Qwen35Config, regions: Mapping[str, Region], tape: Tape) -> None:
    """Fill a tape of one of PHASES or SHARED_PHASES."""
    if RUN_ROWS[tape.phase] == 1:
        is_first = tape.phase in (DRAFT, DRAFT_EACH)
        DraftRecorder(config, regions, tape).draft(is_first=is_first)
    elif tape.phase in (VERIFY, VERIFY_EACH):
        VerifyRecorder(config, regions, tape).verify()
    else:
        VerifyRecorder(config, regions, tape).commit()


class DraftRecorder(Qwen35Recorder):
    """One row through the draft head; all launches on the cursor `draft_cursor`."""

    def draft(self, *, is_first: bool) -> None:
        """The token of the draft cursor -> the next token, there and in `drafted`."""
        regions, at = self.regions, f"{DRAFT_HEAD}.layer"
        cursor, self.cursor = regions["cursor"], regions["draft_cursor"]
        if is_first:
            self.tape.record(ops.DRAFT_BEGIN, cursor=cursor, draft=self.cursor)
            self._note(cursor)
        self.place_rows()
        token, own = sampled_token(self.cursor), regions["draft_hidden"]
        last = regions["last_hidden"] if is_first else own
        keys, values = as_view(regions["draft_keys"]), as_view(regions["draft_values"])
        x, u, q = self.draft_keys(token, hidden=own, last=last)
        r = self.attend(at, u, q, keys, values, DRAFT_SHIFT)
        r = self.mlp(at, x, r)
        if self.is_shared:
            h = self.activation(f"{DRAFT_HEAD}.h", self.config.hidden)
            self.add_rmsnorm(x, r, f"{DRAFT_HEAD}.norm", h)
            self.launch(ops.LAST_ROW, x=h, y=own)
            all_logits = self.scratch("logits", _vocabulary(self.config))
            self.head(h, self.head_weight, all_logits, _vocabulary(self.config))
            logits = all_logits.span(0, 1).per_run()
        else:
            self.add_rmsnorm(x, r, f"{DRAFT_HEAD}.norm", own)
            logits = regions["draft_logits"].view()
            self.head(own, self.head_weight, logits, _vocabulary(self.config))
        self.launch(ops.ADVANCE)
        self.sample(logits, self.cursor)
        self._note(cursor)

    def _note(self, cursor: Region) -> None:
        journal, drafted = self.regions["journal"], self.regions["drafted"]
        self.tape.record(
            ops.DRAFT_NOTE, cursor=cursor, draft=self.cursor, journal=journal, drafted=drafted
        )


class VerifyRecorder(Qwen35Recorder):
    """Forward passes that leave the recurrent state alone, and keep what changes it later."""

    def __init__(self, config: Qwen35Config, regions: Mapping[str, Region], tape: Tape) -> None:
        super().__init__(config, regions, tape, kept=self.kept)

    def kept(self, index: int) -> DeltaInputs:
        """Where a verify keeps what the delta rule of a linear layer reads."""
        rows = self.tape.run_rows
        u, qkv, decay, beta = (
            self.regions[f"verify_{name}"].span(index * MAX_ROWS, rows)
            for name in ("u", "qkv", "decay", "beta")
        )
        own = self.scratch(f"kept.{index}.u", u.shape[1]) if self.is_shared else u
        return DeltaInputs(own, u, qkv, decay, beta)

    def verify(self) -> None:
        """`drafted` -> `samples`, `verdict`; keeps hidden states and what the delta rule reads."""
        rows, regions = self.tape.run_rows, self.regions
        tokens = regions["drafted"].view().cols(0, rows)
        hidden, logits = regions["verify_hidden"].span(0, rows), regions["verify_logits"]
        if self.is_shared:
            of_all = self.activation("hidden", self.config.hidden)
            self.layers(tokens, of_all)
            all_logits = self.scratch("logits", self.config.vocab_size)
            self.head(of_all, self.head_weight, all_logits)
            self.launch(ops.KEEP_ROWS, x=of_all, y=hidden)
            self.launch(ops.KEEP_VALUES, x=all_logits, y=logits.span(0, rows))
        else:
            self.layers(tokens, hidden)
            self.head(hidden, self.head_weight, logits.span(0, rows))
        samples = regions["samples"].span(0, rows)
        self.launch(ops.VERIFY_CURSORS, samples=samples)
        for row in range(rows):
            self.sample(logits.span(row, 1), regions["samples"].at(row))
        verdict = regions["verdict"].view().cols(0, rows + 1)
        self.launch(ops.ACCEPT, drafted=tokens, samples=samples, verdict=verdict)

    def commit(self) -> None:
        """The kept rows [0, cursor.rows) -> window, state, last hidden state, token, position."""
        c, regions = self.config, self.regions
        linear = [i for i, kind in enumerate(c.layers) if kind is LayerKind.LINEAR]
        for index, layer in enumerate(linear):
            state, window = regions["state"].at(index), regions["window"].at(index)
            self.update_state(layer_name(layer), self.kept(index), state, window, c.key_heads)
        self.launch(ops.LAST_ROW, x=regions["verify_hidden"], y=regions["last_hidden"])
        self.launch(ops.TAKE_TOKEN, samples=regions["samples"])
        self.launch(ops.ADVANCE)
