"""Qwen3.5 dense text models: Gated DeltaNet layers with full attention among them.

IS: the regions of a lane and the tapes of each phase; formulas as in transformers'
modeling_qwen3_5. IS NOT: config fields (qwen35_config), weight names (qwen35_weights) or kernels
(ops/table). Called by: models.model_for, engine.
"""

from __future__ import annotations

from flashrt.base.errors import PlanError
from flashrt.core.region import DType, Layout, Operand, Region, Role
from flashrt.core.tape import Tape
from flashrt.models.model import BUCKETS
from flashrt.models.qwen35_config import LayerKind, Qwen35Config
from flashrt.models.qwen35_weights import (
    EMBED,
    FINAL_NORM,
    HEAD,
    INV_FREQ,
    layer_name,
    weight_rules,
)
from flashrt.ops import table as ops

PREFILL, DECODE, SAMPLE = "prefill", "decode", "sample"
_SPREAD_ROWS = (
    8  # up to this many rows, attention leaves partials so that key blocks can be spread over cores
)


class Qwen35:
    """One model at one context length. See `models.model.Model`."""

    name = "qwen3_5"
    buckets = BUCKETS

    def __init__(
        self, config: Qwen35Config, *, max_positions: int, kv_dtype: DType, has_draft_head: bool
    ) -> None:
        if max_positions < 1:
            raise PlanError(f"max_positions is {max_positions}; at least 1 is needed")
        if kv_dtype not in (DType.BF16, DType.F32):
            raise PlanError(f"kv_dtype is {kv_dtype}; {DType.BF16} and {DType.F32} are supported")
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_positions = max_positions
        self.weights = weight_rules(config, has_draft_head)
        self.lane_regions = _lane_regions(config, max_positions, kv_dtype)
        self.phases = (*((PREFILL, rows) for rows in BUCKETS), (DECODE, 1), (SAMPLE, 1))
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of a phase. Raises PlanError for a pair that is not in `phases`."""
        if (phase, rows) not in self.phases:
            raise PlanError(
                f"{self.name} has no phase {phase!r} of {rows} rows; phases: {self.phases}"
            )
        recorder = _Recorder(self.config, self.max_positions, self._regions, Tape(phase, rows))
        if phase == PREFILL:
            recorder.forward(self._regions["tokens"].view().cols(0, rows))
        elif phase == DECODE:
            recorder.forward(self._regions["cursor"].view().cols(2, 3))  # the token sampled last
            recorder.sample()
        else:
            recorder.sample()
        return recorder.tape


def _lane_regions(c: Qwen35Config, max_positions: int, kv_dtype: DType) -> tuple[Region, ...]:
    regions = [
        Region("cursor", (ops.CURSOR_WORDS,), DType.I32, Role.FIXED),
        Region("sampler", (ops.SAMPLER_WORDS,), DType.U32, Role.FIXED),
    ]
    if n := c.n_linear:
        state, window = (
            (n, c.value_heads, c.key_dim, c.value_dim),
            (n, c.conv_taps - 1, c.conv_channels),
        )
        regions += [
            Region("state", state, DType.F32, Role.FIXED, Layout.COLUMN_BLOCKS, is_digested=True),
            Region("window", window, DType.F32, Role.FIXED, is_digested=True),
        ]
    regions.append(Region("last_hidden", (1, c.hidden), DType.ACT, Role.FIXED, is_digested=True))
    regions.append(Region("journal", (1, max_positions, 1), DType.I32, Role.ROWS, is_digested=True))
    if n := c.n_full:
        rows = (n * c.kv_heads, max_positions, c.head_dim)
        regions += [
            Region("keys", rows, kv_dtype, Role.ROWS, Layout.ROWS_IN_LANES, is_digested=True),
            Region("values", rows, kv_dtype, Role.ROWS, Layout.COLS_IN_LANES, is_digested=True),
        ]
    return (
        *regions,
        Region("tokens", (max(BUCKETS),), DType.I32, Role.IO),
        Region("logits", (1, c.vocab_size), DType.F32, Role.IO),
    )


class _Recorder:
    """Records one tape. Scratch is named by layer, so that the planner may give its bytes to the
    next layer.
    """

    def __init__(
        self, config: Qwen35Config, max_positions: int, regions: dict[str, Region], tape: Tape
    ) -> None:
        self.config = config
        self.n_blocks = -(-max_positions // ops.ATTENTION_BLOCK)
        self.regions = regions
        self.cursor = regions["cursor"]
        self.tape = tape
        self.rows = tape.rows

    def forward(self, tokens: Operand) -> None:
        """Rows of tokens through all layers; leaves the last row's final hidden state and moves the
        cursor.
        """
        c, layers = self.config, self.config.layers
        x = self.tape.scratch("x", self.rows, c.hidden)
        self.tape.record(
            ops.EMBED, tokens=tokens, table=self.regions[EMBED], cursor=self.cursor,
            journal=self.regions["journal"], x=x,
        )  # fmt: skip
        h = self._act(f"{layer_name(0)}.h", c.hidden)
        norm = self.regions[f"{layer_name(0)}.input_norm"]
        self.tape.record(ops.RMSNORM, x=x, w=norm, cursor=self.cursor, y=h, eps=c.eps)
        for i, kind in enumerate(layers):
            at, n_before = layer_name(i), layers[:i].count(kind)
            is_linear = kind is LayerKind.LINEAR
            r = (
                self._linear_attention(at, h, n_before)
                if is_linear
                else self._full_attention(at, h, n_before)
            )
            h = self._add_norm(f"{at}.mlp.h", x, r, f"{at}.mlp_norm")
            r = self._mlp(at, h)
            is_last = i + 1 == len(layers)
            following = "final" if is_last else layer_name(i + 1)
            h = self._add_norm(
                f"{following}.h", x, r, FINAL_NORM if is_last else f"{following}.input_norm"
            )
        self.tape.record(ops.LAST_ROW, x=h, cursor=self.cursor, y=self.regions["last_hidden"])
        self.tape.record(ops.ADVANCE, cursor=self.cursor)

    def sample(self) -> None:
        """Logits of the last hidden state, and the next token from them."""
        logits = self.regions["logits"]
        head = self.regions[EMBED if self.config.is_tied else HEAD]
        work = self.tape.scratch("sample.work", 2, self.config.vocab_size)
        self.tape.record(
            ops.LINEAR, x=self.regions["last_hidden"], w=head, cursor=self.cursor, y=logits
        )
        self.tape.record(
            ops.SAMPLE,
            logits=logits,
            sampler=self.regions["sampler"],
            work=work,
            cursor=self.cursor,
        )

    def _linear_attention(self, at: str, h: Region, index: int) -> Region:
        c, tape, cursor = self.config, self.tape, self.cursor
        inner, channels = c.value_heads * c.value_dim, c.conv_channels
        u = self._linear(f"{at}.u", h, f"{at}.in_proj").view()  # columns [qkv | z | b | a]
        z, b, a = (
            u.cols(start, start + width)
            for start, width in (
                (channels, inner),
                (channels + inner, c.value_heads),
                (channels + inner + c.value_heads, c.value_heads),
            )
        )
        y = tape.scratch(f"{at}.qkv", self.rows, channels)
        tape.record(
            ops.CONV_WINDOW, u=u.cols(0, channels), w=self.regions[f"{at}.conv"],
            window=self.regions["window"].at(index), cursor=cursor, y=y,
        )  # fmt: skip
        decay = tape.scratch(f"{at}.decay", self.rows, c.value_heads)
        beta = tape.scratch(f"{at}.beta", self.rows, c.value_heads)
        tape.record(
            ops.DELTA_GATES, y=y, a=a, b=b, a_log=self.regions[f"{at}.a_log"],
            dt_bias=self.regions[f"{at}.dt_bias"], cursor=cursor, decay=decay, beta=beta,
            key_heads=c.key_heads, key_dim=c.key_dim,
        )  # fmt: skip
        o = tape.scratch(f"{at}.o", self.rows, inner)
        tape.record(
            ops.DELTA_RULE, y=y, decay=decay, beta=beta, state=self.regions["state"].at(index),
            cursor=cursor, o=o, key_heads=c.key_heads,
        )  # fmt: skip
        mixed = self._act(f"{at}.mixed", inner)
        tape.record(
            ops.GATED_RMSNORM, o=o, z=z, w=self.regions[f"{at}.gated_norm"], cursor=cursor,
            y=mixed, eps=c.eps,
        )  # fmt: skip
        return self._linear(f"{at}.r", mixed, f"{at}.out_proj")

    def _full_attention(self, at: str, h: Region, index: int) -> Region:
        c, tape, cursor = self.config, self.tape, self.cursor
        keys, values = (
            self.regions[name].span(index * c.kv_heads, c.kv_heads) for name in ("keys", "values")
        )
        u = self._linear(f"{at}.u", h, f"{at}.qkv")  # columns [per head: query, gate | k | v]
        q = tape.scratch(f"{at}.q", self.rows, c.query_heads, c.head_dim)
        tape.record(
            ops.ROPE_APPEND, u=u, q_norm=self.regions[f"{at}.q_norm"],
            k_norm=self.regions[f"{at}.k_norm"], inv_freq=self.regions[INV_FREQ], cursor=cursor,
            q=q, keys=keys, values=values, eps=c.eps,
        )  # fmt: skip
        partial_rows = self.rows if self.rows <= _SPREAD_ROWS else 1
        partials = tape.scratch(
            f"{at}.partials", partial_rows, c.query_heads, self.n_blocks, c.head_dim + 2
        )
        mixed = self._act(f"{at}.mixed", c.query_heads * c.head_dim)
        tape.record(
            ops.ATTENTION,
            q=q,
            u=u,
            keys=keys,
            values=values,
            cursor=cursor,
            partials=partials,
            y=mixed,
        )
        return self._linear(f"{at}.r", mixed, f"{at}.o_proj")

    def _mlp(self, at: str, h: Region) -> Region:
        u = self._linear(f"{at}.mlp.u", h, f"{at}.gate_up")
        y = self._act(f"{at}.mlp.y", self.config.intermediate)
        self.tape.record(ops.SILU_MUL, u=u, cursor=self.cursor, y=y)
        return self._linear(f"{at}.mlp.r", y, f"{at}.down")

    def _linear(self, name: str, x: Region, weight: str) -> Region:
        """A new scratch region [rows, N] = x w^T."""
        w = self.regions[weight]
        y = self.tape.scratch(name, self.rows, w.shape[0])
        self.tape.record(ops.LINEAR, x=x, w=w, cursor=self.cursor, y=y)
        return y

    def _add_norm(self, name: str, x: Region, r: Region, norm: str) -> Region:
        """x += r, and a new activation that holds its norm."""
        h = self._act(name, self.config.hidden)
        w = self.regions[norm]
        self.tape.record(
            ops.ADD_RMSNORM, x=x, r=r, w=w, cursor=self.cursor, y=h, eps=self.config.eps
        )
        return h

    def _act(self, name: str, columns: int) -> Region:
        """Scratch in the backend's activation dtype, as `linear` reads it."""
        return self.tape.scratch(name, self.rows, columns, dtype=DType.ACT)
