"""Blocks that model families share: attention, delta rule, MLP, head, sampling.

IS: `BlockRecorder`, which records the launches of a block on a tape. A family's own file holds its
config, its weights, and how blocks are put together. IS NOT: a kernel (flashrt/ops has the
signatures), a model, or the owner of a region. It exists so that a second family does not repeat
the order of launches: results are exact because every model records a block the same way.

Weights are found by name: the block at `layers.3` reads `layers.3.qkv`, `layers.3.o_proj`, and so
on; each method lists its weights. Sizes are read from the shapes of regions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flashrt.base.errors import PlanError
from flashrt.core.op import AttrValue, Op
from flashrt.core.region import DType, Operand, Region, Role, View, as_view
from flashrt.core.runs import RUNS
from flashrt.core.tape import Tape
from flashrt.models.experts import NO_BIAS, Routing
from flashrt.models.lane import scales_name
from flashrt.models.model import DECODE, PREFILL, SAMPLE, STEP, TOGETHER
from flashrt.ops import table as ops
from flashrt.ops.cursor import CursorWord
from flashrt.weights.rules import part_name

# Up to this many rows, attention leaves partials so that key blocks can be spread over cores.
_SPREAD_ROWS = 9
# Ops that see rows and know no lane: where lanes share a launch, these take the rows of all.
_ROW_OPS = frozenset((
    ops.LINEAR, ops.RMSNORM, ops.ADD_RMSNORM, ops.GATED_RMSNORM, ops.DELTA_GATES, ops.SILU_MUL,
    ops.ADD_BIAS, ops.SILU_RMSNORM, ops.SCALE_ROWS, ops.ROUTE, ops.EXPERTS_IN, ops.EXPERTS_OUT,
    ops.ADD_GATED, ops.RELU_SQUARED,
))  # fmt: skip
_OF_NO_LANE = (Role.SCRATCH, Role.WEIGHT)
# Constants of a model: frequencies of rotary pairs; the one frequency 0, for layers that turn
# nothing; ones in place of head norms, for models without.
INV_FREQ, NO_ROPE, NO_NORM = "inv_freq", "no_rope", "no_norm"


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """What a delta rule reads, a row per token."""

    u: Operand  # the projection, columns [qkv | z | b | a]
    conv_input: Operand  # its first columns, where they last: u itself, but for lanes that share
    qkv: Operand  # after the convolution
    decay: Operand
    beta: Operand


class BlockRecorder:
    """Records blocks on one tape. Scratch is named by layer: the planner may give the bytes of one
    layer to the next.

    `rows` and `cursor` are those of the launches to come; `narrow` changes both. `magnitude` is
    that of rotated heads: see models.rope. On a tape that several lanes share, ops that see rows
    alone take those of all lanes, and what is about a lane moves from run to run; where each lane
    has one row, it is launched on one.
    """

    def __init__(
        self, regions: Mapping[str, Region], tape: Tape, eps: float, magnitude: float = 1.0
    ) -> None:
        self.regions = regions  # of the lane and of the weights, by name
        self.tape = tape
        self.eps = eps  # of every norm, where a block is not told another
        self.magnitude = magnitude
        self.routing: Routing | None = None  # of layers of experts, which a family sets
        self.rows = tape.rows
        self.cursor: Operand = regions["cursor"]
        # Three places of each row, and the pairs that turn by the second and the third; None where
        # a row's place is its position.
        self.places: Region | None = None
        self.sections = (0, 0)
        self._all_rows = RUNS.view().cols(0, ops.CURSOR_WORDS)  # the cursor of those of all lanes

    def attention(
        self,
        at: str,
        h: Operand,
        keys: View,
        values: View,
        query_heads: int,
        *,
        last_row_only: bool = False,
        is_turned: bool = True,
        seen: int = ops.Seen.PAST,
    ) -> Region:
        """Attention; weights qkv and o_proj, and where the model has them q_norm, k_norm, biases.

        `last_row_only`: all rows get keys and values, then only the last valid row goes on.
        `is_turned`: with rotary positions.
        """
        u, q = self.append_keys(at, h, keys, values, query_heads, is_turned=is_turned)
        if last_row_only:
            u, q = self.last_of(u) if u else None, self.last_of(q)
            self.narrow()
        return self.attend(at, u, q, keys, values, seen=seen)

    def append_keys(
        self,
        at: str,
        h: Operand,
        keys: View,
        values: View,
        query_heads: int,
        shift: int = 0,
        *,
        is_turned: bool = True,
    ) -> tuple[Region | None, Region]:
        """Projections u, columns [per head: query, gate | k | v], None where [q | k | v] has no
        gate; and rotated queries. New rows of keys and values. Angles are those of `shift`
        positions before each row.

        Which weights there are says what is done: q_norm and k_norm norm the heads; without them
        `NO_NORM` stands in, and is not read. Heads that are not turned have the one angle 0.
        """
        weights, (kv_heads, _, head_dim) = self.regions, keys.shape
        u = self.biased(f"{at}.u", h, f"{at}.qkv")
        gates = u.shape[1] - (query_heads + 2 * kv_heads) * head_dim
        if gates not in (0, query_heads * head_dim):
            raise PlanError(f"{at}: {u.shape[1]} columns of qkv fit neither q, k, v nor a gate")
        is_normed = f"{at}.q_norm" in weights
        norms = {n: weights[f"{at}.{n}" if is_normed else NO_NORM] for n in ("q_norm", "k_norm")}
        q = self.scratch(f"{at}.q", query_heads, head_dim)
        placed: dict[str, Operand | AttrValue] = {}
        if self.places is not None:
            by_rows, by_columns = self.sections
            placed = {"places": self.places, "by_rows": by_rows, "by_columns": by_columns}
        self.launch(
            ops.ROPE_PLACED if placed else ops.ROPE_APPEND, u=u,
            inv_freq=weights[INV_FREQ if is_turned else NO_ROPE], q=q, keys=keys, values=values,
            eps=self.eps, shift=shift, gated=int(gates > 0), normed=int(is_normed),
            magnitude=self.magnitude if is_turned else 1.0, **norms, **self._scales(keys, values),
            **placed,
        )  # fmt: skip
        return u if gates else None, q

    def attend(
        self,
        at: str,
        u: Region | None,
        q: Region,
        keys: View,
        values: View,
        shift: int = 0,
        seen: int = ops.Seen.PAST,
    ) -> Region:
        """The second half of attention: what `append_keys` left -> the block's output. Rows of keys
        below `shift` are not read; `seen`: which others are.
        """
        _, query_heads, head_dim = q.shape
        spread = self.rows if self.tape.run_rows <= _SPREAD_ROWS or self.rows == 1 else 1
        n_blocks = -(-keys.shape[1] // ops.ATTENTION_BLOCK)
        partials = self.tape.scratch(f"{at}.partials", spread, query_heads, n_blocks, head_dim + 2)
        mixed = self.activation(f"{at}.mixed", query_heads * head_dim)
        self.launch(
            ops.ATTENTION, q=q, u=u or q.view().reshape(self.rows, query_heads * head_dim),
            keys=keys, values=values, partials=partials, y=mixed, shift=shift, gated=int(bool(u)),
            seen=seen, **self._scales(keys, values),
        )  # fmt: skip
        return self.biased(f"{at}.r", mixed, f"{at}.o_proj")

    def biased(self, name: str, x: Operand, weight: str) -> Region:
        """`linear`, and the weight's bias where the model has one."""
        y = self.linear(name, x, weight)
        if bias := self.regions.get(bias_name(weight)):
            self.launch(ops.ADD_BIAS, x=y, b=bias)
        return y

    def delta_rule(
        self,
        at: str,
        h: Operand,
        state: View,
        window: View,
        key_heads: int,
        *,
        kept: DeltaInputs | None = None,
        last_row_only: bool = False,
    ) -> Region:
        """Gated DeltaNet; weights in_proj, conv, a_log, dt_bias, gated_norm, out_proj.

        `kept`: leave state and window as they are, and write here what `update_state` needs to
        change them later. `last_row_only`: all rows change the state, then only the last valid row
        goes on.
        """
        value_heads, key_dim, value_dim = state.shape
        weights, inner = self.regions, value_heads * value_dim
        channels = window.shape[-1]
        inputs = kept or self._delta_inputs(at, channels, value_heads)
        conv, rule = (
            (ops.CONV_VERIFY, ops.DELTA_VERIFY) if kept else (ops.CONV_WINDOW, ops.DELTA_RULE)
        )
        y, decay, beta = inputs.qkv, inputs.decay, inputs.beta
        self.product(h, f"{at}.in_proj", inputs.u)
        z: Operand
        qkv, z, b, a = columns(inputs.u, channels, inner, value_heads, value_heads)
        if kept and self.is_shared:
            self.launch(ops.KEEP_VALUES, x=qkv, y=columns(kept.conv_input, channels)[0])
        self.launch(conv, u=qkv, w=weights[f"{at}.conv"], window=window, y=y)
        self.launch(
            ops.DELTA_GATES, y=y, a=a, b=b, a_log=weights[f"{at}.a_log"],
            dt_bias=weights[f"{at}.dt_bias"], decay=decay, beta=beta, key_heads=key_heads,
            key_dim=key_dim,
        )  # fmt: skip
        o = self.scratch(f"{at}.o", inner)
        self.launch(rule, y=y, decay=decay, beta=beta, state=state, o=o, key_heads=key_heads)
        if last_row_only:
            o, z = self.last_of(o), self.last_of(z, f"{at}.z")
            self.narrow()
        mixed = self.activation(f"{at}.mixed", inner, DType.ACT_WIDE)
        norm = weights[f"{at}.gated_norm"]
        self.launch(ops.GATED_RMSNORM, o=o, z=z, w=norm, y=mixed, eps=self.eps)
        return self.linear(f"{at}.r", mixed, f"{at}.out_proj")

    def gated_conv(
        self, at: str, h: Operand, window: View, *, last_row_only: bool = False
    ) -> Region:
        """A short convolution between two gates; weights in_proj, conv and out_proj, and where the
        model has them the biases of all three.

        `last_row_only`: all rows change the window, then only the last valid row goes on.
        """
        u, channels = self.biased(f"{at}.u", h, f"{at}.in_proj"), window.shape[-1]
        taps, bias = self.regions[f"{at}.conv"], self.regions.get(bias_name(f"{at}.conv"))
        mixed = self.activation(f"{at}.mixed", channels)
        self.launch(
            ops.GATED_CONV, u=u, w=taps, bias=taps.at(0) if bias is None else bias, window=window,
            y=mixed, biased=int(bias is not None),
        )  # fmt: skip
        if last_row_only:
            last = self.tape.scratch(f"{at}.mixed.last", 1, channels, dtype=DType.ACT)
            self.launch(ops.LAST_ROW, x=mixed, y=last)
            self.narrow()
            mixed = last
        return self.biased(f"{at}.r", mixed, f"{at}.out_proj")

    def update_state(
        self, at: str, kept: DeltaInputs, state: View, window: View, key_heads: int
    ) -> None:
        """The valid rows of what `delta_rule` kept change window and state, by the ops that would
        have done it at once: so the bits are the same.
        """
        value_heads, _, value_dim = state.shape
        channels = window.shape[-1]
        self.launch(
            ops.CONV_WINDOW, u=columns(kept.conv_input, channels)[0], w=self.regions[f"{at}.conv"],
            window=window, y=self.scratch(f"{at}.qkv", channels),
        )  # fmt: skip
        self.launch(
            ops.DELTA_RULE, y=kept.qkv, decay=kept.decay, beta=kept.beta, state=state,
            o=self.scratch(f"{at}.o", value_heads * value_dim), key_heads=key_heads,
        )  # fmt: skip

    def ssm(
        self,
        at: str,
        h: Operand,
        state: View,
        window: View,
        groups: int,
        time_limits: tuple[float, float],
        eps: float,
        *,
        last_row_only: bool = False,
    ) -> Region:
        """Mamba-2; weights in_proj, rows [z | x | B | C | dt], conv, a_log, dt_bias, d, ssm_norm,
        out_proj, and biases where the model has them. `groups`: of B and C, and of the norm, whose
        eps is `eps`.

        With few tokens behind a row its output may nearly cancel, and the norm amplifies what is
        left, rounding of the input too: so h should be wide, and what goes into out_proj is.
        `last_row_only`: all rows change the state, then only the last valid row goes on.
        """
        heads, _, head_dim = state.shape
        weights, inner, channels = self.regions, heads * head_dim, window.shape[-1]
        z: Operand
        z, u, dt = columns(self.biased(f"{at}.u", h, f"{at}.in_proj"), inner, channels, heads)
        y = self.scratch(f"{at}.xbc", channels)
        conv: dict[str, Operand] = {"u": u, "w": weights[f"{at}.conv"], "window": window, "y": y}
        if bias := weights.get(bias_name(f"{at}.conv")):
            self.launch(ops.CONV_BIASED, b=bias, **conv)
        else:
            self.launch(ops.CONV_WINDOW, **conv)
        o = self.scratch(f"{at}.o", inner)
        self.launch(
            ops.SSM, y=y, dt=dt, a_log=weights[f"{at}.a_log"], dt_bias=weights[f"{at}.dt_bias"],
            d=weights[f"{at}.d"], state=state, o=o, groups=groups, dt_min=time_limits[0],
            dt_max=time_limits[1],
        )  # fmt: skip
        if last_row_only:
            o, z = self.last_of(o), self.last_of(z, f"{at}.z")
            self.narrow()
        mixed = self.activation(f"{at}.mixed", inner, DType.ACT_WIDE)
        norm = weights[f"{at}.ssm_norm"]
        self.launch(ops.SILU_RMSNORM, o=o, z=z, w=norm, y=mixed, groups=groups, eps=eps)
        return self.biased(f"{at}.r", mixed, f"{at}.out_proj")

    def mlp(self, at: str, x: Region, r: Region) -> Region:
        """x += r, and the MLP of that, or the experts where the layer has them; weights mlp_norm,
        and those of either.
        """
        h = self.activation(f"{at}.mlp.h", x.shape[1], DType.ACT_WIDE)
        self.add_rmsnorm(x, r, f"{at}.mlp_norm", h)
        return self.experts(at, h) if f"{at}.experts_in" in self.regions else self.swiglu(at, h)

    def swiglu(self, at: str, h: Operand) -> Region:
        """An MLP; weights gate_up, down."""
        intermediate = self.matrix_shape(f"{at}.down")[1]
        u = self.linear(f"{at}.mlp.u", h, f"{at}.gate_up")
        y = self.activation(f"{at}.mlp.y", intermediate, DType.ACT_WIDE)
        self.launch(ops.SILU_MUL, u=u, y=y)
        return self.linear(f"{at}.mlp.r", y, f"{at}.down")

    def experts(self, at: str, h: Region) -> Region:
        """A mixture of experts; weights router, experts_in, experts_out, and expert_bias where
        picks are biased. A shared expert, where there is one, has the weights of an MLP, and a gate
        where the router has a row more than there are experts.
        """
        weights, routing, (rows, hidden) = self.regions, self.routing, h.shape
        w_in, w_out = weights[f"{at}.experts_in"], weights[f"{at}.experts_out"]
        if routing is None:
            raise PlanError(f"{at}: a layer of experts in a model that does not say how it routes")
        n, intermediate, picked = w_out.shape[0] // hidden, w_out.shape[1], routing.picked
        u = self.linear(f"{at}.moe.u", h, f"{at}.router")
        picks = self.tape.scratch(f"{at}.moe.picks", rows, picked, dtype=DType.I32)
        gates = self.scratch(f"{at}.moe.gates", picked)
        grouped = {
            "groups": self.tape.scratch(f"{at}.moe.groups", n, 2, dtype=DType.I32),
            "members": self.tape.scratch(f"{at}.moe.members", rows, picked, 2, dtype=DType.I32),
        }
        self.launch(
            ops.ROUTE, logits=columns(u, n)[0], picks=picks, gates=gates,
            bias=weights[f"{at}.expert_bias" if routing.is_biased else NO_BIAS],
            scoring=routing.scoring, biased=int(routing.is_biased), normed=int(routing.is_normed),
            eps=routing.eps, scale=routing.scale,
        )  # fmt: skip
        inner = self.tape.scratch(f"{at}.moe.h", rows, picked, intermediate, dtype=DType.ACT_WIDE)
        self.launch(ops.EXPERTS_IN, x=h, w=w_in, picks=picks, h=inner, **grouped)
        y = self.scratch(f"{at}.moe.r", hidden)
        products = self.scratch(f"{at}.moe.products", picked, hidden)
        self.launch(
            ops.EXPERTS_OUT, h=inner, w=w_out, picks=picks, gates=gates, products=products, y=y,
            **grouped,
        )  # fmt: skip
        if self.parts(f"{at}.down"):
            gated = u.shape[1] > n
            gate = columns(u, n, 1)[1] if gated else columns(gates, 1)[0]
            shared = self.swiglu(at, h)
            self.launch(ops.ADD_GATED, y=y, x=shared, gate=gate, gated=int(gated))
        return y

    def squared_mlp(self, at: str, h: Operand) -> Region:
        """An MLP without a gate, max(h up^T, 0)^2 down^T; weights up and down, and biases where
        the model has them.
        """
        u = self.biased(f"{at}.u", h, f"{at}.up")
        y = self.activation(f"{at}.y", u.shape[1], DType.ACT_WIDE)
        self.launch(ops.RELU_SQUARED, u=u, y=y)
        return self.biased(f"{at}.r", y, f"{at}.down")

    def head(
        self, hidden: Operand, weight: str, logits: Operand, n_tokens: int | None = None
    ) -> None:
        """Logits of the first `n_tokens` tokens, of all by default."""
        w = self.regions[weight]
        self.launch(ops.LINEAR, x=hidden, w=w.span(0, n_tokens or w.shape[0]), y=logits)

    def sample(self, logits: Operand, cursor: Operand) -> None:
        """A token from one row of logits, into a cursor and for its position; reads the lane's
        sampler, bias, mask and journal.
        """
        regions = self.regions
        name = f"sample.{len(self.tape.launches)}"
        work = self.tape.scratch(name, 2 * self.tape.max_runs, as_view(logits).shape[1])
        self.tape.record(
            ops.SAMPLE, logits=logits, sampler=regions["sampler"], bias=regions["bias"],
            mask=regions["mask"], journal=regions["journal"], work=work.span(0, 2).per_run(),
            cursor=cursor,
        )  # fmt: skip

    def sees_runs(self) -> None:
        """Launches to come that know no lane see a row per run."""
        self._all_rows = RUNS.view().cols(ops.CURSOR_WORDS, 2 * ops.CURSOR_WORDS)

    def linear(self, name: str, x: Operand, weight: str) -> Region:
        """A new scratch region [rows, N] = x w^T."""
        y = self.scratch(name, self.matrix_shape(weight)[0])
        self.product(x, weight, y)
        return y

    def product(self, x: Operand, weight: str, y: Operand) -> None:
        """y = x w^T, a launch for each part of w: see `weights.rules.as_stored`."""
        parts = self.parts(weight)
        if len(parts) == 1:
            self.launch(ops.LINEAR, x=x, w=parts[0], y=y)
            return
        for w, window in zip(parts, columns(y, *(w.shape[0] for w in parts)), strict=True):
            self.launch(ops.LINEAR, x=x, w=w, y=window)

    def parts(self, weight: str) -> tuple[Region, ...]:
        """A weight matrix; where its rows are stored in several formats, the part of each."""
        return parts_of(self.regions, weight)

    def matrix_shape(self, weight: str) -> tuple[int, int]:
        """(N, K) of all parts of a weight matrix."""
        parts = self.parts(weight)
        return sum(w.shape[0] for w in parts), parts[0].shape[1]

    def rmsnorm(self, x: Operand, norm: str, out: Operand) -> None:
        """`out` becomes the norm of x."""
        self.launch(ops.RMSNORM, x=x, w=self.regions[norm], y=out, eps=self.eps)

    def add_rmsnorm(self, x: Region, r: Region, norm: str, out: Operand) -> None:
        """x += r; `out` becomes its norm."""
        self.launch(ops.ADD_RMSNORM, x=x, r=r, w=self.regions[norm], y=out, eps=self.eps)

    def last_of(self, x: Operand, name: str = "") -> Region:
        """A copy of x's last valid row."""
        shape = as_view(x).shape
        y = self.tape.scratch(f"{name or as_view(x).region.name}.last", 1, *shape[1:])
        if len(shape) > 2:
            x = as_view(x).reshape(shape[0], math.prod(shape[1:]))
        row = y.view().reshape(1, math.prod(shape[1:]))
        self.launch(ops.LAST_VALUES, x=x, y=row)
        return y

    def narrow(self) -> None:
        """Later launches are about the last valid row alone, as in a launch of one row."""
        last = self.tape.scratch("last_cursor", ops.CURSOR_WORDS, dtype=DType.I32)
        self.launch(ops.LAST_CURSOR, last=last)
        self.cursor, self.rows = last, 1

    def launch(self, op: Op, **bindings: Operand | AttrValue) -> None:
        """One launch on the recorder's cursor; see the class for tapes that lanes share."""
        if not self.is_shared:
            self.tape.record(op, cursor=self.cursor, **bindings)
            return
        operands = {k: as_view(v) for k, v in bindings.items() if isinstance(v, Region | View)}
        is_of_lane = any(v.region.role not in _OF_NO_LANE for v in operands.values())
        if op in _ROW_OPS and not is_of_lane:
            self.tape.record(op, cursor=self._all_rows, **bindings)
        else:
            moving = {name: self._of_run(view) for name, view in operands.items()}
            self.tape.record(op, cursor=self.cursor, **(bindings | moving))

    @property
    def is_shared(self) -> bool:
        """Whether lanes share the tape."""
        return self.tape.max_runs > 1 and not self.tape.is_apart

    @property
    def is_row_each(self) -> bool:
        """Whether lanes share it with a row each."""
        return self.is_shared and self.tape.run_rows == 1

    def _of_run(self, view: View) -> View:
        """The run's rows of scratch that has those of all lanes."""
        run_rows = self.tape.run_rows
        is_whole = view.region.role is Role.SCRATCH and view.shape[0] == self.rows > run_rows
        if not is_whole or view.run_lead > 0:
            return view
        of_run = replace(view, shape=(run_rows, *view.shape[1:]))
        return of_run.per_run() if run_rows == 1 else of_run

    def scratch(self, name: str, *columns: int) -> Region:
        """Float32 scratch with a row per row of the launch."""
        return self.tape.scratch(name, self.rows, *columns)

    def activation(self, name: str, columns: int, dtype: DType = DType.ACT) -> Region:
        """Scratch in the backend's activation dtype, as `linear` reads it."""
        return self.tape.scratch(name, self.rows, columns, dtype=dtype)

    def _scales(self, keys: View, values: View) -> dict[str, View]:
        """Operands of attention: the scales of keys and values that are codes. Keys stand in for
        them elsewhere, and are not read as such.
        """
        found = {}
        for of, rows in (("key_scales", keys), ("value_scales", values)):
            region = self.regions.get(scales_name(rows.region.name))
            found[of] = region.span(rows.lead, rows.shape[0]) if region else keys
        return found

    def _delta_inputs(self, at: str, channels: int, value_heads: int) -> DeltaInputs:
        u = self.scratch(f"{at}.u", self.matrix_shape(f"{at}.in_proj")[0])
        return DeltaInputs(
            u,
            u,
            self.scratch(f"{at}.qkv", channels),
            self.scratch(f"{at}.decay", value_heads),
            self.scratch(f"{at}.beta", value_heads),
        )


