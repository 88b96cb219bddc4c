"""The configuration of Granite-4.0-H (granitemoehybrid), read from config.json.

IS: fields, their fall-backs (transformers' GraniteMoeHybridConfig) and every check on them, all
problems in one error; and what the four multipliers become. IS NOT: shapes of tensors (weights).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flashrt.base.messages import shown
from flashrt.models.experts import Experts, Routing
from flashrt.models.fields import NEUTRAL, Fields, Neutral, is_tied
from flashrt.models.rope import Rotation, rotation
from flashrt.models.ssm import SsmSizes, time_limits

# No matrix is changed by a multiplier. With e, r, a, s those of embedding, residual, attention and
# logits, the model is
#     x = e E;  x += r f(rmsnorm(x, eps));  scores a q.k;  logits = head(rmsnorm(x, eps)) / s
# * The residual stream is kept as x / r: what is added is f itself, the table's rows are multiplied
#   by e / r, and rmsnorm(x, eps) = rmsnorm(x / r, eps / r^2).
# * Attention divides by sqrt(D): queries and keys are multiplied by sqrt(a sqrt(D)), the magnitude
#   of their rotation. Without rotary positions all pairs turn by the angle 0.
# * The weight of the last norm is divided by s.
# In real numbers this is the model; in float32 each multiplier adds or saves a rounding. Keys in
# the cache are those of transformers times the magnitude.
MODEL_TYPES = ("granitemoehybrid",)
_MULTIPLIERS = (
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
)  # fmt: skip
_NEUTRAL: Neutral = {
    name: values
    for name, values in NEUTRAL.items()
    if name not in (*_MULTIPLIERS, "num_local_experts")
} | {"attn_output_gate": (False, None), "rope_interleaved": (False, None)}


class LayerKind(enum.StrEnum):
    """The mixer of a layer."""

    MAMBA = "mamba"
    ATTENTION = "attention"


# As released configs spell it, and as transformers 5 does.
_KINDS: Mapping[object, LayerKind] = {
    "mamba": LayerKind.MAMBA, "linear_attention": LayerKind.MAMBA,
    "attention": LayerKind.ATTENTION, "full_attention": LayerKind.ATTENTION,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GraniteConfig:
    """Sizes and constants of a model; the comment of each gives its symbol in ops/."""

    vocab_size: int  # V
    hidden: int  # H
    intermediate: int  # I, of the MLP that all tokens go through
    layers: tuple[LayerKind, ...]
    query_heads: int  # Nq
    kv_heads: int  # Nk
    head_dim: int  # D
    rotation: Rotation  # its magnitude holds the multiplier of attention
    has_attention_bias: bool
    ssm: SsmSizes
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    eps: float
    is_tied: bool  # the head is the embedding table
    has_split_mlp: bool  # its first matrix is two tensors, as in GGUF files
    experts: Experts | None  # beside that MLP

    @property
    def stream_eps(self) -> float:
        """eps of the norms over the residual stream, which is divided by its multiplier."""
        return self.eps / self.residual_multiplier**2

    @property
    def embedding_factor(self) -> float:
        """What rows of the table are multiplied by on their way into that stream."""
        return self.embedding_multiplier / self.residual_multiplier

    def count(self, kind: LayerKind) -> int:
        """Layers of a kind."""
        return self.layers.count(kind)


def text_fields(config: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the text model: all of them."""
    return config


def parse_config(
    config: Mapping[str, object], lacks_head: bool | None = None, max_positions: int = 0
) -> GraniteConfig:
    """Read a config.json object.

    `lacks_head` says whether the checkpoint lacks lm_head.weight (see `fields.is_tied`),
    `max_positions` how many there will be, as far as that is known. Raises CheckpointError listing
    every problem.
    """
    fields = Fields(config)
    hidden, query_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = _head_dim(fields, hidden, query_heads)
    parsed = GraniteConfig(
        vocab_size=fields.size("vocab_size"),
        hidden=hidden,
        intermediate=fields.size("shared_intermediate_size", 1024),
        layers=_layers(fields),
        query_heads=query_heads,
        kv_heads=(
            query_heads
            if config.get("num_key_value_heads") is None
            else fields.size("num_key_value_heads")
        ),
        head_dim=head_dim,
        rotation=_rotation(fields, head_dim, max_positions),
        has_attention_bias=fields.is_set("attention_bias", default=False),
        ssm=_ssm(fields, hidden),
        embedding_multiplier=fields.number("embedding_multiplier", 1.0),
        residual_multiplier=fields.number("residual_multiplier", 1.0),
        logits_scaling=fields.number("logits_scaling", 1.0),
        eps=fields.number("rms_norm_eps", default=1e-6, most=1.0),
        is_tied=is_tied(fields, [config], lacks_head),
        has_split_mlp=fields.is_set("shared_mlp_is_split", default=False),
        experts=_experts(fields),
    )
    fields.refuse_uneven_heads(parsed.query_heads, parsed.kv_heads)
    if parsed.experts is not None:
        parsed.experts.check(fields, hidden, len(parsed.layers), "intermediate_size")
    if config.get("max_position_embeddings") is not None:
        fields.size("max_position_embeddings")
    fields.refuse_but(_NEUTRAL)
    fields.raise_problems()
    return parsed


