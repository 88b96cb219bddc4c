"""Qwen3.5's vision tower: patches of one image -> an embedding per token.

IS: regions, weight rules and tapes; formulas as in transformers' modeling_qwen3_5. IS NOT: patches
and their places (patches), or where embeddings go (engine/images). A launch has room for a bucket
of patches; those of the image are counted by a cursor, so that its bits do not depend on the
bucket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from flashrt.base.errors import PlanError
from flashrt.core.op import AttrValue, Op
from flashrt.core.region import DType, Operand, Region, Role, as_view
from flashrt.core.tape import Tape
from flashrt.models.blocks import bias_name
from flashrt.models.qwen35.vision_config import VisionConfig
from flashrt.ops import table as ops
from flashrt.weights.rules import Source, WeightRule, constant, matrix, vector

SEE = "see"
BUCKETS = (64, 256, 1024, 4096)  # patches of a launch
EPS = 1e-6  # of every layer norm
_FREQUENCIES = "inv_freq"


class Tower:
    """One tower, for images of up to `most_patches` patches. See `models.model.Model`."""

    name = "qwen3_5_vision"
    identity: ClassVar[Mapping[str, object]] = {}  # all of it is in tapes, regions and constants

    def __init__(self, config: VisionConfig, most_patches: int = BUCKETS[-1]) -> None:
        self.config = config
        sizes = [n for n in BUCKETS if n <= most_patches] or BUCKETS[:1]
        self.buckets = tuple(_whole(n, config.merge**2) for n in sizes)
        self.weights = tuple(_rules(config))
        self.lane_regions = _lane_regions(config, self.buckets[-1])
        self.phases: tuple[tuple[str, int], ...] = tuple((SEE, n) for n in self.buckets)
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """See Model: an image fills a device alone."""
        del lanes
        return ()

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of a phase. Raises PlanError for a pair that is not in `phases`."""
        if (phase, rows) not in self.phases:
            raise PlanError(f"{self.name} has no phase {phase!r} of {rows} rows")
        tape = Tape(phase, rows)
        _Recorder(self.config, self._regions, tape).see()
        return tape