class TokenRecorder(BlockRecorder):
    """Records the phases that every model of tokens has; a family says how rows go through it."""

    head_weight: str

    def forward(self, tokens: Operand) -> Operand:
        """Rows of tokens through all layers: leaves the last hidden state, moves the cursor.
        Returns the hidden states that were computed.
        """
        raise NotImplementedError

    def record(self) -> None:
        """The launches of the tape's phase."""
        regions, phase = self.regions, self.tape.phase
        tokens, one = regions["tokens"].view(), sampled_token(regions["cursor"])
        if phase == PREFILL:
            self.forward(tokens.cols(0, self.rows))
        elif phase == DECODE:
            self.forward(one)
            self._sample_next()
        elif phase == SAMPLE:
            self._sample_next()
        elif phase == TOGETHER:
            self._sample_each(self.forward(one))
        elif phase == STEP:
            self._sample_each(self.forward(tokens.cols(0, self.rows)))
        else:
            self._sample_each(regions["last_hidden"])

    def _sample_next(self) -> None:
        """Logits of the last hidden state, and the next token from them; a replay that is queued
        behind this one finds no row where that token is a stop.
        """
        logits = self.regions["logits"]
        self.head(self.regions["last_hidden"], self.head_weight, logits)
        self.sample(logits, self.regions["cursor"])
        self.tape.record(ops.HOLD, stops=self.regions["stops"], cursor=self.regions["cursor"])

    def _sample_each(self, hidden: Operand) -> None:
        """The same of lanes that share the tape, from the last row of `hidden` of each: logits are
        kept in its lane.
        """
        (_, vocab_size), n = self.regions["logits"].shape, self.tape.max_runs
        if not self.is_row_each or as_view(hidden).region.role is not Role.SCRATCH:
            last = self.tape.scratch("last", n, as_view(hidden).shape[1], dtype=DType.ACT)
            self.launch(ops.LAST_ROW, x=hidden, y=last.span(0, 1).per_run())
            hidden = last
        self.sees_runs()
        logits = self.tape.scratch("logits", n, vocab_size)
        self.head(hidden, self.head_weight, logits)
        own = logits.span(0, 1).per_run()
        self.launch(ops.LAST_VALUES, x=own, y=self.regions["logits"])
        self.sample(own, self.cursor)


def bias_name(weight: str) -> str:
    """The region of what is added to the product with a weight matrix."""
    return f"{weight}_bias"


def parts_of(regions: Mapping[str, Region], weight: str) -> tuple[Region, ...]:
    """The regions of a weight matrix, by ascending rows: one, or those of `part_name`."""
    if weight in regions:
        return (regions[weight],)
    parts: list[Region] = []
    while (part := regions.get(part_name(weight, len(parts)))) is not None:
        parts.append(part)
    return tuple(parts)


def sampled_token(cursor: Region) -> View:
    """The token that was sampled last into a cursor, as the tokens of a launch of one row."""
    return cursor.view().cols(CursorWord.TOKEN, CursorWord.TOKEN + 1)


def columns(u: Operand, *widths: int) -> tuple[View, ...]:
    """Windows over the columns of u, side by side."""
    stops = tuple(itertools.accumulate(widths))
    return tuple(
        as_view(u).cols(stop - width, stop) for width, stop in zip(widths, stops, strict=True)
    )
