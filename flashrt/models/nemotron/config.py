"""The configuration of Nemotron-H models without experts, read from config.json.

IS: fields, their fall-backs (those of transformers' NemotronHConfig), other names that files have
for them, and every check, all problems in one error. IS NOT: shapes of tensors (weights).

Two fields are read as NVIDIA's own code for these models has them, where transformers 5.24 does
something else: `time_step_limit` (transformers takes the least step of prompts from time_step_min,
which is about initial weights, and leaves limits out of steps with a cache), and `attention_bias`
(transformers has none).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.messages import shown
from flashrt.models.fields import NEUTRAL, SILU, Fields, Neutral, is_tied
from flashrt.models.ssm import SsmSizes, time_limits

MODEL_TYPES = ("nemotron_h",)
# Other names of fields, and those that transformers gives them.
_OTHER_NAMES = {
    "mamba_n_groups": "n_groups", "mamba_num_groups": "n_groups",
    "mamba_state_dim": "ssm_state_size", "mamba_d_state": "ssm_state_size",
    "mamba_d_conv": "conv_kernel", "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias", "attention_head_dim": "head_dim",
}  # fmt: skip
_NEUTRAL: Neutral = {name: values for name, values in NEUTRAL.items() if name != "mlp_bias"} | {
    "mlp_hidden_act": ("relu2", None),
    "mamba_hidden_act": (*SILU, None),
    "sliding_window": (None,),
    "num_nextn_predict_layers": (0, None),
}


class LayerKind(enum.StrEnum):
    """What a layer is; the value is its letter in hybrid_override_pattern."""

    MAMBA = "M"
    ATTENTION = "*"
    MLP = "-"


_EXPERTS = "E"
# As lists spell it, in older files and as transformers 5 does.
_LETTERS: Mapping[object, str] = {
    "mamba": LayerKind.MAMBA, "linear_attention": LayerKind.MAMBA,
    "attention": LayerKind.ATTENTION, "full_attention": LayerKind.ATTENTION,
    "mlp": LayerKind.MLP, "moe": _EXPERTS,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class NemotronConfig:
    """Sizes and constants of a model; the comment of each gives its symbol in ops/."""

    vocab_size: int  # V
    hidden: int  # H
    intermediate: int  # I
    layers: tuple[LayerKind, ...]
    query_heads: int  # Nq
    kv_heads: int  # Nk
    head_dim: int  # D
    has_attention_bias: bool
    has_mlp_bias: bool
    ssm: SsmSizes
    eps: float
    is_tied: bool  # the head is the embedding table

    def count(self, kind: LayerKind) -> int:
        """Layers of a kind."""
        return self.layers.count(kind)


def text_fields(config: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the text model: all of them."""
    return config


def parse_config(config: Mapping[str, object], lacks_head: bool | None = None) -> NemotronConfig:
    """Read a config.json object.

    `lacks_head` says whether the checkpoint lacks lm_head.weight (see `fields.is_tied`). Raises
    CheckpointError listing every problem.
    """
    fields = _with_usual_names(config)
    query_heads = fields.size("num_attention_heads", 32)
    parsed = NemotronConfig(
        vocab_size=fields.size("vocab_size", 131072),
        hidden=fields.size("hidden_size", 4096),
        intermediate=fields.size("intermediate_size", 21504),
        layers=_layers(fields),
        query_heads=query_heads,
        kv_heads=_kv_heads(fields, query_heads),
        head_dim=fields.size("head_dim", 128),
        has_attention_bias=fields.is_set("attention_bias", default=False),
        has_mlp_bias=fields.is_set("mlp_bias", default=False),
        ssm=_ssm(fields),
        eps=fields.number("layer_norm_epsilon", default=1e-5, most=1.0),
        is_tied=is_tied(fields, [config], lacks_head),
    )
    fields.refuse_uneven_heads(parsed.query_heads, parsed.kv_heads)
    if config.get("max_position_embeddings") is not None:
        fields.size("max_position_embeddings")
    fields.refuse_but(_NEUTRAL)
    fields.raise_problems()
    return parsed


def _with_usual_names(config: Mapping[str, object]) -> Fields:
    """The config's fields, those of another name by their usual one too."""
    given, fields = dict(config), Fields({})
    for other, usual in _OTHER_NAMES.items():
        if (value := config.get(other)) is None:
            continue
        if given.setdefault(usual, value) != value:
            fields.problems.append(
                f"{other} is {shown(value)}, but {usual} is {shown(given[usual])}; keep one"
            )
    fields.fields = given
    return fields


def _kv_heads(fields: Fields, query_heads: int) -> int:
    """Null means as many as query heads."""
    if fields.fields.get("num_key_value_heads", 8) is None:
        return query_heads
    return fields.size("num_key_value_heads", 8)


def _ssm(fields: Fields) -> SsmSizes:
    heads, groups = fields.size("mamba_num_heads", 128), fields.size("n_groups", 8)
    if heads % groups:
        fields.problems.append(f"mamba_num_heads {heads} is no multiple of n_groups {groups}")
    return SsmSizes(
        heads=heads,
        head_dim=fields.size("mamba_head_dim", 64),
        state_dim=fields.size("ssm_state_size", 128),
        groups=groups,
        conv_taps=fields.size("conv_kernel", 4),
        has_conv_bias=fields.is_set("use_conv_bias", default=True),
        has_proj_bias=fields.is_set("use_bias", default=False),
        time_limits=time_limits(fields),
    )


def _layers(fields: Fields) -> tuple[LayerKind, ...]:
    """`layers_block_type` (also `layer_types`), a name for each layer; else
    `hybrid_override_pattern`, a letter for each.
    """
    given = {
        name: fields.fields[name]
        for name in ("layers_block_type", "layer_types", "hybrid_override_pattern")
        if fields.fields.get(name) is not None
    }
    if not given:
        fields.problems.append(
            "hybrid_override_pattern is missing; a letter for each layer is needed: M (Mamba-2), "
            "* (attention), - (MLP)"
        )
        return (LayerKind.MAMBA,)
    name, listed = next(iter(given.items()))
    if isinstance(listed, list):
        letters = [_LETTERS.get(x) if isinstance(x, str) else None for x in listed]
        known = "mamba, attention or mlp"
    elif isinstance(listed, str):
        letters = [x if x in (*LayerKind, _EXPERTS) else None for x in listed]
        known = "M (Mamba-2), * (attention) or - (MLP)"
    else:
        fields.problems.append(f"{name} is {shown(listed)}, expected names or letters of layers")
        return (LayerKind.MAMBA,)
    bad = [
        f"{name}[{i}] is {shown(listed[i])}, expected {known}"
        for i, letter in enumerate(letters)
        if letter is None
    ]
    if n_experts := letters.count(_EXPERTS):
        bad.append(
            f"{name} has {n_experts} layers of experts, as most of Nemotron 3; these are not "
            "supported yet: take a model of the family without, such as Nemotron-H, Nemotron Nano "
            "v2 or Nemotron 3 Nano 4B"
        )
    n_layers = fields.fields.get("num_hidden_layers")
    if n_layers is not None and n_layers != len(letters):
        bad.append(f"{name} is of {len(letters)} layers, num_hidden_layers is {shown(n_layers)}")
    if not bad and not {LayerKind.MAMBA, LayerKind.ATTENTION} & set(letters):
        bad.append(f"{name} is {shown(listed)}: no layer reads other tokens than its own")
    fields.problems += bad
    if bad:
        return (LayerKind.MAMBA,)
    return tuple(LayerKind(letter) for letter in letters if letter is not None)
