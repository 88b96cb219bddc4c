"""The configuration of LFM2 models, read from config.json.

IS: fields, their fall-backs and every check on them, all problems in one error; defaults and the
rule of the MLP's size are those of transformers (configuration_lfm2.py, Lfm2MLP). IS NOT: shapes of
tensors (weights), rotary positions (models.rope).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from flashrt.base.messages import shown
from flashrt.models.experts import Experts, Routing
from flashrt.models.fields import NEUTRAL, Fields, Neutral, is_tied
from flashrt.models.rope import Rotation, rotation
from flashrt.ops.experts import Scoring

MOE_MODEL_TYPE = "lfm2_moe"
MODEL_TYPES = ("lfm2", MOE_MODEL_TYPE)
_MOST_INTERMEDIATE = 1 << 18
# Settings of the files that the models were released with; transformers reads none of them.
_NEUTRAL: Neutral = NEUTRAL | {
    "attention_bias": (False, None),
    "block_use_swiglu": (True, None),
    "use_pos_enc": (True, None),
}


class LayerKind(enum.StrEnum):
    """The mixer of a layer, as config.json spells it."""

    CONV = "conv"
    FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class Lfm2Config:
    """Sizes and constants of a model; the comment of each gives its symbol in ops/."""

    vocab_size: int  # V
    hidden: int  # H, and C of the convolutions
    intermediate: int  # I
    layers: tuple[LayerKind, ...]
    query_heads: int  # Nq
    kv_heads: int  # Nk
    head_dim: int  # D
    rotation: Rotation
    conv_taps: int  # W + 1
    has_conv_bias: bool  # of in_proj, the convolution and out_proj
    eps: float
    is_tied: bool  # the head is the embedding table
    experts: Experts | None = None
    n_dense: int = 0  # layers with an MLP, before those with experts

    @property
    def n_conv(self) -> int:
        """Layers with a window."""
        return self.layers.count(LayerKind.CONV)

    @property
    def n_full(self) -> int:
        """Layers with keys and values."""
        return self.layers.count(LayerKind.FULL)


def text_fields(config: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the text model: all of them."""
    return config


def parse_config(
    config: Mapping[str, object], lacks_head: bool | None = None, max_positions: int = 0
) -> Lfm2Config:
    """Read a config.json object.

    `lacks_head` says whether the checkpoint lacks lm_head.weight (see `fields.is_tied`);
    `max_positions` how many positions there will be, as far as that is known. Raises
    CheckpointError listing every problem.
    """
    fields = Fields(config)
    hidden, query_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = _head_dim(fields, hidden, query_heads)
    is_moe = config.get("model_type") == MOE_MODEL_TYPE
    tied = {"tie_word_embeddings": config.get("tie_embedding", config.get("tie_word_embeddings"))}
    parsed = Lfm2Config(
        vocab_size=fields.size("vocab_size"),
        hidden=hidden,
        intermediate=(fields.size("intermediate_size", 7168) if is_moe else _intermediate(fields)),
        layers=_layers(fields),
        query_heads=query_heads,
        kv_heads=fields.size("num_key_value_heads", default=8),
        head_dim=head_dim,
        rotation=rotation(fields, (), head_dim, max_positions, theta=1e6),
        conv_taps=fields.size("conv_L_cache", default=3),
        has_conv_bias=fields.is_set("conv_bias", default=False),
        eps=fields.number("norm_eps", default=1e-5, most=1.0),
        is_tied=is_tied(fields, [tied], lacks_head, default=True),
        experts=_experts(fields) if is_moe else None,
        n_dense=fields.size("num_dense_layers", 2) if is_moe else 0,
    )
    if parsed.experts is not None:
        n_sparse = max(0, len(parsed.layers) - parsed.n_dense)
        parsed.experts.check(fields, hidden, n_sparse, "moe_intermediate_size")
    fields.refuse_uneven_heads(parsed.query_heads, parsed.kv_heads)
    if config.get("max_position_embeddings") is not None:
        fields.size("max_position_embeddings")
    own: Neutral = dict.fromkeys(("block_dim", "conv_dim", "conv_dim_out"), (hidden, None))
    neutral = {k: v for k, v in _NEUTRAL.items() if k != "num_experts" or not is_moe}
    fields.refuse_but(neutral | own)
    fields.raise_problems()
    return parsed


