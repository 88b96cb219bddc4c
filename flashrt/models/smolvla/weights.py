"""Weights of a SmolVLA policy: which tensors, or which formula of them, fill each region.

IS: rules by LeRobot's names. Layers of the VLM are `vlm.<i>`, those of the expert `expert.<i>`,
both by the number of the VLM's layer. IS NOT: launches (tapes), the tower (vla.siglip).

What an Euler step makes of x and its time t, action_time_mlp_in([A x + a | features(t)]) = W (A x +
a) + V features(t) + b, is one matrix W A and a vector per step, computed when a policy is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashrt.core.region import DType, Layout, Region, Role
from flashrt.models.blocks import INV_FREQ, NO_NORM, bias_name
from flashrt.models.features import ACTION, STATE, STATE_KIND, VISUAL_KIND
from flashrt.models.rope import plain
from flashrt.models.scaling import Scaling, scaling_in
from flashrt.models.smolvla.config import SmolVlaConfig
from flashrt.models.smolvla.vlm import CONNECTOR, PREFIX, TEXT, TOWER, Vlm
from flashrt.models.vla.flow import time_features, times_of
from flashrt.models.vla.reading import NEW_LINE, TOKENIZER
from flashrt.models.vla.siglip import SiglipConfig, as_matrices
from flashrt.models.vla.siglip import rules as tower_rules
from flashrt.weights.checkpoint import Checkpoint
from flashrt.weights.computed import Formula, computed, computing
from flashrt.weights.lerobot import Mode
from flashrt.weights.quantising import quantising
from flashrt.weights.rules import WeightRule, as_stored, constant, dense, matrix, vector

EMBED, EXPERT_NORM, STATE_IN = "embed", "expert.norm", "state_in"
ACTION_IN, TIMES, ACTION_MID, ACTION_OUT = "action_in", "times", "action_mid", "action_out"
EXPERT = f"{PREFIX}lm_expert"
THETA = 10000.0  # of the policy's rotary positions, whatever the VLM was trained with
_COMPILED = "_orig_mod."  # in names of policies that were saved compiled
Values = NDArray[np.float32]


def tower_of(c: SmolVlaConfig, v: Vlm) -> SiglipConfig:
    """Its tower."""
    return SiglipConfig(
        side=v.image_size, patch=v.patch, hidden=v.vision_hidden, depth=v.vision_layers,
        heads=v.vision_heads, intermediate=v.vision_intermediate, out=v.hidden, group=v.scale,
        tower=TOWER, projection=CONNECTOR, is_biased=False, lags=c.lags,
    )  # fmt: skip


def scaling_of(checkpoint: Checkpoint, c: SmolVlaConfig) -> Scaling:
    """By the processor files of a checkpoint. Raises CheckpointError."""
    kinds = dict.fromkeys((camera.name for camera in c.cameras), VISUAL_KIND) | {STATE: STATE_KIND}
    return scaling_in(checkpoint.path, kinds, (NEW_LINE, TOKENIZER))


def named(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with names as of a policy that was not compiled."""
    tensors = {name.replace(_COMPILED, ""): t for name, t in checkpoint.tensors.items()}
    checkpoint.tensors = tensors
    return checkpoint


