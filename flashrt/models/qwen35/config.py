"""The configuration of Qwen3.5 dense text models, read from config.json.

IS: fields, their fall-backs and every check on them, all problems in one error. Each field that
transformers would read is applied here, known to change nothing, or refused. IS NOT: shapes of
tensors (weights).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import indented, shown
from flashrt.weights.quantised import format_of_config, refusal

TEXT_MODEL_TYPE = "qwen3_5_text"
NESTED_MODEL_TYPE = "qwen3_5"  # multimodal: the text fields lie under text_config
MODEL_TYPES = (TEXT_MODEL_TYPE, NESTED_MODEL_TYPE)

# Beyond every released model, and small enough that no product of two of them, nor a launch over
# them, leaves what planner and kernels count with.
_MOST = {
    "vocab_size": 1 << 20, "hidden_size": 1 << 16, "intermediate_size": 1 << 18,
    "num_hidden_layers": 512, "num_attention_heads": 1024, "num_key_value_heads": 1024,
    "head_dim": 1024, "linear_num_key_heads": 1024, "linear_num_value_heads": 1024,
    "linear_key_head_dim": 1024, "linear_value_head_dim": 1024, "linear_conv_kernel_dim": 16,
    "full_attention_interval": 1 << 20, "max_position_embeddings": 1 << 31,
    "mtp_num_hidden_layers": 1024,
}  # fmt: skip
# The sampling kernels pass words between threads in a row of V numbers, for which V >= 8.
_LEAST = {"vocab_size": 8, "linear_conv_kernel_dim": 2}
_ROPE_TYPES = ("default", "mrope")  # mrope is the identity on text: its three positions are equal
_SILU = ("silu", "swish")  # two names of one function
# Settings of other models that would change the mathematics, and all values that change nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "attn_output_gate": (True, None),
    "output_gate_type": (*_SILU, None),
    "hidden_act": _SILU,
    "is_causal": (True, None),
    "is_encoder_decoder": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_softcapping": (None, 0),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "per_layer_config": (None,),
}


class LayerKind(enum.StrEnum):
    """The mixer of a layer, as config.json spells it."""

    LINEAR = "linear_attention"
    FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class Qwen35Config:
    """Sizes and constants of a model; the comment of each gives its symbol in ops/."""

    vocab_size: int  # V
    hidden: int  # H
    intermediate: int  # I
    layers: tuple[LayerKind, ...]
    query_heads: int  # Nq
    kv_heads: int  # Nk
    head_dim: int  # D
    inv_freq: tuple[
        float, ...
    ]  # radians per position of a rotary pair; 2 * len dims of a head turn
    key_heads: int  # Hk
    value_heads: int  # Hv
    key_dim: int  # dk
    value_dim: int  # dv
    conv_taps: int  # W + 1
    eps: float
    is_tied: bool  # the head is the embedding table

    @property
    def conv_channels(self) -> int:
        """C: query, key and value channels of a linear-attention layer."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def n_linear(self) -> int:
        """Layers with a recurrent state."""
        return self.layers.count(LayerKind.LINEAR)

    @property
    def n_full(self) -> int:
        """Layers with keys and values."""
        return self.layers.count(LayerKind.FULL)


def parse_config(
    config: Mapping[str, object], is_tied: bool | None = None, has_draft_head: bool = False
) -> Qwen35Config:
    """Read a config.json object, flat or nested.

    `is_tied` says whether the checkpoint lacks lm_head.weight (see `_tied`); `has_draft_head`
    whether its draft head will be run. Raises CheckpointError listing every problem.
    """
    text = text_fields(config)
    if quantised := format_of_config(config):
        raise CheckpointError(f"config.json: {refusal(quantised)}")
    fields = _Fields(text)
    parsed = Qwen35Config(
        vocab_size=fields.size("vocab_size"),
        hidden=fields.size("hidden_size"),
        intermediate=fields.size("intermediate_size"),
        layers=_layers(fields),
        query_heads=fields.size("num_attention_heads"),
        kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        inv_freq=_inverse_frequencies(fields, config),
        key_heads=fields.size("linear_num_key_heads"),
        value_heads=fields.size("linear_num_value_heads"),
        key_dim=fields.size("linear_key_head_dim"),
        value_dim=fields.size("linear_value_head_dim"),
        conv_taps=fields.size("linear_conv_kernel_dim"),
        eps=fields.number("rms_norm_eps", default=1e-6, most=1.0),
        is_tied=_tied(fields, config, is_tied),
    )
    _check(fields, parsed)
    if has_draft_head:
        _check_draft_head(fields)
    if fields.problems:
        raise CheckpointError(f"config.json does not fit:{indented(fields.problems)}")
    return parsed


