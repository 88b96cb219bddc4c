"""A SigLIP vision tower before a policy: images of cameras -> an embedding per token.

IS: weight rules and launches; formulas as in transformers' modeling_siglip and modeling_smolvlm.
IS NOT: a policy, or where embeddings go. Cameras share the launches that see rows alone, and each
attends to itself: so how many there are decides no bit of one.

Rows stand by tokens: the group x group patches of a token follow each other, so that what merges
them (SmolVLM's pixel shuffle) is a reshape. With group = 1 they are in raster order.

transformers 4.57 finds the places of SmolVLM's patches by a rule that moves all but the first of a
row and a column back by one in float32, and none in bfloat16. LeRobot runs the tower in bfloat16
where a policy began from the VLM's weights, as released ones did; else in float32, which `lags`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flashrt.core.op import AttrValue, Op
from flashrt.core.region import DType, Operand, Region, Role, View
from flashrt.core.tape import Tape
from flashrt.models.blocks import bias_name, columns, parts_of
from flashrt.ops import table as ops
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.rules import Source, Squares, WeightRule, matrix, vector

EPS = 1e-6  # of every layer norm
_PATCHES, _POSITIONS, _NORM, _PROJECTION = (
    f"vision.{name}" for name in ("patches", "positions", "norm", "projection")
)


@dataclass(frozen=True, slots=True)
class SiglipConfig:
    """Sizes of a tower and of what follows it, and how a checkpoint names both."""

    side: int  # pixels of an image, which is square
    patch: int  # pixels of a patch, which is square
    hidden: int
    depth: int
    heads: int
    intermediate: int
    out: int  # columns of an embedding
    group: int  # a token is group x group patches
    tower: str  # `<tower>.embeddings.patch_embedding.weight`
    projection: str  # `<projection>.weight`, from group^2 hidden columns
    is_biased: bool  # whether the projection has a bias
    lags: bool = False  # see the module: places as they are found in float32

    @property
    def columns(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch**2

    @property
    def patches(self) -> int:
        """Rows of a camera."""
        return (self.side // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Embeddings of a camera."""
        return self.patches // self.group**2

    @property
    def sizes(self) -> dict[str, int | str]:
        """As a stack of layers."""
        return {
            "num_hidden_layers": self.depth, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_attention_heads": self.heads,
            "image_size": self.side, "patch_size": self.patch, "rows_per_image": self.tokens,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fit:
    """Where an image lies in the square that a tower sees, in pixels, and what is around it."""

    height: int
    width: int
    top: int
    left: int
    fill: float  # in the units of the image: 0 .. 1 are dark to bright


def fitted_low(height: int, width: int, side: int) -> Fit:
    """As SmolVLA does it: at the right lower corner, with black around."""
    ratio = max(width / side, height / side)
    h, w = int(height / ratio), int(width / ratio)
    return Fit(h, w, side - h, side - w, 0.0)


def fitted_middle(height: int, width: int, side: int) -> Fit:
    """As LeRobot's pi0.5 does it: in the middle, with -1 around, which is darker than black: it is
    meant for images of -1 .. 1, and comes before images are made such.
    """
    ratio = max(width / side, height / side)
    h, w = int(height / ratio), int(width / ratio)
    return Fit(h, w, (side - h) // 2, (side - w) // 2, -1.0)


def rules(c: SiglipConfig) -> list[WeightRule]:
    """Weight rules of the tower; the checkpoint must be `as_matrices`."""
    at = f"{c.tower}.embeddings"
    table = Region(_POSITIONS, (c.patches, c.hidden), DType.F32, Role.WEIGHT)
    order = Squares(c.side // c.patch, c.group, c.lags)
    stored = Source(f"{at}.position_embedding.weight", (c.patches, c.hidden), order)
    found = [
        *_dense(_PATCHES, c.columns, (f"{at}.patch_embedding", c.hidden)),
        WeightRule(table, (stored,)),
    ]
    for i in range(c.depth):
        at, to = f"{c.tower}.encoder.layers.{i}", f"vision.{i}"
        qkv = ((f"{at}.self_attn.{name}_proj", c.hidden) for name in "qkv")
        found += [
            *_norm(f"{to}.norm1", f"{at}.layer_norm1", c.hidden),
            *_dense(f"{to}.qkv", c.hidden, *qkv),
            *_dense(f"{to}.out", c.hidden, (f"{at}.self_attn.out_proj", c.hidden)),
            *_norm(f"{to}.norm2", f"{at}.layer_norm2", c.hidden),
            *_dense(f"{to}.fc1", c.hidden, (f"{at}.mlp.fc1", c.intermediate)),
            *_dense(f"{to}.fc2", c.intermediate, (f"{at}.mlp.fc2", c.hidden)),
        ]
    last = _dense(_PROJECTION, c.group**2 * c.hidden, (c.projection, c.out))
    norm = _norm(_NORM, f"{c.tower}.post_layernorm", c.hidden)
    return [*found, *norm, *(last if c.is_biased else last[:1])]


def as_matrices(source: Checkpoint, c: SiglipConfig) -> Checkpoint:
    """The checkpoint with the tower's convolution over a patch as the matrix that it is."""
    name = f"{c.tower}.embeddings.patch_embedding.weight"
    found = source.tensors.get(name)
    if found is None or len(found.shape) < 2:
        return source  # the loader says what is wrong
    flat = replace(found, shape=(found.shape[0], math.prod(found.shape[1:])))
    return replace(source, tensors={**source.tensors, name: flat})


def _dense(name: str, width: int, *sources: tuple[str, int]) -> list[WeightRule]:
    """A matrix and its bias, each from one or several tensors, stacked."""
    biases = tuple(Source(f"{source}.bias", (rows,)) for source, rows in sources)
    rows = sum(rows for _, rows in sources)
    return [
        matrix(name, width, *((f"{source}.weight", rows) for source, rows in sources)),
        WeightRule(Region(bias_name(name), (rows,), DType.F32, Role.WEIGHT), biases),
    ]


def _norm(name: str, source: str, size: int) -> list[WeightRule]:
    return [
        vector(name, f"{source}.weight", size),
        vector(bias_name(name), f"{source}.bias", size),
    ]


class SiglipRecorder:
    """Records a tower on a tape, once."""

    def __init__(self, config: SiglipConfig, regions: Mapping[str, Region], tape: Tape) -> None:
        self.config = config
        self.regions = regions  # by name: the weights at least
        self.tape = tape

    def see(self, images: Sequence[Operand], fits: Sequence[Fit], out: Operand) -> None:
        """Images [H, W, 3], float32 in 0 .. 1, -> `out` [cameras * tokens, columns], float32."""
        c, tape = self.config, self.tape
        n = len(images) * c.patches
        self.all, self.each = self._cursor("all", n), self._cursor("each", c.patches)
        patches = self._activation("patches", n, c.columns)
        for i, (image, fit) in enumerate(zip(images, fits, strict=True)):
            tape.record(
                ops.IMAGE_PATCHES, x=image, y=self._of_camera(i, patches), side=c.side,
                patch=c.patch, group=c.group, height=fit.height, width=fit.width, top=fit.top,
                left=fit.left, fill=fit.fill,
            )  # fmt: skip
        x = self._product("x", patches, _PATCHES)
        r: Region | None = None  # what is still to be added to x: the positions of each camera
        for i in range(c.depth):
            r = self._attention(f"vision.{i}", self._normed(f"vision.{i}.norm1", x, r))
            r = self._mlp(f"vision.{i}", self._normed(f"vision.{i}.norm2", x, r))
        y = self._normed(_NORM, x, r).view()
        wide = y.reshape(n // c.group**2, c.group**2 * c.hidden)
        self._product_into(out, wide, _PROJECTION, self._cursor("tokens", wide.shape[0]))

    def _attention(self, at: str, h: Region) -> Region:
        c = self.config
        u = self._product(f"{at}.u", h, f"{at}.qkv")
        y = self._activation(f"{at}.seen", h.shape[0], c.hidden)
        for i in range(h.shape[0] // c.patches):
            q, k, v = columns(self._of_camera(i, u), c.hidden, c.hidden, c.hidden)
            own = self._of_camera(i, y)
            self.tape.record(
                ops.ATTEND_PATCHES, q=q, k=k, v=v, cursor=self.each, y=own, heads=c.heads
            )
        return self._product(f"{at}.attended", y, f"{at}.out")

    def _mlp(self, at: str, h: Region) -> Region:
        u = self._product(f"{at}.mlp", h, f"{at}.fc1")
        y = self._activation(f"{at}.y", *u.shape)
        self._launch(ops.GELU, u=u, y=y, tanh=1)
        return self._product(f"{at}.r", y, f"{at}.fc2")

    def _normed(self, norm: str, x: Region, r: Region | None) -> Region:
        """x += r, or the positions; and the layer norm of that."""
        y = self._activation(f"{norm}.y", *x.shape)
        weights = {"w": self.regions[norm], "b": self.regions[bias_name(norm)]}
        if r is not None:
            self._launch(ops.ADD_LAYER_NORM, x=x, r=r, y=y, eps=EPS, **weights)
            return y
        for i in range(x.shape[0] // self.config.patches):
            own, normed = self._of_camera(i, x), self._of_camera(i, y)
            self.tape.record(
                ops.ADD_LAYER_NORM, x=own, r=self.regions[_POSITIONS], y=normed, eps=EPS,
                cursor=self.each, **weights,
            )  # fmt: skip
        return y

    def _product(self, name: str, x: Operand, weight: str) -> Region:
        """x w^T + b in new scratch."""
        rows = sum(w.shape[0] for w in parts_of(self.regions, weight))
        y = self.tape.scratch(f"vision.{name}", x.shape[0], rows)
        self._product_into(y, x, weight, self.all)
        return y

    def _product_into(self, y: Operand, x: Operand, weight: str, cursor: Region) -> None:
        parts = parts_of(self.regions, weight)
        for w, window in zip(parts, columns(y, *(w.shape[0] for w in parts)), strict=True):
            self.tape.record(ops.LINEAR, x=x, w=w, y=window, cursor=cursor)
        if bias := self.regions.get(bias_name(weight)):
            self.tape.record(ops.ADD_BIAS, x=y, b=bias, cursor=cursor)

    def _of_camera(self, i: int, rows: Region) -> View:
        return rows.span(i * self.config.patches, self.config.patches)

    def _activation(self, name: str, rows: int, width: int) -> Region:
        return self.tape.scratch(f"vision.{name}.act", rows, width, dtype=DType.ACT)

    def _cursor(self, name: str, rows: int) -> Region:
        made = self.tape.scratch(f"vision.{name}", ops.CURSOR_WORDS, dtype=DType.I32)
        self.tape.record(ops.ALL_ROWS, all=made, rows=rows)
        return made

    def _launch(self, op: Op, **bindings: Operand | AttrValue) -> None:
        self.tape.record(op, cursor=self.all, **bindings)
