"""Qwen3.5 dense text models: Gated DeltaNet layers with full attention among them.

IS: the regions of a lane and the tapes of each phase; formulas as in transformers'
modeling_qwen3_5. IS NOT: config fields (qwen35_config), weight names (qwen35_weights) or kernels
(ops/table). Called by: models.model_for, engine.
"""

from __future__ import annotations

import itertools

from flashrt.base.errors import PlanError
from flashrt.core.op import AttrValue, Op
from flashrt.core.region import DType, Layout, Operand, Region, Role, View
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
    """Records one tape. Scratch is named by layer: the planner may give its bytes to the next."""

    def __init__(
        self, config: Qwen35Config, max_positions: int, regions: dict[str, Region], tape: Tape
    ) -> None:
        self.config = config
        self.n_blocks = -(-max_positions // ops.ATTENTION_BLOCK)
        self.regions = regions  # of the lane and of the weights, by name
        self.tape = tape
        self.rows = tape.rows

    def forward(self, tokens: Operand) -> None:
        """Rows of tokens through all layers: leaves the last hidden state, moves the cursor."""
        c, regions = self.config, self.regions
        x = self._scratch("x", c.hidden)
        self._launch(
            ops.EMBED, tokens=tokens, table=regions[EMBED], journal=regions["journal"], x=x
        )
        h = self._activation(f"{layer_name(0)}.h", c.hidden, _input_dtype(c, 0))
        self._launch(ops.RMSNORM, x=x, w=regions[f"{layer_name(0)}.input_norm"], y=h, eps=c.eps)
        mixers = {LayerKind.LINEAR: self._linear_attention, LayerKind.FULL: self._full_attention}
        for i, kind in enumerate(c.layers):
            at, following = layer_name(i), layer_name(i + 1)
            r = mixers[kind](at, h, c.layers[:i].count(kind))
            h = self._add_rmsnorm(f"{at}.mlp.h", x, r, f"{at}.mlp_norm")
            r = self._mlp(at, h)
            is_last = i + 1 == len(c.layers)
            norm = FINAL_NORM if is_last else f"{following}.input_norm"
            h = self._add_rmsnorm(f"{following}.h", x, r, norm, _input_dtype(c, i + 1))
        self._launch(ops.LAST_ROW, x=h, y=regions["last_hidden"])
        self._launch(ops.ADVANCE)

    def sample(self) -> None:
        """Logits of the last hidden state, and the next token from them."""
        hidden, logits = self.regions["last_hidden"], self.regions["logits"]
        head = self.regions[EMBED if self.config.is_tied else HEAD]
        work = self.tape.scratch("sample.work", 2, self.config.vocab_size)
        self._launch(ops.LINEAR, x=hidden, w=head, y=logits)
        self._launch(ops.SAMPLE, logits=logits, sampler=self.regions["sampler"], work=work)

    def _linear_attention(self, at: str, h: Region, index: int) -> Region:
        """Gated DeltaNet; `index` counts the layers with a recurrent state."""
        c, weights = self.config, self.regions
        inner, channels = c.value_heads * c.value_dim, c.conv_channels
        u = self._linear(f"{at}.u", h, f"{at}.in_proj")
        qkv, z, b, a = _columns(u, channels, inner, c.value_heads, c.value_heads)
        y = self._scratch(f"{at}.qkv", channels)
        window = self.regions["window"].at(index)
        self._launch(ops.CONV_WINDOW, u=qkv, w=weights[f"{at}.conv"], window=window, y=y)
        decay = self._scratch(f"{at}.decay", c.value_heads)
        beta = self._scratch(f"{at}.beta", c.value_heads)
        self._launch(
            ops.DELTA_GATES, y=y, a=a, b=b, a_log=weights[f"{at}.a_log"],
            dt_bias=weights[f"{at}.dt_bias"], decay=decay, beta=beta, key_heads=c.key_heads,
            key_dim=c.key_dim,
        )  # fmt: skip
        o = self._scratch(f"{at}.o", inner)
        state = self.regions["state"].at(index)
        self._launch(
            ops.DELTA_RULE, y=y, decay=decay, beta=beta, state=state, o=o, key_heads=c.key_heads
        )
        mixed = self._activation(f"{at}.mixed", inner)
        norm = weights[f"{at}.gated_norm"]
        self._launch(ops.GATED_RMSNORM, o=o, z=z, w=norm, y=mixed, eps=c.eps)
        return self._linear(f"{at}.r", mixed, f"{at}.out_proj")

    def _full_attention(self, at: str, h: Region, index: int) -> Region:
        """Gated attention; `index` counts the layers with keys and values."""
        c, weights = self.config, self.regions
        keys = self.regions["keys"].span(index * c.kv_heads, c.kv_heads)
        values = self.regions["values"].span(index * c.kv_heads, c.kv_heads)
        u = self._linear(f"{at}.u", h, f"{at}.qkv")  # columns [per head: query, gate | k | v]
        q = self._scratch(f"{at}.q", c.query_heads, c.head_dim)
        self._launch(
            ops.ROPE_APPEND, u=u, q_norm=weights[f"{at}.q_norm"], k_norm=weights[f"{at}.k_norm"],
            inv_freq=weights[INV_FREQ], q=q, keys=keys, values=values, eps=c.eps,
        )  # fmt: skip
        spread = self.rows if self.rows <= _SPREAD_ROWS else 1
        partial = (spread, c.query_heads, self.n_blocks, c.head_dim + 2)
        partials = self.tape.scratch(f"{at}.partials", *partial)
        mixed = self._activation(f"{at}.mixed", c.query_heads * c.head_dim)
        self._launch(ops.ATTENTION, q=q, u=u, keys=keys, values=values, partials=partials, y=mixed)
        return self._linear(f"{at}.r", mixed, f"{at}.o_proj")

    def _mlp(self, at: str, h: Region) -> Region:
        u = self._linear(f"{at}.mlp.u", h, f"{at}.gate_up")
        y = self._activation(f"{at}.mlp.y", self.config.intermediate)
        self._launch(ops.SILU_MUL, u=u, y=y)
        return self._linear(f"{at}.mlp.r", y, f"{at}.down")

    def _linear(self, name: str, x: Region, weight: str) -> Region:
        """A new scratch region [rows, N] = x w^T."""
        w = self.regions[weight]
        y = self._scratch(name, w.shape[0])
        self._launch(ops.LINEAR, x=x, w=w, y=y)
        return y

    def _add_rmsnorm(
        self, name: str, x: Region, r: Region, norm: str, dtype: DType = DType.ACT
    ) -> Region:
        """x += r, and a new activation that holds its norm."""
        h = self._activation(name, self.config.hidden, dtype)
        self._launch(ops.ADD_RMSNORM, x=x, r=r, w=self.regions[norm], y=h, eps=self.config.eps)
        return h

    def _launch(self, op: Op, **bindings: Operand | AttrValue) -> None:
        self.tape.record(op, cursor=self.regions["cursor"], **bindings)

    def _scratch(self, name: str, *columns: int) -> Region:
        return self.tape.scratch(name, self.rows, *columns)

    def _activation(self, name: str, columns: int, dtype: DType = DType.ACT) -> Region:
        """Scratch in the backend's activation dtype, as `linear` reads it."""
        return self.tape.scratch(name, self.rows, columns, dtype=dtype)


def _input_dtype(c: Qwen35Config, layer: int) -> DType:
    """Of a layer's normalised input.

    A delta rule with few tokens behind it writes o = beta v (k . q), where k . q may cancel, and
    the norm that follows amplifies what is left of it: rounding its input to bfloat16 makes most
    of a model's error, so it goes in wide. The last layer's output feeds the head.
    """
    is_delta = layer < len(c.layers) and c.layers[layer] is LayerKind.LINEAR
    return DType.ACT_WIDE if is_delta else DType.ACT


def _columns(u: Region, *widths: int) -> tuple[View, ...]:
    """Windows over the columns of u, side by side."""
    stops = tuple(itertools.accumulate(widths))
    return tuple(
        u.view().cols(stop - width, stop) for width, stop in zip(widths, stops, strict=True)
    )