def text_fields(config: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the text model. Raises CheckpointError where there are none."""
    if config.get("model_type") != NESTED_MODEL_TYPE:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping) or not text:
        raise CheckpointError(
            "config.json: text_config is missing or not an object; fetch config.json again"
        )
    if text.get("model_type", TEXT_MODEL_TYPE) not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: text_config.model_type is {shown(text['model_type'])}; only "
            f"{TEXT_MODEL_TYPE} is supported"
        )
    return text


class _Fields:
    """Typed reads that note what is wrong and go on with 1, so that one error lists everything."""

    def __init__(self, fields: Mapping[str, object], place: str = "") -> None:
        self.fields = fields
        self.place = place
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer, within the limits of its field."""
        value = self.fields.get(name, default)
        least, most = _LEAST.get(name, 1), _MOST[name]
        if value is None:
            self.problems.append(f"{self.place}{name} is missing; a positive integer is needed")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.problems.append(
                f"{self.place}{name} is {shown(value)}, expected a positive integer"
            )
        elif not least <= value <= most:
            self.problems.append(
                f"{self.place}{name} is {shown(value)}, expected {least} to {most:,}"
            )
        else:
            return value
        return 1

    def number(
        self, name: str, default: float, least: float = 0.0, most: float = math.inf
    ) -> float:
        """A finite number above 0, in [least, most]."""
        value = self.fields.get(name, default)
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and 0 < value <= 1e300
            and least <= value <= most
        ):
            return float(value)
        self.problems.append(
            f"{self.place}{name} is {shown(value)}, expected a positive number"
            + (f" from {least:g} to {most:g}" if (least, most) != (0.0, math.inf) else "")
        )
        return 1.0


def _tied(fields: _Fields, config: Mapping[str, object], lacks_head: bool | None) -> bool:
    """Whether the head is the embedding table.

    As in transformers: a stored lm_head.weight is used, also where the config says that it is tied
    (then it is a copy, or the config is wrong); a head that is not stored must be said to be tied.
    In a nested config the outer level may say so, or text_config.
    """
    name = "tie_word_embeddings"
    said = [level.get(name) for level in _levels(fields, config)]
    if bad := [value for value in said if not isinstance(value, bool | None)]:
        fields.problems.append(f"{name} is {shown(bad[0])}, expected true or false")
        return False
    if lacks_head is None:
        return next((value for value in said if value is not None), None) is True
    if lacks_head and True not in said:
        fields.problems.append(
            f"{name} is {'false' if False in said else 'missing'}, so the head is lm_head.weight, "
            "which the weight files lack: fetch them again, or, if this model ties its head to the "
            f"embedding, set {name} to true"
        )
    return lacks_head


