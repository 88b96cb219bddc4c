"""Weights of an ACT policy: LeRobot's tensors, batch norms folded in, statistics as scales.

IS: which formula of which tensors fills each region. IS NOT: launches (model), or statistics
(scaling).

A batch norm of frozen statistics is y = x s + (b - m s), s = w / sqrt(v + 1e-5): so a convolution
before it has the weights w s and the bias b - m s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashrt.core.region import DType, Layout, Region, Role
from flashrt.models.act.config import BACKBONES, REDUCTION, WIDTHS, ActConfig
from flashrt.models.features import (
    ACTION,
    ENVIRONMENT,
    ENVIRONMENT_KIND,
    STATE,
    STATE_KIND,
    VISUAL_KIND,
)
from flashrt.models.scaling import Scaling, scaling_in
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.computed import Formula, computed, computing
from flashrt.weights.rules import Source, WeightRule, constant, dense, vector

Values = NDArray[np.float32]
Compute = Callable[..., NDArray[np.floating]]
Sources = tuple[tuple[str, tuple[int, ...]], ...]  # tensors by name, with their shapes
PREFIX = "model."
BATCH_NORM_EPS = 1e-5
STEM_TAPS = 7
# Tensors of a checkpoint that inference does not need: the encoder of actions, for training, and
# what multiplies a latent that is 0.
_UNUSED = ("model.vae_encoder", "model.encoder_latent_input_proj.weight")
_TEMPERATURE = 10000.0  # of the sinusoids of pixels


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution of the backbone, square and padded by half of its taps."""

    name: str  # of the tensor, without `.weight`; regions are called after it
    norm: str  # of the batch norm after it
    inputs: int
    outputs: int
    taps: int
    stride: int


@dataclass(frozen=True, slots=True)
class Block:
    """y = relu(second(relu(first(x))) + shortcut(x)); without a shortcut, x itself."""

    first: Convolution
    second: Convolution
    shortcut: Convolution | None


STEM = Convolution("backbone.conv1", "backbone.bn1", 3, WIDTHS[0], STEM_TAPS, 2)


def blocks_of(c: ActConfig) -> Iterator[Block]:
    """Those of the backbone, in order."""
    width = WIDTHS[0]
    for layer, (n_blocks, outputs) in enumerate(zip(BACKBONES[c.backbone], WIDTHS, strict=True), 1):
        for index in range(n_blocks):
            name, stride = f"backbone.layer{layer}.{index}", 2 if layer > 1 and not index else 1
            is_other = stride > 1 or width != outputs
            shortcut = f"{name}.downsample"
            yield Block(
                Convolution(f"{name}.conv1", f"{name}.bn1", width, outputs, 3, stride),
                Convolution(f"{name}.conv2", f"{name}.bn2", outputs, outputs, 3, 1),
                Convolution(f"{shortcut}.0", f"{shortcut}.1", width, outputs, 1, stride)
                if is_other
                else None,
            )
            width = outputs


def convolutions_of(c: ActConfig) -> Iterator[Convolution]:
    """All of the backbone."""
    yield STEM
    for block in blocks_of(c):
        yield from (block.first, block.second)
        if block.shortcut is not None:
            yield block.shortcut


