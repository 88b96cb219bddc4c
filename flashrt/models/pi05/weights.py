"""Weights of a pi0.5 policy: which tensors, or which formula of them, fill each region.

IS: rules by LeRobot's names: layers of the language model are `vlm.<i>`, those of the expert
`expert.<i>`. IS NOT: launches (tapes), the tower (vla.siglip), or sizes (sizes).

The expert's norms are adaptive: scale, shift and gate are a dense layer of a condition, which is an
MLP of the time. A policy has as many times as Euler steps, so what each norm makes of them is a
constant: [steps, 3 * hidden], computed when a policy is loaded. The dense layers, a tenth of the
expert, are on no device.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from flashrt.core.region import DType, Region, Role
from flashrt.models.blocks import INV_FREQ, NO_NORM, bias_name
from flashrt.models.features import ACTION, STATE, STATE_KIND, VISUAL_KIND
from flashrt.models.pi05.config import Pi05Config
from flashrt.models.pi05.sizes import EXPERT, GEMMA, PROJECTOR, TABLE, TOWER, Sizes
from flashrt.models.rope import plain
from flashrt.models.scaling import Scaling, scaling_in
from flashrt.models.vla.flow import time_features, times_of
from flashrt.models.vla.reading import TOKENIZER
from flashrt.models.vla.siglip import SiglipConfig, as_matrices
from flashrt.models.vla.siglip import rules as tower_rules
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.computed import Formula, computed, computing
from flashrt.weights.quantising import quantising
from flashrt.weights.rules import Transform, WeightRule, as_stored, constant, dense, matrix, vector

EMBED, EXPERT_NORM = "embed", "expert.norm"
ACTION_IN, ACTION_OUT = "action_in", "action_out"
THETA = 10000.0
PREPARE = "pi05_prepare_state_tokenizer_processor_step"  # a step of LeRobot
_TIME_IN, _TIME_OUT = "model.time_mlp_in", "model.time_mlp_out"
# Of the last layer of the language model nothing but keys and values is used.
_AFTER_KEYS = ("self_attn.o_proj.", "post_attention_layernorm.", "mlp.")
Values = NDArray[np.float32]


def tower_of(c: Pi05Config, s: Sizes) -> SiglipConfig:
    """Its tower."""
    return SiglipConfig(
        side=c.side, patch=s.patch, hidden=s.vision_hidden, depth=s.vision_depth,
        heads=s.vision_heads, intermediate=s.vision_intermediate, out=s.hidden, group=1,
        tower=TOWER, projection=PROJECTOR, is_biased=True,
    )  # fmt: skip


def scaling_of(checkpoint: Checkpoint, c: Pi05Config) -> Scaling:
    """By the processor files of a checkpoint. Raises CheckpointError."""
    kinds = dict.fromkeys((camera.name for camera in c.cameras), VISUAL_KIND) | {STATE: STATE_KIND}
    return scaling_in(checkpoint.path, kinds, (PREPARE, TOKENIZER))


class Weights:
    """Rules of a policy, and formulas for what its checkpoint does not store as it is."""

    def __init__(
        self,
        c: Pi05Config,
        s: Sizes,
        scaling: Scaling,
        checkpoint: Checkpoint,
        weights: str | None = None,
    ) -> None:
        """`weights`: what matrices of layers are quantised to on the way, if they are. Raises
        PlanError for another word than those of `quantising`.
        """
        self.config, self.sizes, self.tower = c, s, tower_of(c, s)
        self.formulas: dict[str, Formula] = {}
        self.scaling = scaling
        self._rules: list[WeightRule] = []
        self._source = as_matrices(checkpoint, self.tower)
        rules = self._rules
        rules += tower_rules(self.tower)
        rules += [
            matrix(EMBED, s.hidden, (TABLE, s.vocab_size)),
            constant(INV_FREQ, tuple(plain(THETA, s.head_dim).tolist())),
            constant(NO_NORM, (1.0,) * s.head_dim),
        ]
        for i in range(s.depth):
            layer, own = f"{GEMMA}.layers.{i}", f"vlm.{i}"
            norm = f"{layer}.input_layernorm.weight"
            rules.append(vector(f"{own}.input_norm", norm, s.hidden, Transform.ONE_PLUS))
            rules += _keys(own, layer, s.hidden, s)
            if i + 1 < s.depth:
                norm = f"{layer}.post_attention_layernorm.weight"
                rules.append(vector(f"{own}.mlp_norm", norm, s.hidden, Transform.ONE_PLUS))
                rules += _rest(own, layer, s.hidden, s.intermediate, s)
        for i in range(s.depth):
            layer, own = f"{EXPERT}.layers.{i}", f"expert.{i}"
            self._adaptive(f"{own}.input_norm", f"{layer}.input_layernorm")
            rules += _keys(own, layer, s.expert_hidden, s)
            self._adaptive(f"{own}.mlp_norm", f"{layer}.post_attention_layernorm")
            rules += _rest(own, layer, s.expert_hidden, s.expert_intermediate, s)
        self._adaptive(EXPERT_NORM, f"{EXPERT}.norm")
        actions = c.max_action_dim
        rules += [
            dense(ACTION_IN, "model.action_in_proj.weight", s.expert_hidden, actions),
            vector(bias_name(ACTION_IN), "model.action_in_proj.bias", s.expert_hidden),
            matrix(ACTION_OUT, s.expert_hidden, ("model.action_out_proj.weight", actions)),
            vector(bias_name(ACTION_OUT), "model.action_out_proj.bias", actions),
        ]
        more, formulas = scaling.rules(ACTION, (c.action_dim,))
        rules += more
        self.formulas |= formulas
        self.checkpoint = self._all()  # with all that the rules name
        if weights is not None:
            self.checkpoint = quantising(self.checkpoint, weights)
        self.rules = as_stored(rules, self.checkpoint.stored)

    def _all(self) -> Checkpoint:
        last = f"{GEMMA}.layers.{self.sizes.depth - 1}"
        unused = (f"{GEMMA}.norm.", *(f"{last}.{rest}" for rest in _AFTER_KEYS))
        used = {n: t for n, t in self._source.tensors.items() if not n.startswith(unused)}
        # statistics of the state are read by text
        used |= {n: t for n, t in self.scaling.tensors.items() if n.startswith("out/")}
        return computing(self._source, used, self.formulas)

    def _adaptive(self, name: str, source: str) -> None:
        """Scale, shift and gate of a norm at each step."""
        c, wide = self.config, self.sizes.expert_hidden
        region = Region(name, (c.num_inference_steps, 3 * wide), DType.F32, Role.WEIGHT)
        square, rows = (wide, wide), (wide,)
        sources = (
            (f"{_TIME_IN}.weight", square), (f"{_TIME_IN}.bias", rows),
            (f"{_TIME_OUT}.weight", square), (f"{_TIME_OUT}.bias", rows),
            (f"{source}.dense.weight", (3 * wide, wide)), (f"{source}.dense.bias", (3 * wide,)),
        )  # fmt: skip
        features = functools.partial(_features, c, wide)
        self.formulas[name] = Formula(
            region.shape, sources, functools.partial(_modulation, features)
        )
        self._rules.append(computed(region))


def _features(c: Pi05Config, dims: int) -> Values:
    times = times_of(c.num_inference_steps)
    return np.stack([time_features(t, dims, c.min_period, c.max_period) for t in times])


def _modulation(
    features: functools.partial[Values],
    w_in: Values,
    b_in: Values,
    w_out: Values,
    b_out: Values,
    w: Values,
    b: Values,
) -> NDArray[np.float64]:
    """[steps, 3 * hidden], in double."""
    condition: NDArray[np.float64] = features().astype(np.float64)
    for weight, bias in ((w_in, b_in), (w_out, b_out)):
        inner = condition @ weight.astype(np.float64).T + bias
        condition = inner / (1 + np.exp(-inner))
    return condition @ w.astype(np.float64).T + b


def _keys(own: str, layer: str, hidden: int, s: Sizes) -> list[WeightRule]:
    rows = {"q": s.heads * s.head_dim, "k": s.head_dim, "v": s.head_dim}
    stacked = ((f"{layer}.self_attn.{n}_proj.weight", count) for n, count in rows.items())
    return [matrix(f"{own}.qkv", hidden, *stacked)]


def _rest(own: str, layer: str, hidden: int, intermediate: int, s: Sizes) -> list[WeightRule]:
    gate_up = ((f"{layer}.mlp.{n}_proj.weight", intermediate) for n in ("gate", "up"))
    attended = s.heads * s.head_dim
    return [
        matrix(f"{own}.o_proj", attended, (f"{layer}.self_attn.o_proj.weight", hidden)),
        matrix(f"{own}.gate_up", hidden, *gate_up),
        matrix(f"{own}.down", intermediate, (f"{layer}.mlp.down_proj.weight", hidden)),
    ]