def _levels(fields: _Fields, config: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The text fields, and around them the outer level of a nested config."""
    return [config] if fields.fields is config else [fields.fields, config]


def _layers(fields: _Fields) -> tuple[LayerKind, ...]:
    """`layer_types`, else full attention at every `full_attention_interval`-th layer."""
    n_layers = fields.size("num_hidden_layers")
    listed = fields.fields.get("layer_types")
    if listed is None:
        interval = fields.size("full_attention_interval", default=4)
        return tuple(
            LayerKind.LINEAR if (i + 1) % interval else LayerKind.FULL for i in range(n_layers)
        )
    if not isinstance(listed, list) or len(listed) != n_layers:
        fields.problems.append(
            f"layer_types is {shown(listed)}, expected a list of num_hidden_layers = {n_layers} "
            "names"
        )
        return (LayerKind.LINEAR,)
    known = [kind.value for kind in LayerKind]
    bad = [
        f"layer_types[{i}] is {shown(kind)}, expected {' or '.join(known)}"
        for i, kind in enumerate(listed)
        if kind not in known
    ]
    fields.problems += bad
    return (LayerKind.LINEAR,) if bad else tuple(LayerKind(kind) for kind in listed)


def _inverse_frequencies(fields: _Fields, config: Mapping[str, object]) -> tuple[float, ...]:
    """theta^(-2j/R) for j in [0, R/2), R the rotary dims of a head; rope_parameters first, then the
    top level.
    """
    head_dim = fields.fields.get("head_dim")
    rope = _rope_parameters(fields, config)
    before = len(rope.problems)
    theta = rope.number("rope_theta", default=10000.0, least=1.0, most=1e12)
    factor = rope.number("partial_rotary_factor", default=0.25, least=0.0, most=1.0)
    fields.problems += rope.problems
    is_fine = len(rope.problems) == before
    if not is_fine or not isinstance(head_dim, int) or not 0 < head_dim <= _MOST["head_dim"]:
        return (1.0,)
    rotary = int(head_dim * factor)
    if rotary < 2 or rotary % 2:
        fields.problems.append(
            f"partial_rotary_factor {factor} of head_dim {head_dim} turns {rotary} dims, "
            f"expected an even number in [2, {head_dim}]"
        )
        return (1.0,)
    return tuple(theta ** (-j / rotary) for j in range(0, rotary, 2))


def _rope_parameters(fields: _Fields, config: Mapping[str, object]) -> _Fields:
    """The rotary settings that transformers would apply, over the fall-backs of the top level.

    It takes `rope_scaling` where that and `rope_parameters` both stand. It ignores the outer level
    of a nested config, which other programs apply. So whatever scales positions is refused, at
    either level, and two that disagree as well.
    """
    problems: list[str] = []
    chosen: list[Mapping[str, object]] = []
    for level in _levels(fields, config):
        for name in ("rope_scaling", "rope_parameters"):
            own = level.get(name)
            if own is not None and not isinstance(own, Mapping):
                problems.append(f"{name} is {shown(own)}, expected an object")
            elif own:
                problems += _rope_problems(name, own)
                chosen += [own] if level is fields.fields else []
    rope = _Fields({**fields.fields, **(chosen[0] if chosen else {})}, "rope_parameters.")
    rope.problems += problems
    for own in chosen[1:]:
        for setting in ("rope_theta", "partial_rotary_factor"):
            given, used = own.get(setting), rope.fields.get(setting)
            if given is not None and given != used:
                rope.problems.append(
                    f"rope_parameters.{setting} is {shown(given)}, but rope_scaling takes its "
                    f"place, with {shown(used)}; keep one of the two"
                )
    return rope


def _rope_problems(name: str, own: Mapping[str, object]) -> list[str]:
    kind = own.get("rope_type", own.get("type", "default"))
    if kind not in _ROPE_TYPES:
        return [
            f"{name}.rope_type is {shown(kind)}, which is not supported yet; remove it from "
            "config.json to run within the context that the model was trained for"
        ]
    if by_layer := [key for key in own if key in tuple(LayerKind)]:
        return [f"{name} differs by layer ({shown(by_layer)}), which is not supported"]
    return []


def _check(fields: _Fields, parsed: Qwen35Config) -> None:
    """Relations between fields, and settings that would change the mathematics."""
    problems = fields.problems
    if parsed.value_heads % parsed.key_heads:
        problems.append(
            f"linear_num_value_heads {parsed.value_heads} is no multiple of "
            f"linear_num_key_heads {parsed.key_heads}"
        )
    if parsed.query_heads % parsed.kv_heads:
        problems.append(
            f"num_attention_heads {parsed.query_heads} is no multiple of "
            f"num_key_value_heads {parsed.kv_heads}"
        )
    if fields.fields.get("max_position_embeddings") is not None:
        fields.size("max_position_embeddings")
    for name, neutral in _NEUTRAL.items():
        value = fields.fields.get(name, neutral[0])
        if not any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral):
            wanted = " or ".join(shown(n) for n in neutral)
            problems.append(f"{name} is {shown(value)}; only {wanted} is supported")


def _check_draft_head(fields: _Fields) -> None:
    layers = fields.fields.get("mtp_num_hidden_layers")
    way_out = "load without the draft head: draft=False, or --no-draft on the command line"
    if layers not in (None, 0, 1) or isinstance(layers, bool):
        fields.problems.append(
            f"mtp_num_hidden_layers is {shown(layers)}; draft heads of one layer are supported: "
            f"{way_out}"
        )
    if fields.fields.get("mtp_use_dedicated_embeddings") not in (None, False):
        fields.problems.append(
            f"mtp_use_dedicated_embeddings is set, which is not supported: {way_out}"
        )