def _head_dim(fields: Fields, hidden: int, query_heads: int) -> int:
    if fields.fields.get("head_dim") is not None:
        head_dim = fields.size("head_dim")
    else:
        if hidden % query_heads:
            fields.problems.append(
                f"hidden_size {hidden} is no multiple of num_attention_heads {query_heads}, and "
                "head_dim is missing; add it"
            )
        head_dim = max(1, hidden // query_heads)
    if head_dim % 2:
        fields.problems.append(f"heads have {head_dim} dims; an even number is needed")
    return head_dim


def _ssm(fields: Fields, hidden: int) -> SsmSizes:
    heads, inner = fields.size("mamba_n_heads", 128), fields.size("mamba_expand", 2) * hidden
    if fields.fields.get("mamba_d_head", "auto") == "auto":
        head_dim = inner // heads or 1
    else:
        head_dim = fields.size("mamba_d_head")
    if heads * head_dim != inner:
        fields.problems.append(
            f"mamba_n_heads {heads} of mamba_d_head {head_dim} are not mamba_expand * hidden_size "
            f"= {inner}"
        )
    if heads % (groups := fields.size("mamba_n_groups", 1)):
        fields.problems.append(f"mamba_n_heads {heads} is no multiple of mamba_n_groups {groups}")
    return SsmSizes(
        heads=heads,
        head_dim=head_dim,
        state_dim=fields.size("mamba_d_state", 256),
        groups=groups,
        conv_taps=fields.size("mamba_d_conv", 4),
        has_conv_bias=fields.is_set("mamba_conv_bias", default=True),
        has_proj_bias=fields.is_set("mamba_proj_bias", default=False),
        time_limits=time_limits(fields),
    )


def _experts(fields: Fields) -> Experts | None:
    """Experts of all layers. Gates are a softmax over the logits of those that were picked: that
    over all logits, normed.
    """
    n = fields.fields.get("num_local_experts", 8)
    if n is None or (n == 0 and not isinstance(n, bool)):
        return None
    routing = Routing(fields.size("num_experts_per_tok", 2))
    n_experts = fields.size("num_local_experts", 8)
    return Experts(n_experts, fields.size("intermediate_size", 11008), routing)


def _layers(fields: Fields) -> tuple[LayerKind, ...]:
    """`layer_types`, older `layers_block_type`; all Mamba, where there is neither."""
    n_layers = fields.size("num_hidden_layers")
    given = {
        name: fields.fields[name]
        for name in ("layer_types", "layers_block_type")
        if fields.fields.get(name) is not None
    }
    if not given:
        return (LayerKind.MAMBA,) * n_layers
    name, listed = next(iter(given.items()))
    if not isinstance(listed, list) or len(listed) != n_layers:
        fields.problems.append(
            f"{name} is {shown(listed)}, expected a list of num_hidden_layers = {n_layers} names"
        )
        return (LayerKind.MAMBA,)
    bad = [
        f"{name}[{i}] is {shown(kind)}, expected mamba or attention"
        for i, kind in enumerate(listed)
        if not isinstance(kind, str) or kind not in _KINDS
    ]
    fields.problems += bad
    return (LayerKind.MAMBA,) if bad else tuple(_KINDS[kind] for kind in listed)


def _rotation(fields: Fields, head_dim: int, max_positions: int) -> Rotation:
    """With the multiplier of attention in its magnitude; the angle 0 where there is no rotation."""
    scale = fields.number("attention_multiplier", 1.0) * math.sqrt(head_dim)
    kind = fields.fields.get("position_embedding_type")
    if kind not in (None, "nope", "rope"):
        fields.problems.append(
            f"position_embedding_type is {shown(kind)}; only 'rope' or 'nope' is supported"
        )
    if kind != "rope":
        return Rotation((0.0,) * (head_dim // 2), math.sqrt(scale))
    turned = rotation(fields, (), head_dim, max_positions)
    if not fields.problems and 2 * len(turned.inv_freq) != head_dim:
        fields.problems.append("partial_rotary_factor is not 1; heads of this family turn whole")
    return replace(turned, magnitude=turned.magnitude * math.sqrt(scale))
