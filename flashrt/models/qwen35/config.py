"""The configuration of Qwen3.5 dense text models, read from config.json.

IS: fields, their fall-backs and every check on them, all problems in one error. IS NOT: shapes of
tensors (see qwen35_weights). Called by: models.model_for, qwen35, qwen35_weights, tests.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.errors import CheckpointError

NESTED_MODEL_TYPE = "qwen3_5"  # multimodal: the text fields lie under text_config
MODEL_TYPES = ("qwen3_5_text", NESTED_MODEL_TYPE)
_ROPE_TYPES = ("default", "mrope")  # mrope is the identity on text: its three positions are equal


class LayerKind(enum.StrEnum):
    """The mixer of a layer, as config.json spells it."""

    LINEAR = "linear_attention"
    FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class Qwen35Config:
    """Sizes and constants of a model; the comment of each gives its symbol in ops/table."""

    vocab_size: int  # V
    hidden: int  # H
    intermediate: int  # I
    layers: tuple[LayerKind, ...]
    query_heads: int  # Nq
    kv_heads: int  # Nk
    head_dim: int  # D
    inv_freq: tuple[
        float, ...
    ]  # radians per position of each rotary pair; 2 * len dims of a head turn
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


def parse_config(config: Mapping[str, object], is_tied: bool | None = None) -> Qwen35Config:
    """Read a config.json object, flat or nested. `is_tied` overrides tie_word_embeddings (see
    `model_for`).

    Raises CheckpointError listing every problem.
    """
    is_nested = config.get("model_type") == NESTED_MODEL_TYPE
    text = config.get("text_config") if is_nested else config
    if not isinstance(text, Mapping) or not text:
        raise CheckpointError("config.json: text_config is missing or not an object")
    fields = _Fields(text)
    if is_tied is None:
        outer = config.get("tie_word_embeddings", False)
        is_tied = fields.boolean("tie_word_embeddings", default=outer is True)
    parsed = Qwen35Config(
        vocab_size=fields.size("vocab_size"),
        hidden=fields.size("hidden_size"),
        intermediate=fields.size("intermediate_size"),
        layers=_layers(fields),
        query_heads=fields.size("num_attention_heads"),
        kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        inv_freq=_inverse_frequencies(fields),
        key_heads=fields.size("linear_num_key_heads"),
        value_heads=fields.size("linear_num_value_heads"),
        key_dim=fields.size("linear_key_head_dim"),
        value_dim=fields.size("linear_value_head_dim"),
        conv_taps=fields.size("linear_conv_kernel_dim"),
        eps=fields.number("rms_norm_eps", default=1e-6),
        is_tied=is_tied,
    )
    _check(fields, parsed)
    if fields.problems:
        raise CheckpointError("config.json does not fit:\n  " + "\n  ".join(fields.problems))
    return parsed


class _Fields:
    """Typed reads that note what is wrong and go on with 1, so that one error lists everything."""

    def __init__(self, fields: Mapping[str, object], place: str = "") -> None:
        self.fields = fields
        self.place = place
        self.problems: list[str] = []

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.fields.get(name, default)
        if value is None:
            self.problems.append(f"{self.place}{name} is missing; a positive integer is needed")
        elif not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            self.problems.append(f"{self.place}{name} is {value!r}, expected a positive integer")
        else:
            return value
        return 1

    def number(self, name: str, default: float) -> float:
        """A positive finite number."""
        value = self.fields.get(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        self.problems.append(f"{self.place}{name} is {value!r}, expected a positive number")
        return 1.0

    def boolean(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{self.place}{name} is {value!r}, expected true or false")
        return value is True


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
            f"layer_types is {listed!r}, expected a list of num_hidden_layers = {n_layers} names"
        )
        return (LayerKind.LINEAR,)
    known = [kind.value for kind in LayerKind]
    bad = [
        f"layer_types[{i}] is {kind!r}, expected {' or '.join(known)}"
        for i, kind in enumerate(listed)
        if kind not in known
    ]
    fields.problems += bad
    return (LayerKind.LINEAR,) if bad else tuple(LayerKind(kind) for kind in listed)


def _inverse_frequencies(fields: _Fields) -> tuple[float, ...]:
    """theta^(-2j/R) for j in [0, R/2), R the rotary dims of a head; rope_parameters first, then the
    top level.
    """
    own = fields.fields.get("rope_parameters", fields.fields.get("rope_scaling")) or {}
    if not isinstance(own, Mapping):
        fields.problems.append(f"rope_parameters is {own!r}, expected an object")
        own = {}
    rope = _Fields({**fields.fields, **own}, "rope_parameters.")
    theta = rope.number("rope_theta", default=10000.0)
    factor = rope.number("partial_rotary_factor", default=0.25)
    kind = own.get("rope_type", own.get("type", "default"))
    if kind not in _ROPE_TYPES:
        rope.problems.append(
            f"rope_parameters.rope_type is {kind!r}; supported: {', '.join(_ROPE_TYPES)}"
        )
    fields.problems += rope.problems
    head_dim = fields.fields.get("head_dim")
    if not isinstance(head_dim, int):
        return (1.0,)
    rotary = int(head_dim * factor)
    if rotary < 2 or rotary % 2 or rotary > head_dim:
        fields.problems.append(
            f"partial_rotary_factor {factor} of head_dim {head_dim} turns {rotary} dims, "
            f"expected an even number in [2, {head_dim}]"
        )
        return (1.0,)
    return tuple(theta ** (-j / rotary) for j in range(0, rotary, 2))


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
    if "linear_conv_kernel_dim" in fields.fields and parsed.conv_taps < 2:
        problems.append(f"linear_conv_kernel_dim is {parsed.conv_taps}, expected at least 2")
    if fields.boolean("attention_bias", default=False):
        problems.append("attention_bias is true; projections with a bias are not supported")
    act = fields.fields.get("hidden_act", "silu")
    if act != "silu":
        problems.append(f"hidden_act is {act!r}; only 'silu' is supported")
    if fields.fields.get("quantization_config") is not None:
        problems.append("quantization_config is set; only unquantized checkpoints are supported")
