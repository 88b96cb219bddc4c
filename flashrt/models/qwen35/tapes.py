"""Tapes of Qwen3.5: a forward pass over rows of tokens, and sampling.

IS: one line per launch; formulas as in transformers' modeling_qwen3_5. IS NOT: regions of a lane
(qwen35), drafting and verifying (qwen35_draft) or kernels (ops/table). Called by: qwen35,
qwen35_draft.
"""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

from flashrt.core.op import AttrValue, Op
from flashrt.core.region import DType, Operand, Region, View, as_view
from flashrt.core.tape import Tape
from flashrt.models.qwen35.config import LayerKind, Qwen35Config
from flashrt.models.qwen35.weights import DRAFT, EMBED, FINAL_NORM, HEAD, INV_FREQ, layer_name
from flashrt.ops import table as ops

# up to this many rows, attention leaves partials so that key blocks can be spread over cores
_SPREAD_ROWS = 9
DRAFT_SHIFT = 1  # rows of the draft head are one behind the positions they speak of


class Recorder:
    """Records one tape. Scratch is named by layer: the planner may give its bytes to the next."""

    conv_op: ClassVar[Op] = ops.CONV_WINDOW
    delta_op: ClassVar[Op] = ops.DELTA_RULE

    def __init__(
        self, config: Qwen35Config, max_positions: int, regions: dict[str, Region], tape: Tape
    ) -> None:
        self.config = config
        self.n_blocks = -(-max_positions // ops.ATTENTION_BLOCK)
        self.regions = regions  # of the lane and of the weights, by name
        self.tape = tape
        self.rows = tape.rows
        self.cursor = regions["cursor"]

    def forward(self, tokens: Operand) -> None:
        """Rows of tokens through all layers: leaves the last hidden state, moves the cursor.

        Of the last layer, only the state that it leaves is of use for every row; the rest is done
        for the last row alone, unless a draft head wants all hidden states.
        """
        last, cursor = self.regions["last_hidden"], self.cursor
        if self.rows == 1 or f"{DRAFT}.fc" in self.regions:
            h = self.layers(tokens, self._activation("h", self.config.hidden))
            self._launch(ops.LAST_ROW, x=h, y=last)
        else:
            self.layers(tokens, last, ends_in_one=True)
        self.tape.record(ops.ADVANCE, cursor=cursor)

    def layers(self, tokens: Operand, out: Operand, *, ends_in_one: bool = False) -> Operand:
        """Rows of tokens through all layers and the final norm, into `out`; and the draft head's
        rows for them, if there is one. `ends_in_one`: `out` gets the last row only.
        """
        c, regions = self.config, self.regions
        x = self._scratch("x", c.hidden)
        self._launch(
            ops.EMBED, tokens=tokens, table=regions[EMBED], journal=regions["journal"], x=x
        )
        h: Operand = self._activation(f"{layer_name(0)}.h", c.hidden, input_dtype(c, 0))
        self._launch(ops.RMSNORM, x=x, w=regions[f"{layer_name(0)}.input_norm"], y=h, eps=c.eps)
        for i, kind in enumerate(c.layers):
            at, index, is_last = layer_name(i), c.layers[:i].count(kind), i + 1 == len(c.layers)
            mix = self._linear_attention if kind is LayerKind.LINEAR else self._full_attention
            narrows = is_last and ends_in_one
            if narrows:
                x = self._last(x)
            r = mix(at, h, index, narrows=narrows)
            r = self._mlp(at, x, r)
            if not is_last:
                following = layer_name(i + 1)
                h = self._activation(f"{following}.h", c.hidden, input_dtype(c, i + 1))
                self._add_rmsnorm(x, r, f"{following}.input_norm", h)
            else:
                h = self._add_rmsnorm(x, r, FINAL_NORM, out)
        if f"{DRAFT}.fc" in regions:
            self._draft_qkv(tokens, hidden=h, last=regions["last_hidden"])
        return h

    def sample(self) -> None:
        """Logits of the last hidden state, and the next token from them."""
        logits = self._head(self.regions["last_hidden"], self.regions["logits"])
        self._sample(logits, self.regions["cursor"])

    def _head(self, hidden: Operand, logits: Operand, vocab_size: int | None = None) -> Operand:
        """Logits of the first `vocab_size` tokens, of all by default."""
        head = self.regions[EMBED if self.config.is_tied else HEAD]
        rows = head.span(0, vocab_size or self.config.vocab_size)
        self._launch(ops.LINEAR, x=hidden, w=rows, y=logits)
        return logits

    def _sample(self, logits: Operand, cursor: Operand) -> None:
        """A token from one row of logits, into a cursor and for its position."""
        regions = self.regions
        name = f"sample.{len(self.tape.launches)}"
        work = self.tape.scratch(name, 2, as_view(logits).shape[1])
        self.tape.record(
            ops.SAMPLE, logits=logits, sampler=regions["sampler"], bias=regions["bias"],
            journal=regions["journal"], work=work, cursor=cursor,
        )  # fmt: skip

    def _linear_attention(
        self, at: str, h: Operand, index: int, *, narrows: bool = False
    ) -> Region:
        """Gated DeltaNet; `index` counts the layers with a recurrent state. `narrows`: once that
        is updated, go on with the last row alone.
        """
        c, weights = self.config, self.regions
        inner = c.value_heads * c.value_dim
        u, y, decay, beta = self._delta_inputs(at, index)
        self._launch(ops.LINEAR, x=h, w=weights[f"{at}.in_proj"], y=u)
        z: Operand
        qkv, z, b, a = columns(u, c.conv_channels, inner, c.value_heads, c.value_heads)
        window, state = self.regions["window"].at(index), self.regions["state"].at(index)
        self._launch(self.conv_op, u=qkv, w=weights[f"{at}.conv"], window=window, y=y)
        self._launch(
            ops.DELTA_GATES, y=y, a=a, b=b, a_log=weights[f"{at}.a_log"],
            dt_bias=weights[f"{at}.dt_bias"], decay=decay, beta=beta, key_heads=c.key_heads,
            key_dim=c.key_dim,
        )  # fmt: skip
        o = self._scratch(f"{at}.o", inner)
        self._launch(
            self.delta_op, y=y, decay=decay, beta=beta, state=state, o=o, key_heads=c.key_heads
        )
        if narrows:
            o, z = self._last(o), self._last(z, f"{at}.z")
            self._narrow()
        mixed = self._activation(f"{at}.mixed", inner, DType.ACT_WIDE)
        norm = weights[f"{at}.gated_norm"]
        self._launch(ops.GATED_RMSNORM, o=o, z=z, w=norm, y=mixed, eps=c.eps)
        return self._linear(f"{at}.r", mixed, f"{at}.out_proj")

    def _delta_inputs(self, at: str, index: int) -> tuple[Operand, Operand, Operand, Operand]:
        """Where a linear layer puts its projection [qkv | z | b | a], and what the delta rule
        reads of it: qkv after the convolution, decay, beta.
        """
        c, total = self.config, self.regions[f"{at}.in_proj"].shape[0]
        return (
            self._scratch(f"{at}.u", total),
            self._scratch(f"{at}.qkv", c.conv_channels),
            self._scratch(f"{at}.decay", c.value_heads),
            self._scratch(f"{at}.beta", c.value_heads),
        )

    def _full_attention(self, at: str, h: Operand, index: int, *, narrows: bool = False) -> Region:
        """Gated attention; `index` counts the layers with keys and values. `narrows`: once those
        are there, go on with the last row alone.
        """
        n = self.config.kv_heads
        keys, values = (self.regions[name].span(index * n, n) for name in ("keys", "values"))
        u, q = self._qkv(at, h, keys, values)
        if narrows:
            u, q = self._last(u), self._last(q)
            self._narrow()
        return self._attend(at, u, q, keys, values)

    def _qkv(
        self, at: str, h: Operand, keys: Operand, values: Operand, shift: int = 0
    ) -> tuple[Region, Region]:
        """Projections u, columns [per head: query, gate | k | v], and turned queries; new rows of
        keys and values.
        """
        c, weights = self.config, self.regions
        u = self._linear(f"{at}.u", h, f"{at}.qkv")
        q = self._scratch(f"{at}.q", c.query_heads, c.head_dim)
        self._launch(
            ops.ROPE_APPEND, u=u, q_norm=weights[f"{at}.q_norm"], k_norm=weights[f"{at}.k_norm"],
            inv_freq=weights[INV_FREQ], q=q, keys=keys, values=values, eps=c.eps, shift=shift,
        )  # fmt: skip
        return u, q

    def _attend(
        self, at: str, u: Region, q: Region, keys: Operand, values: Operand, shift: int = 0
    ) -> Region:
        c = self.config
        spread = self.rows if self.rows <= _SPREAD_ROWS else 1
        partial = (spread, c.query_heads, self.n_blocks, c.head_dim + 2)
        partials = self.tape.scratch(f"{at}.partials", *partial)
        mixed = self._activation(f"{at}.mixed", c.query_heads * c.head_dim)
        self._launch(
            ops.ATTENTION, q=q, u=u, keys=keys, values=values, partials=partials, y=mixed,
            shift=shift,
        )  # fmt: skip
        return self._linear(f"{at}.r", mixed, f"{at}.o_proj")

    def _draft_qkv(
        self, tokens: Operand, hidden: Operand, last: Operand
    ) -> tuple[Region, Region, Region]:
        """The draft head's input, and from it queries and new rows of its keys and values.

        Row r holds what the model's authors call slot r - 1: the token at r and the hidden state
        at r - 1, turned by the angle of r - 1. Row 0 has no hidden state before it; it is written
        like any other (from zeros) but never attended to. So rows go with positions.
        """
        c, weights, at = self.config, self.regions, f"{DRAFT}.layer"
        y = self._activation(f"{DRAFT}.input", 2 * c.hidden)
        self._launch(
            ops.DRAFT_INPUT, tokens=tokens, table=weights[EMBED], hidden=hidden, last=last,
            w_token=weights[f"{DRAFT}.embedding_norm"], w_hidden=weights[f"{DRAFT}.hidden_norm"],
            y=y, eps=c.eps,
        )  # fmt: skip
        x = self._linear(f"{DRAFT}.x", y, f"{DRAFT}.fc")
        h = self._activation(f"{at}.h", c.hidden)
        self._launch(ops.RMSNORM, x=x, w=weights[f"{at}.input_norm"], y=h, eps=c.eps)
        u, q = self._qkv(at, h, weights["draft_keys"], weights["draft_values"], DRAFT_SHIFT)
        return x, u, q

    def _mlp(self, at: str, x: Region, r: Region) -> Region:
        """x += r, and the layer's MLP of that."""
        c = self.config
        h = self._activation(f"{at}.mlp.h", c.hidden, DType.ACT_WIDE)
        self._add_rmsnorm(x, r, f"{at}.mlp_norm", h)
        u = self._linear(f"{at}.mlp.u", h, f"{at}.gate_up")
        y = self._activation(f"{at}.mlp.y", c.intermediate, DType.ACT_WIDE)
        self._launch(ops.SILU_MUL, u=u, y=y)
        return self._linear(f"{at}.mlp.r", y, f"{at}.down")

    def _linear(self, name: str, x: Operand, weight: str) -> Region:
        """A new scratch region [rows, N] = x w^T."""
        w = self.regions[weight]
        y = self._scratch(name, w.shape[0])
        self._launch(ops.LINEAR, x=x, w=w, y=y)
        return y

    def _add_rmsnorm(self, x: Region, r: Region, norm: str, out: Operand) -> Operand:
        """x += r; `out` becomes its norm."""
        self._launch(ops.ADD_RMSNORM, x=x, r=r, w=self.regions[norm], y=out, eps=self.config.eps)
        return out

    def _last(self, x: Operand, name: str = "") -> Region:
        """A copy of x's last valid row."""
        shape = as_view(x).shape
        y = self.tape.scratch(f"{name or as_view(x).region.name}.last", 1, *shape[1:])
        if len(shape) > 2:
            x = as_view(x).reshape(shape[0], math.prod(shape[1:]))
        row = y.view().reshape(1, math.prod(shape[1:]))
        self._launch(ops.LAST_VALUES, x=x, y=row)
        return y

    def _narrow(self) -> None:
        """What is recorded from here on is about the last valid row alone, as a launch of one."""
        last = self.tape.scratch("last_cursor", ops.CURSOR_WORDS, dtype=DType.I32)
        self._launch(ops.LAST_CURSOR, last=last)
        self.cursor, self.rows = last, 1

    def _launch(self, op: Op, **bindings: Operand | AttrValue) -> None:
        self.tape.record(op, cursor=self.cursor, **bindings)

    def _scratch(self, name: str, *columns: int) -> Region:
        return self.tape.scratch(name, self.rows, *columns)

    def _activation(self, name: str, columns: int, dtype: DType = DType.ACT) -> Region:
        """Scratch in the backend's activation dtype, as `linear` reads it."""
        return self.tape.scratch(name, self.rows, columns, dtype=dtype)


def input_dtype(c: Qwen35Config, layer: int) -> DType:
    """Of a layer's normalised input; the MLP's and what the delta rule gives are wide throughout.

    A delta rule with few tokens behind it writes o = beta v (k . q), where k . q may cancel, and
    the norm that follows amplifies what is left: 0.2 % of error in the inputs of these layers has
    become 14 % of the logits. So what is rounded on its way there makes most of a model's error:
    the input itself, and what these layers and the MLPs add to the residual stream. Attention, in
    one layer of four, and the head take bfloat16; that moves logits by 0.2 to 0.5 % of their rms.
    """
    return DType.ACT_WIDE if c.layers[layer] is LayerKind.LINEAR else DType.ACT


def columns(u: Operand, *widths: int) -> tuple[View, ...]:
    """Windows over the columns of u, side by side."""
    stops = tuple(itertools.accumulate(widths))
    return tuple(
        as_view(u).cols(stop - width, stop) for width, stop in zip(widths, stops, strict=True)
    )