def _head_dim(fields: Fields, hidden: int, query_heads: int) -> int:
    if fields.fields.get("head_dim") is not None:
        return fields.size("head_dim")
    if hidden % query_heads:
        fields.problems.append(
            f"hidden_size {hidden} is no multiple of num_attention_heads {query_heads}, and "
            "head_dim is missing; add it"
        )
    return max(1, hidden // query_heads)


def _intermediate(fields: Fields) -> int:
    """The MLP's size: `block_ff_dim` (by its later name `intermediate_size`); if it is to be
    adjusted, two thirds of it, times a factor, rounded up to a multiple: without a factor not
    rounded.
    """
    is_older = "block_ff_dim" in fields.fields
    size = fields.size("block_ff_dim" if is_older else "intermediate_size", 12288)
    if not fields.is_set("block_auto_adjust_ff_dim", default=True):
        return size
    size = int(2 * size / 3)
    if fields.fields.get("block_ffn_dim_multiplier", 1.0) is not None:
        factor = fields.number("block_ffn_dim_multiplier", default=1.0, most=1024.0)
        multiple = fields.size("block_multiple_of", default=256)
        size = -(-int(factor * size) // multiple) * multiple
    if not 1 <= size <= _MOST_INTERMEDIATE:
        fields.problems.append(
            f"block_ff_dim, block_ffn_dim_multiplier and block_multiple_of make an MLP of size "
            f"{size}, expected 1 to {_MOST_INTERMEDIATE:,}"
        )
        return 1
    return size


def _experts(fields: Fields) -> Experts:
    """Experts of the layers behind the dense ones; fall-backs as in transformers."""
    routing = Routing(
        fields.size("num_experts_per_tok", 4),
        Scoring.SIGMOID,
        is_normed=fields.is_set("norm_topk_prob", default=True),
        eps=1e-6,
        scale=fields.number("routed_scaling_factor", 1.0),
        is_biased=fields.is_set("use_expert_bias", default=True),
    )
    n = fields.size("num_experts", 32)
    return Experts(n, fields.size("moe_intermediate_size", 1792), routing)


def _layers(fields: Fields) -> tuple[LayerKind, ...]:
    """`layer_types`; else attention in the layers of `full_attn_idxs`, or in all without it."""
    n_layers = fields.size("num_hidden_layers")
    listed, indices = fields.fields.get("layer_types"), fields.fields.get("full_attn_idxs")
    known = [kind.value for kind in LayerKind]
    if listed is None:
        if indices is None:
            return (LayerKind.FULL,) * n_layers
        if not isinstance(indices, list) or any(type(i) is not int for i in indices):
            fields.problems.append(
                f"full_attn_idxs is {shown(indices)}, expected a list of layer numbers"
            )
            return (LayerKind.CONV,)
        return tuple(LayerKind.FULL if i in indices else LayerKind.CONV for i in range(n_layers))
    if not isinstance(listed, list) or len(listed) != n_layers:
        fields.problems.append(
            f"layer_types is {shown(listed)}, expected a list of num_hidden_layers = {n_layers} "
            "names"
        )
        return (LayerKind.CONV,)
    bad = [
        f"layer_types[{i}] is {shown(kind)}, expected {' or '.join(known)}"
        for i, kind in enumerate(listed)
        if kind not in known
    ]
    fields.problems += bad
    return (LayerKind.CONV,) if bad else tuple(LayerKind(kind) for kind in listed)