def features_of(height: int, width: int) -> tuple[int, int]:
    """Height and width of what the backbone makes of an image."""
    return -(-height // REDUCTION), -(-width // REDUCTION)


def scaling_of(checkpoint: Checkpoint, c: ActConfig) -> Scaling:
    """By the processor files of a checkpoint. Raises CheckpointError."""
    kinds = dict.fromkeys((camera.name for camera in c.cameras), VISUAL_KIND)
    if c.state_dim:
        kinds[STATE] = STATE_KIND
    if c.environment_dim:
        kinds[ENVIRONMENT] = ENVIRONMENT_KIND
    return scaling_in(checkpoint.path, kinds)


class Weights:
    """Rules of a policy, and formulas for what its checkpoint does not store as it is."""

    def __init__(self, config: ActConfig, scaling: Scaling) -> None:
        self.config = config
        self.formulas: dict[str, Formula] = {}
        self.rules: list[WeightRule] = []
        self._scaling = scaling
        c = config
        if c.cameras:
            for convolution in convolutions_of(c):
                self._convolution(convolution)
            self._pointwise("encoder_img_feat_input_proj", c.dim_model, WIDTHS[-1])
        for projection, size in (
            ("encoder_robot_state_input_proj", c.state_dim),
            ("encoder_env_state_input_proj", c.environment_dim),
        ):
            if size:
                self._layer(projection, c.dim_model, size)
        self._rows("encoder_latent_input_proj.bias", (c.dim_model,), (1, c.dim_model))
        self._positions()
        for i in range(c.n_encoder_layers):
            self._attention(f"encoder.layers.{i}.self_attn", ("qk", "v"))
            self._rest(f"encoder.layers.{i}", 2)
        if c.pre_norm:
            self._norm("encoder.norm")
        self._rows("decoder_pos_embed.weight", (c.chunk_size, c.dim_model))
        self.rules.append(_zeros("decoder_in", c.chunk_size, c.dim_model))
        for i in range(c.n_decoder_layers):
            self._attention(f"decoder.layers.{i}.self_attn", ("qk", "v"))
            self._attention(f"decoder.layers.{i}.multihead_attn", ("q", "k", "v"))
            self._rest(f"decoder.layers.{i}", 3)
        self._norm("decoder.norm")
        self._layer("action_head", c.action_dim, c.dim_model)
        if c.ensemble is not None:
            weights = np.exp(np.float32(-c.ensemble) * np.arange(c.chunk_size, dtype=np.float32))
            for name, values in (("weights", weights), ("sums", np.cumsum(weights))):
                self.rules.append(constant(f"ensemble.{name}", tuple(values.tolist())))
        for part in c.parts:
            is_image = len(part.shape) == 3
            shape = (3, 1, 1) if is_image else part.shape
            self._statistics(part.name, shape)
        self._statistics(ACTION, (c.action_dim,))

    def read_from(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with all that the rules name."""
        used = {
            name: tensor
            for name, tensor in checkpoint.tensors.items()
            if not name.startswith(_UNUSED)
        }
        return computing(checkpoint, used | self._scaling.tensors, self.formulas)

    # -- parts of the model: a region is called as its tensor, without `model.` --------------------

    def _vector(self, name: str, size: int) -> None:
        self.rules.append(vector(name, PREFIX + name, size))

    def _rows(self, name: str, shape: tuple[int, ...], rows: tuple[int, ...] | None = None) -> None:
        """Rows that are added, not multiplied with."""
        region = Region(name, rows or shape, DType.F32, Role.WEIGHT)
        self.rules.append(WeightRule(region, (Source(PREFIX + name, shape),)))

    def _layer(self, name: str, rows: int, columns: int) -> None:
        self.rules.append(dense(f"{name}.weight", f"{PREFIX}{name}.weight", rows, columns))
        self._vector(f"{name}.bias", rows)

    def _norm(self, name: str) -> None:
        for what in ("weight", "bias"):
            self._vector(f"{name}.{what}", self.config.dim_model)

    def _rest(self, layer: str, norms: int) -> None:
        """Of a transformer layer, beside its attention."""
        c = self.config
        self._layer(f"{layer}.linear1", c.dim_feedforward, c.dim_model)
        self._layer(f"{layer}.linear2", c.dim_model, c.dim_feedforward)
        for i in range(norms):
            self._norm(f"{layer}.norm{i + 1}")

    def _attention(self, name: str, parts: tuple[str, ...]) -> None:
        """`parts`: which projections are one matrix; rows of the stacked one, in their order."""
        d = self.config.dim_model
        first = 0
        for part in parts:
            rows = slice(first, first + len(part) * d)
            first = rows.stop
            weight, bias = f"{PREFIX}{name}.in_proj_weight", f"{PREFIX}{name}.in_proj_bias"
            self._computed_matrix(
                f"{name}.{part}.weight", (len(part) * d, d), ((weight, (3 * d, d)),),
                lambda w, rows=rows: w[rows],
            )  # fmt: skip
            self._computed_vector(
                f"{name}.{part}.bias", len(part) * d, ((bias, (3 * d,)),),
                lambda b, rows=rows: b[rows],
            )  # fmt: skip
        self._layer(f"{name}.out_proj", d, d)

    def _pointwise(self, name: str, outputs: int, inputs: int) -> None:
        weight = f"{PREFIX}{name}.weight"
        self._computed_matrix(
            f"{name}.weight", (outputs, inputs), ((weight, (outputs, inputs, 1, 1)),),
            lambda w: w[:, :, 0, 0],
        )  # fmt: skip
        self._vector(f"{name}.bias", outputs)

    def _convolution(self, c: Convolution) -> None:
        shape = (c.outputs, c.inputs, c.taps, c.taps)
        norm = f"{PREFIX}{c.norm}"
        sizes = (c.outputs,)
        variance = (f"{norm}.running_var", sizes)
        self._computed_matrix(
            f"{c.name}.weight", (c.outputs, c.taps * c.taps * c.inputs),
            ((f"{PREFIX}{c.name}.weight", shape), (f"{norm}.weight", sizes), variance),
            lambda w, g, v: (w * _norm_scale(g, v)[:, None, None, None]).transpose(0, 2, 3, 1),
        )  # fmt: skip
        self._computed_vector(
            f"{c.name}.bias", c.outputs,
            ((f"{norm}.bias", sizes), (f"{norm}.running_mean", sizes), (f"{norm}.weight", sizes),
             variance),
            lambda b, m, g, v: b - m * _norm_scale(g, v),
        )  # fmt: skip

    def _positions(self) -> None:
        """Of the encoder's tokens: a learned row for each vector, sinusoids for pixels."""
        c = self.config
        pixels = [pixel_positions(*features_of(i.height, i.width), c.dim_model) for i in c.cameras]
        rows = c.n_vectors + sum(map(len, pixels))
        name, shape = "encoder_1d_feature_pos_embed.weight", (c.n_vectors, c.dim_model)
        self._computed(
            Region("positions", (rows, c.dim_model), DType.F32, Role.WEIGHT),
            Formula((rows, c.dim_model), ((PREFIX + name, shape),),
                    lambda learned: np.concatenate([learned, *pixels])),
        )  # fmt: skip

    # -- rules ------------------------------------------------------------------------------------

    def _statistics(self, feature: str, shape: tuple[int, ...]) -> None:
        rules, formulas = self._scaling.rules(feature, shape)
        self.rules += rules
        self.formulas |= formulas

    def _computed(self, region: Region, formula: Formula) -> None:
        self.formulas[region.name] = formula
        self.rules.append(computed(region))

    def _computed_matrix(
        self, name: str, shape: tuple[int, int], sources: Sources, compute: Compute
    ) -> None:
        region = Region(name, shape, DType.F32, Role.WEIGHT, Layout.MATRIX)
        self._computed(region, Formula(shape, sources, compute))

    def _computed_vector(self, name: str, size: int, sources: Sources, compute: Compute) -> None:
        region = Region(name, (size,), DType.F32, Role.WEIGHT)
        self._computed(region, Formula((size,), sources, compute))


def pixel_positions(height: int, width: int, dim: int) -> Values:
    """float32 [height * width, dim]: half of it by the row of a pixel, half by its column; sines at
    even places, cosines at odd ones, of angles that reach 2 pi at the last row or column.

    After DETR (arXiv 2005.12872, appendix A.4), in LeRobot's arithmetic.
    """
    places = 2 * (np.arange(dim // 2, dtype=np.float32) // 2) / np.float32(dim // 2)
    frequencies = np.float32(_TEMPERATURE) ** places

    def sinusoids(n: int) -> Values:
        steps = np.arange(1, n + 1, dtype=np.float32)
        angles = steps / (np.float32(n) + np.float32(1e-6)) * np.float32(2 * np.pi)
        angles = angles[:, None] / frequencies
        waves: Values = np.where(np.arange(dim // 2) % 2, np.cos(angles), np.sin(angles))
        return waves

    rows, columns = sinusoids(height), sinusoids(width)
    whole = np.empty((height, width, dim), np.float32)
    whole[..., : dim // 2] = rows[:, None]
    whole[..., dim // 2 :] = columns[None]
    return whole.reshape(-1, dim)


def _zeros(name: str, rows: int, columns: int) -> WeightRule:
    region = Region(name, (rows, columns), DType.F32, Role.WEIGHT)
    return WeightRule(region, constant=(0.0,) * region.size)


def _norm_scale(weight: Values, variance: Values) -> NDArray[np.float64]:
    return weight / np.sqrt(variance.astype(np.float64) + BATCH_NORM_EPS)
