"""ACT (Zhao et al. 2023, arXiv 2304.13705) as LeRobot has it: cameras and state to a chunk at once.

IS: the regions of a lane and the launches of each phase. IS NOT: config fields (config), weights
(weights), when to plan (robot/schedule) or kernels (ops/).

What is state: the cursor, the queue of actions, the one executed last, and the chunk in the making.
An observation is none: ticks between two chunks do not look at it, and the one that a chunk is made
from is brought by the host with the plan.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from flashrt.base.errors import PlanError
from flashrt.core.op import Op
from flashrt.core.region import DType, Operand, Region, Role, View, as_view
from flashrt.core.runs import MAX_RUNS
from flashrt.core.tape import Tape
from flashrt.models.act.config import WIDTHS, ActConfig
from flashrt.models.act.weights import (
    STEM,
    Convolution,
    Weights,
    blocks_of,
    features_of,
)
from flashrt.models.actions import (
    ACT_EACH,
    ACT_PHASE,
    OBSERVE,
    OBSERVE_EACH,
    PLAN,
    PLAN_BEGIN,
    PLAN_STEP,
    PLAN_STEP_EACH,
    SHARED,
    TICK,
    TICK_EACH,
    Input,
    Stacks,
)
from flashrt.models.chunks import ChunkRecorder
from flashrt.models.features import ENVIRONMENT, STATE, Camera
from flashrt.models.scaling import Scaling, shift_of
from flashrt.ops import table as ops
from flashrt.weights.lerobot import Mode

NORM_EPS = 1e-5  # of layer norms
POOL_TAPS = 3
_SHARED = (OBSERVE_EACH, ACT_EACH, TICK_EACH, PLAN_STEP_EACH)  # plans fill a device alone


class Act:
    """Regions, weight rules and tapes of one policy. The `rows` of a phase are 1."""

    name = "act"
    has_memory = False
    action_limit = float("inf")

    def __init__(self, config: ActConfig, scaling: Scaling) -> None:
        self.config = config
        self.parts = config.parts
        ensembles = () if config.ensemble is None else ("average", "counts")
        self.finite = ("previous", "action", "queue", "kept", "chunk", *ensembles)
        self.cut_off = ensembles
        self.modes: Mapping[str, Mode] = scaling.modes
        self.scaling = scaling
        self.stacks = _stacks(config)
        self.filled = Weights(config, scaling)
        self.weights = tuple(self.filled.rules)
        self.positive = tuple(f"stats.{part.name}.std" for part in self.parts)
        modes = {name: str(mode) for name, mode in self.modes.items()}
        self.identity: dict[str, object] = dataclasses.asdict(config) | {"modes": modes}
        self.inputs = tuple(_inputs(config))
        self.lane_regions = _lane_regions(config)
        self.phases = tuple((p, 1) for p in (OBSERVE, ACT_PHASE, TICK, PLAN, PLAN_BEGIN, PLAN_STEP))
        self._regions = {
            r.name: r for r in (*self.lane_regions, *(rule.region for rule in self.weights))
        }

    def shared_phases(self, lanes: int) -> tuple[tuple[str, int], ...]:
        """See Model. Chunks of several lanes are made one after the other."""
        return tuple((phase, 1) for phase in _SHARED) if lanes > 1 else ()

    def record(self, phase: str, rows: int) -> Tape:
        """The launches of a phase. Raises PlanError for a pair that is in neither list."""
        if (phase, rows) not in (*self.phases, *self.shared_phases(MAX_RUNS)):
            raise PlanError(f"{self.name} has no phase {phase!r} of {rows} rows")
        tape = Tape(phase, rows)
        if phase in SHARED:
            tape = Tape(phase, rows, MAX_RUNS, is_apart=True)
            phase = SHARED[phase]
        recorder = ActRecorder(self.config, self.modes, self._regions, tape)
        if phase in (OBSERVE, TICK):
            recorder.see()
        if phase in (ACT_PHASE, TICK):
            recorder.act()
        if phase in (PLAN, PLAN_BEGIN):
            recorder.begin()
        if phase in (PLAN, PLAN_STEP):
            recorder.end()
        return tape


def _stacks(c: ActConfig) -> Stacks:
    sizes = {
        "hidden_size": c.dim_model, "intermediate_size": c.dim_feedforward,
        "num_attention_heads": c.n_heads,
    }  # fmt: skip
    backbone: Stacks = {"backbone": {"type": c.backbone}} if c.cameras else {}
    return {
        **backbone,
        "encoder": {"num_hidden_layers": c.n_encoder_layers, **sizes},
        "decoder": {"num_hidden_layers": c.n_decoder_layers, **sizes},
    }


def camera_groups(c: ActConfig) -> list[list[Camera]]:
    """Cameras of one size that follow each other: they share launches."""
    by_size = itertools.groupby(c.cameras, key=lambda camera: (camera.height, camera.width))
    return [list(group) for _, group in by_size]


def _inputs(c: ActConfig) -> Iterator[Input]:
    parts = {part.name: part for part in c.parts}
    for name in (STATE, ENVIRONMENT):
        if name in parts:
            yield Input(name, parts[name].start, parts[name].stop)
    for i, group in enumerate(camera_groups(c)):
        yield Input(f"images.{i}", parts[group[0].name].start, parts[group[-1].name].stop)


def _lane_regions(c: ActConfig) -> tuple[Region, ...]:
    def fixed(name: str, *shape: int) -> Region:
        return Region(name, shape, DType.F32, Role.FIXED, is_digested=True)

    # The chunk in force, averaged with those before it, and of how many each row is.
    ensembled = (fixed("average", c.chunk_size, c.action_dim), fixed("counts", c.chunk_size))
    vectors = ((STATE, c.state_dim), (ENVIRONMENT, c.environment_dim))
    images = [
        Region(f"images.{i}", (len(group), group[0].height, group[0].width, 3), DType.F32, Role.IO)
        for i, group in enumerate(camera_groups(c))
    ]
    return (
        Region("cursor", (ops.CURSOR_WORDS,), DType.I32, Role.FIXED, is_digested=True),
        fixed("previous", c.action_dim),  # the action executed last, normalised
        fixed("action", c.action_dim),  # the same in the environment's units
        fixed("queue", c.chunk_size, c.action_dim),  # normalised
        fixed("kept", c.chunk_size * (c.action_dim + 1)),  # of the plan in the making: see ops
        fixed("chunk", c.chunk_size, c.action_dim),  # likewise
        *(ensembled if c.ensemble is not None else ()),
        *(Region(name, (1, size), DType.F32, Role.IO) for name, size in vectors if size),
        *images,
        Region("request", (ops.REQUEST_WORDS,), DType.I32, Role.IO),
    )


class ActRecorder(ChunkRecorder):
    """Records the launches of one tape. A method that makes rows returns where they are."""

    config: ActConfig

    def __init__(
        self,
        config: ActConfig,
        modes: Mapping[str, Mode],
        regions: dict[str, Region],
        tape: Tape,
    ) -> None:
        super().__init__(config, regions, tape)
        self.modes = modes

    def begin(self) -> None:
        """From the observation to a chunk."""
        self.keep_promised()
        self._decode(self._encoded(self._tokens()))

    def end(self) -> None:
        """The chunk, or what it is averaged to with those before it, is in force."""
        regions, made = self.regions, "chunk"
        if self.config.ensemble is not None:
            made = "average"
            self.launch(
                ops.ENSEMBLE, weights=regions["ensemble.weights"], sums=regions["ensemble.sums"],
                **{name: regions[name] for name in ("chunk", "average", "counts")},
            )  # fmt: skip
        self.put_in_force(regions[made])

    # -- tokens of the encoder ---------------------------------------------------------------------

    def _tokens(self) -> Region:
        """[T, D]: of the latent, which is 0 without a chunk to encode, so that a bias is left; of
        the state, the environment's state, and the pixels of each camera's features.
        """
        c = self.config
        tokens = self.tape.scratch("tokens", *self.regions["positions"].shape)
        latent = self.regions["encoder_latent_input_proj.bias"]
        zeros = self.regions["decoder_in"].span(0, 1)
        self.tape.record(ops.ADD_ROWS, x=zeros, r=latent, y=tokens.span(0, 1))
        at = 1
        for name, layer, size in (
            (STATE, "encoder_robot_state_input_proj", c.state_dim),
            (ENVIRONMENT, "encoder_env_state_input_proj", c.environment_dim),
        ):
            if size:
                x = self.tape.scratch(f"normalized.{name}", 1, size).view()
                self._normalize(name, self.regions[name].view(), x)
                self.tape.record(
                    ops.DENSE, x=x, w=self.regions[f"{layer}.weight"],
                    b=self.regions[f"{layer}.bias"], y=tokens.span(at, 1), activation=ops.IDENTITY,
                )  # fmt: skip
                at += 1
        for i, group in enumerate(camera_groups(c)):
            x = self._features(i, group)
            rows = x.shape[0] * x.shape[1] * x.shape[2]
            y = tokens.span(at, rows).reshape(*x.shape[:3], c.dim_model)
            self._pointwise("encoder_img_feat_input_proj", x, y)
            at += rows
        return tokens

    def _normalize(self, feature: str, x: View, y: View) -> None:
        self.tape.record(
            ops.NORMALIZE, x=x, mean=self.regions[f"stats.{feature}.mean"],
            std=self.regions[f"stats.{feature}.std"], y=y, shift=shift_of(self.modes[feature]),
        )  # fmt: skip

    def _features(self, index: int, group: list[Camera]) -> View:
        """What the backbone makes of the images of a group: [cameras, rows, columns, channels]."""
        images = self.regions[f"images.{index}"]
        n, height, width, _ = images.shape
        pixels = self.tape.scratch(f"normalized.{index}", *images.shape)
        for i, camera in enumerate(group):
            x, y = (r.span(i, 1).reshape(height * width, 3) for r in (images, pixels))
            self._normalize(camera.name, x, y)
        x = self._convolved(f"stem.{index}", STEM, pixels.view(), ops.RELU)
        height, width = (-(-size // 2) for size in x.shape[1:3])
        pooled = self.tape.scratch(f"pooled.{index}", n, height, width, WIDTHS[0])
        self.tape.record(
            ops.MAX_POOL, x=x, y=pooled, taps=POOL_TAPS, stride=2, padding=POOL_TAPS // 2
        )
        x = pooled.view()
        for i, block in enumerate(blocks_of(self.config)):
            name = f"block.{index}.{i}"
            inner = self._convolved(f"{name}.inner", block.first, x, ops.RELU)
            if block.shortcut is not None:
                x = self._convolved(f"{name}.outer", block.shortcut, x, ops.IDENTITY)
            self._convolution(ops.CONV2D_ADD, block.second, inner, x, ops.RELU)
        assert x.shape[1:3] == features_of(images.shape[1], images.shape[2])
        return x

    def _convolved(self, name: str, c: Convolution, x: View, activation: int) -> View:
        height, width = (
            -(-size // c.stride) for size in x.shape[1:3]
        )  # padded by half of the taps
        y = self.tape.scratch(name, x.shape[0], height, width, c.outputs).view()
        self._convolution(ops.CONV2D, c, x, y, activation)
        return y

    def _convolution(self, op: Op, c: Convolution, x: View, y: View, activation: int) -> None:
        self.tape.record(
            op, x=x, w=self.regions[f"{c.name}.weight"], b=self.regions[f"{c.name}.bias"], y=y,
            taps_y=c.taps, taps_x=c.taps, stride=c.stride, padding=c.taps // 2, dilation=1,
            activation=activation,
        )  # fmt: skip

    # -- the transformer ---------------------------------------------------------------------------

    def _encoded(self, x: Region) -> Region:
        """Layers of the encoder; what they leave, normed where the config says so."""
        c, positions = self.config, self.regions["positions"]
        for i in range(c.n_encoder_layers):
            layer = f"encoder.layers.{i}"
            y = self._normed(f"{layer}.norm1", x) if c.pre_norm else x
            placed = self._sum(f"{layer}.placed", y, positions)
            self._attend(f"{layer}.self_attn", placed, y, x)
            x = self._fed(layer, x, 1)
        return self._normed("encoder.norm", x) if c.pre_norm else x

    def _decode(self, encoded: Region) -> None:
        """Layers of the decoder over the queries of a chunk, which begin as zeros; its actions."""
        c, queries = self.config, self.regions["decoder_pos_embed.weight"]
        keys = self._sum("encoded.placed", encoded, self.regions["positions"])
        x = self.regions["decoder_in"]
        for i in range(c.n_decoder_layers):
            layer = f"decoder.layers.{i}"
            y = self._normed(f"{layer}.norm1", x) if c.pre_norm else x
            placed = self._sum(f"{layer}.placed", y, queries)
            x = self._attend(f"{layer}.self_attn", placed, y, x)
            if c.pre_norm:
                y = self._normed(f"{layer}.norm2", x)
            else:
                x = y = self._normed(f"{layer}.norm1", x)
            placed = self._sum(f"{layer}.placed again", y, queries)
            self._attend(f"{layer}.multihead_attn", placed, encoded, x, keys)
            x = self._fed(layer, x, 2)
        x = self._normed("decoder.norm", x)
        self._pointwise("action_head", _as_image(x), _as_image(self.regions["chunk"]))

    def _attend(
        self, name: str, placed: Region, values: Region, x: Region, keys: Region | None = None
    ) -> Region:
        """x += attention, of rows with their positions: to themselves, or to `keys`. Zeros, which
        are weights, are not added to: then it is rows of its own.
        """
        d = self.config.dim_model
        q: Operand
        k: Operand
        if keys is None:
            qk = self._projected(f"{name}.qk", placed, 2 * d)
            q, k = qk.view().cols(0, d), qk.view().cols(d, 2 * d)
        else:
            q, k = self._projected(f"{name}.q", placed, d), self._projected(f"{name}.k", keys, d)
        v = self._projected(f"{name}.v", values, d)
        seen = self.tape.scratch(f"{name}.seen", placed.shape[0], d)
        self.tape.record(ops.ATTEND, q=q, k=k, v=v, y=seen, heads=self.config.n_heads)
        is_zero = x.role is Role.WEIGHT
        y = self.tape.scratch(f"{name}.sum", *x.shape) if is_zero else x
        op = ops.CONV2D if is_zero else ops.CONV2D_ADD
        self._pointwise(f"{name}.out_proj", _as_image(seen), _as_image(y), op)
        return y

    def _fed(self, layer: str, x: Region, norm: int) -> Region:
        """x after the layer's MLP and the norms from number `norm` on: before it, or around it."""
        is_before = self.config.pre_norm
        y = self._normed(f"{layer}.norm{norm + is_before}", x)
        inner = self._projected(f"{layer}.linear1", y, self.config.dim_feedforward, ops.RELU)
        x = x if is_before else y
        self._pointwise(f"{layer}.linear2", _as_image(inner), _as_image(x), ops.CONV2D_ADD)
        return x if is_before else self._normed(f"{layer}.norm{norm + 1}", x)

    def _projected(self, layer: str, x: Region, columns: int, activation: int = 0) -> Region:
        y = self.tape.scratch(layer, x.shape[0], columns)
        self._pointwise(layer, _as_image(x), _as_image(y), activation=activation)
        return y

    def _pointwise(
        self, layer: str, x: View, y: View, op: Op = ops.CONV2D, activation: int = ops.IDENTITY
    ) -> None:
        """A dense layer over the pixels of an image."""
        self.tape.record(
            op, x=x, w=self.regions[f"{layer}.weight"], b=self.regions[f"{layer}.bias"], y=y,
            taps_y=1, taps_x=1, stride=1, padding=0, dilation=1, activation=activation,
        )  # fmt: skip

    def _normed(self, name: str, x: Region) -> Region:
        y = self.tape.scratch(name, *x.shape)
        self.tape.record(
            ops.LAYER_NORM, x=x, w=self.regions[f"{name}.weight"], b=self.regions[f"{name}.bias"],
            y=y, eps=NORM_EPS,
        )  # fmt: skip
        return y

    def _sum(self, name: str, x: Region, r: Region) -> Region:
        y = self.tape.scratch(name, *x.shape)
        self.tape.record(ops.ADD_ROWS, x=x, r=r, y=y)
        return y


def _as_image(rows: Region) -> View:
    """Rows [T, C] as an image of one column."""
    return as_view(rows).reshape(1, rows.shape[0], 1, rows.shape[1])