def _whole(patches: int, of_token: int) -> int:
    """As many patches as whole tokens have."""
    return -(-patches // of_token) * of_token


def _lane_regions(c: VisionConfig, patches: int) -> tuple[Region, ...]:
    return (
        Region("cursor", (ops.CURSOR_WORDS,), DType.I32, Role.FIXED),
        Region("token_cursor", (ops.CURSOR_WORDS,), DType.I32, Role.IO),
        Region("values", (patches, c.columns), DType.F32, Role.IO),
        Region("places", (patches, 2), DType.I32, Role.IO),
        Region("rows", (patches, 4), DType.I32, Role.IO),
        Region("weights", (patches, 4), DType.F32, Role.IO),
        Region("embeddings", (patches // c.merge**2, c.out), DType.F32, Role.IO),
    )


def _rules(c: VisionConfig) -> list[WeightRule]:
    wide = c.hidden * c.merge**2
    table = Region("pos_embed", (c.side**2, c.hidden), DType.F32, Role.WEIGHT)
    rules = [
        constant(_FREQUENCIES, c.inv_freq),
        *_dense("patch_embed.proj", c.columns, c.hidden),
        WeightRule(table, (Source("pos_embed.weight", (c.side**2, c.hidden)),)),
    ]
    for i in range(c.depth):
        at = f"blocks.{i}"
        rules += [
            *_norm(f"{at}.norm1", c.hidden),
            *_dense(f"{at}.attn.qkv", c.hidden, 3 * c.hidden),
            *_dense(f"{at}.attn.proj", c.hidden, c.hidden),
            *_norm(f"{at}.norm2", c.hidden),
            *_dense(f"{at}.mlp.linear_fc1", c.hidden, c.intermediate),
            *_dense(f"{at}.mlp.linear_fc2", c.intermediate, c.hidden),
        ]
    return [
        *rules,
        *_norm("merger.norm", c.hidden),
        *_dense("merger.linear_fc1", wide, wide),
        *_dense("merger.linear_fc2", wide, c.out),
    ]


def _dense(name: str, columns: int, rows: int) -> list[WeightRule]:
    return [
        matrix(name, columns, (f"{name}.weight", rows)),
        vector(bias_name(name), f"{name}.bias", rows),
    ]


def _norm(name: str, size: int) -> list[WeightRule]:
    return [
        vector(name, f"{name}.weight", size),
        vector(bias_name(name), f"{name}.bias", size),
    ]


class _Recorder:
    """Records the launches of one tape."""

    def __init__(self, config: VisionConfig, regions: Mapping[str, Region], tape: Tape) -> None:
        self.config = config
        self.regions = regions
        self.tape = tape
        self.cursor = regions["cursor"]

    def see(self) -> None:
        """Patches -> embeddings."""
        c, regions, rows = self.config, self.regions, self.tape.rows
        patches = self._activation("patches", c.columns)
        self._launch(ops.ACTIVATIONS, x=regions["values"].span(0, rows), y=patches)
        x = self._product("patch_embed.proj", "x", patches)
        r = self.tape.scratch("positions", rows, c.hidden)
        self._launch(
            ops.MIX_ROWS, table=regions["pos_embed"], rows=regions["rows"].span(0, rows),
            weights=regions["weights"].span(0, rows), y=r,
        )  # fmt: skip
        for i in range(c.depth):
            r = self._attention(f"blocks.{i}", self._normed(f"blocks.{i}.norm1", x, r))
            r = self._mlp(f"blocks.{i}.mlp", self._normed(f"blocks.{i}.norm2", x, r), c.is_tanh)
        h = self._normed("merger.norm", x, r)
        tokens = rows // c.merge**2
        merged = h.view().reshape(tokens, c.hidden * c.merge**2)
        self.cursor = regions["token_cursor"]
        self._mlp("merger", merged, False, regions["embeddings"].span(0, tokens))

    def _attention(self, at: str, h: Region) -> Region:
        c, rows = self.config, self.tape.rows
        u = self._product(f"{at}.attn.qkv", f"{at}.qkv", h).view()
        q, k, v = (u.cols(i * c.hidden, (i + 1) * c.hidden) for i in range(3))
        places = self.regions["places"].span(0, rows)
        for x in (q, k):
            self._launch(ops.TURN_PATCHES, x=x, places=places, inv_freq=self.regions[_FREQUENCIES])
        y = self._activation(f"{at}.seen", c.hidden)
        self._launch(ops.ATTEND_PATCHES, q=q, k=k, v=v, y=y, heads=c.heads)
        return self._product(f"{at}.attn.proj", f"{at}.attended", y)

    def _mlp(self, at: str, h: Operand, is_tanh: bool, out: Operand | None = None) -> Region:
        u = self._product(f"{at}.linear_fc1", f"{at}.u", h)
        y = self.tape.scratch(f"{at}.y", *u.shape, dtype=DType.ACT)
        self._launch(ops.GELU, u=u, y=y, tanh=int(is_tanh))
        return self._product(f"{at}.linear_fc2", f"{at}.r", y, out)

    def _normed(self, norm: str, x: Region, r: Region) -> Region:
        """x += r, and the layer norm of that."""
        y = self._activation(f"{norm}.y", self.config.hidden)
        self._launch(
            ops.ADD_LAYER_NORM, x=x, r=r, w=self.regions[norm], b=self.regions[bias_name(norm)],
            y=y, eps=EPS,
        )  # fmt: skip
        return y

    def _product(self, weight: str, name: str, x: Operand, out: Operand | None = None) -> Region:
        """x w^T + b, in `out`, or in new scratch of that name."""
        w = self.regions[weight]
        y = self.tape.scratch(name, x.shape[0], w.shape[0]).view() if out is None else as_view(out)
        self._launch(ops.LINEAR, x=x, w=w, y=y)
        self._launch(ops.ADD_BIAS, x=y, b=self.regions[bias_name(weight)])
        return y.region

    def _activation(self, name: str, columns: int) -> Region:
        return self.tape.scratch(name, self.tape.rows, columns, dtype=DType.ACT)

    def _launch(self, op: Op, **bindings: Operand | AttrValue) -> None:
        self.tape.record(op, cursor=self.cursor, **bindings)