class Weights:
    """Rules of a policy, and formulas for what its checkpoint does not store as it is."""

    def __init__(
        self,
        c: SmolVlaConfig,
        v: Vlm,
        scaling: Scaling,
        checkpoint: Checkpoint,
        weights: str | None = None,
    ) -> None:
        """`weights`: what matrices of layers are quantised to on the way, if they are. Raises
        PlanError for another word than those of `quantising`.
        """
        self.config, self.vlm, self.tower = c, v, tower_of(c, v)
        self.formulas: dict[str, Formula] = {}
        self.scaling = scaling
        self._rules: list[WeightRule] = []
        self._source = as_matrices(checkpoint, self.tower)
        rules = self._rules
        rules += tower_rules(self.tower)
        rules += [
            matrix(EMBED, v.hidden, (f"{TEXT}.embed_tokens.weight", v.vocab_size)),
            constant(INV_FREQ, tuple(plain(THETA, v.head_dim).tolist())),
            constant(NO_NORM, (1.0,) * v.head_dim),
        ]
        for i in range(c.num_vlm_layers):
            layer, own = f"{TEXT}.layers.{i}", f"vlm.{i}"
            rules += _attention_in(own, layer, v.hidden, v, ("q", "k", "v"))
            if i + 1 < c.num_vlm_layers:  # of the last one, keys and values are used alone
                rules += _rest(own, layer, v.hidden, v.intermediate, v)
        for i in filter(c.has_expert, range(c.num_vlm_layers)):
            layer, own = f"{EXPERT}.layers.{c.expert_layer(i)}", f"expert.{i}"
            if c.sees_itself(i):
                rules += _attention_in(own, layer, v.expert_hidden, v, ("q", "k", "v"))
            else:
                kv = v.kv_heads * v.head_dim
                rules += _attention_in(own, layer, v.expert_hidden, v, ("q",))
                for part in "kv":
                    source = (f"{layer}.self_attn.{part}_proj.weight", kv)
                    rules.append(matrix(f"{own}.{part}", kv, source))
            rules += _rest(own, layer, v.expert_hidden, v.expert_intermediate, v)
        rules.append(vector(EXPERT_NORM, f"{EXPERT}.norm.weight", v.expert_hidden))
        self._actions()
        self._statistics(STATE, (c.state_dim,))
        self._statistics(ACTION, (c.action_dim,))
        self.checkpoint = self._all()  # with all that the rules name
        if weights is not None:
            self.checkpoint = quantising(self.checkpoint, weights)
        self.rules = as_stored(rules, self.checkpoint.stored)

    @property
    def mode(self) -> Mode:
        """How the state is normalised."""
        return self.scaling.modes[STATE]

    def _all(self) -> Checkpoint:
        c = self.config
        unused = (
            f"{PREFIX}vlm.lm_head.",
            f"{TEXT}.norm.",
            *(f"{TEXT}.layers.{c.num_vlm_layers - 1}.{rest}" for rest in _AFTER_KEYS),
        )
        used = {
            name: tensor
            for name, tensor in self._source.tensors.items()
            if not name.startswith(unused) and not _is_beyond(name, c.num_vlm_layers)
        }
        return computing(self._source, used | self.scaling.tensors, self.formulas)

    def _actions(self) -> None:
        """The state's row, and what lies between actions and the expert's rows."""
        c, v = self.config, self.vlm
        wide, actions = v.expert_hidden, c.max_action_dim
        weight = ("model.state_proj.weight", (v.hidden, c.max_state_dim))
        # a state is padded with zeros
        self._matrix(STATE_IN, (v.hidden, c.state_dim), (weight,), lambda w: w[:, : c.state_dim])
        self._rules.append(vector(bias_name(STATE_IN), "model.state_proj.bias", v.hidden))
        inner = ("model.action_time_mlp_in.weight", (wide, 2 * wide))
        self._matrix(
            ACTION_IN, (wide, actions), (inner, ("model.action_in_proj.weight", (wide, actions))),
            lambda w, a: w[:, :wide].astype(np.float64) @ a,
        )  # fmt: skip
        biases = (
            ("model.action_time_mlp_in.bias", (wide,)),
            ("model.action_in_proj.bias", (wide,)),
        )
        region = Region(TIMES, (c.num_steps, wide), DType.F32, Role.WEIGHT)
        self._computed(region, Formula(region.shape, (inner, *biases), self._times))
        name = "model.action_time_mlp_out"
        self._rules += [
            dense(ACTION_MID, f"{name}.weight", wide, wide),
            vector(bias_name(ACTION_MID), f"{name}.bias", wide),
            matrix(ACTION_OUT, wide, ("model.action_out_proj.weight", actions)),
            vector(bias_name(ACTION_OUT), "model.action_out_proj.bias", actions),
        ]

    def _times(self, w: Values, b: Values, a: Values) -> NDArray[np.float64]:
        """What each Euler step adds before the first activation."""
        c, wide = self.config, self.vlm.expert_hidden
        wanted = w.astype(np.float64)
        features = np.stack(
            [
                time_features(time, wide, c.min_period, c.max_period)
                for time in times_of(c.num_steps)
            ]
        )
        return features @ wanted[:, wide:].T + wanted[:, :wide] @ a + b

    def _statistics(self, feature: str, shape: tuple[int, ...]) -> None:
        rules, formulas = self.scaling.rules(feature, shape)
        self._rules += rules
        self.formulas |= formulas

    def _matrix(
        self, name: str, shape: tuple[int, int], sources: tuple[tuple[str, tuple[int, ...]], ...],
        compute: Callable[..., NDArray[np.floating]],
    ) -> None:  # fmt: skip
        region = Region(name, shape, DType.F32, Role.WEIGHT, Layout.MATRIX)
        self._computed(region, Formula(shape, sources, compute))

    def _computed(self, region: Region, formula: Formula) -> None:
        self.formulas[region.name] = formula
        self._rules.append(computed(region))


_AFTER_KEYS = ("self_attn.o_proj.", "post_attention_layernorm.", "mlp.")


def _is_beyond(name: str, n_layers: int) -> bool:
    """Whether a tensor is of a layer of the VLM that the policy does not have."""
    layers = f"{TEXT}.layers."
    if not name.startswith(layers):
        return False
    number = name.removeprefix(layers).partition(".")[0]
    return number.isdigit() and int(number) >= n_layers


def _attention_in(
    own: str, layer: str, hidden: int, v: Vlm, parts: tuple[str, ...]
) -> list[WeightRule]:
    rows = {"q": v.query_heads * v.head_dim, "k": v.kv_heads * v.head_dim}
    stacked = ((f"{layer}.self_attn.{n}_proj.weight", rows.get(n, rows["k"])) for n in parts)
    return [
        vector(f"{own}.input_norm", f"{layer}.input_layernorm.weight", hidden),
        matrix(f"{own}.{'qkv' if len(parts) > 1 else 'q'}", hidden, *stacked),
    ]


def _rest(own: str, layer: str, hidden: int, intermediate: int, v: Vlm) -> list[WeightRule]:
    gate_up = ((f"{layer}.mlp.{n}_proj.weight", intermediate) for n in ("gate", "up"))
    attended = v.query_heads * v.head_dim
    return [
        matrix(f"{own}.o_proj", attended, (f"{layer}.self_attn.o_proj.weight", hidden)),
        vector(f"{own}.mlp_norm", f"{layer}.post_attention_layernorm.weight", hidden),
        matrix(f"{own}.gate_up", hidden, *gate_up),
        matrix(f"{own}.down", intermediate, (f"{layer}.mlp.down_proj.weight", hidden)),
    ]
