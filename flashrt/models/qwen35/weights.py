"""Weight rules of Qwen3.5 and Qwen3-Next text models.

IS: the region of each projection, norm and gate, and the tensors behind it: names and shapes.
Projections that share an input are stacked into one matrix. IS NOT: reading (weights/loader).
"""

from __future__ import annotations

from dataclasses import replace

from flashrt.models.blocks import INV_FREQ
from flashrt.models.experts import Names, constants, expert_rules
from flashrt.models.qwen35.config import LayerKind, Qwen35Config
from flashrt.weights.rules import (
    Interleaved,
    Transform,
    WeightRule,
    constant,
    depthwise_conv,
    matrix,
    vector,
)

EMBED, HEAD, FINAL_NORM = "embed", "head", "final_norm"
DRAFT_HEAD = "draft"  # regions of the multi-token-prediction head: draft.fc, draft.layer.qkv, ...


def layer_name(index: int) -> str:
    """Prefix of the weight and scratch regions of a layer."""
    return f"layers.{index}"


def weight_rules(config: Qwen35Config, has_draft_head: bool) -> tuple[WeightRule, ...]:
    """All rules, in the order in which a forward pass meets the weights."""
    c = config
    rules = [matrix(EMBED, c.hidden, ("model.embed_tokens.weight", c.vocab_size))]
    if c.n_full or has_draft_head:
        rules.append(constant(INV_FREQ, c.rotation.inv_freq))
    rules += constants(c.experts)
    for i, kind in enumerate(c.layers):
        source = f"model.layers.{i}"
        rules += _layer(c, layer_name(i), source, kind, is_sparse=i in c.sparse)
    rules.append(_norm(FINAL_NORM, "model.norm", c.hidden))
    if not c.is_tied:
        rules.append(matrix(HEAD, c.hidden, ("lm_head.weight", c.vocab_size)))
    if has_draft_head:
        rules += _draft_head(c)
    return tuple(rules)


def _layer(
    c: Qwen35Config, region: str, source: str, kind: LayerKind, *, is_sparse: bool
) -> list[WeightRule]:
    mixer = _linear_attention if kind is LayerKind.LINEAR else _full_attention
    own = f"{source}.mlp"
    mlp = (
        _mlp(region, own, c.hidden, c.intermediate)
        if c.experts is None or not is_sparse
        else [
            *expert_rules(region, c.experts, c.hidden, _names(own)),
            *_mlp(region, f"{own}.shared_expert", c.hidden, c.shared_intermediate),
        ]
    )
    return [
        _norm(f"{region}.input_norm", f"{source}.input_layernorm", c.hidden),
        *mixer(c, region, source),
        _norm(f"{region}.mlp_norm", f"{source}.post_attention_layernorm", c.hidden),
        *mlp,
    ]


def _mlp(region: str, source: str, hidden: int, intermediate: int) -> list[WeightRule]:
    halves = [(f"{source}.{name}_proj.weight", intermediate) for name in ("gate", "up")]
    return [
        matrix(f"{region}.gate_up", hidden, *halves),
        matrix(f"{region}.down", intermediate, (f"{source}.down_proj.weight", hidden)),
    ]


def _names(source: str) -> Names:
    return Names(
        router=f"{source}.gate",
        expert=f"{source}.experts.{{}}",
        shared_gate=f"{source}.shared_expert_gate",
    )


def _linear_attention(c: Qwen35Config, region: str, source: str) -> list[WeightRule]:
    own, inner = f"{source}.linear_attn", c.value_heads * c.value_dim
    return [
        _in_proj(c, f"{region}.in_proj", own),
        depthwise_conv(f"{region}.conv", f"{own}.conv1d.weight", c.conv_channels, c.conv_taps),
        vector(f"{region}.a_log", f"{own}.A_log", c.value_heads),
        vector(f"{region}.dt_bias", f"{own}.dt_bias", c.value_heads),
        vector(f"{region}.gated_norm", f"{own}.norm.weight", c.value_dim),  # plain, not 1 + w
        matrix(f"{region}.out_proj", inner, (f"{own}.out_proj.weight", c.hidden)),
    ]


def _in_proj(c: Qwen35Config, region: str, own: str) -> WeightRule:
    """Rows [qkv | z | b | a]. Qwen3-Next has two tensors, each by key head: its query, its key, the
    values and z of its value heads; b and a of those.
    """
    inner = c.value_heads * c.value_dim
    if not c.is_interleaved:
        return matrix(
            region,
            c.hidden,
            (f"{own}.in_proj_qkv.weight", c.conv_channels),
            (f"{own}.in_proj_z.weight", inner),
            (f"{own}.in_proj_b.weight", c.value_heads),
            (f"{own}.in_proj_a.weight", c.value_heads),
        )
    sharing = c.value_heads // c.key_heads
    stored = {
        "in_proj_qkvz": (c.key_dim, c.key_dim, sharing * c.value_dim, sharing * c.value_dim),
        "in_proj_ba": (sharing, sharing),
    }
    rows = {name: Interleaved(c.key_heads, parts) for name, parts in stored.items()}
    rule = matrix(region, c.hidden, *((f"{own}.{n}.weight", r.n_rows) for n, r in rows.items()))
    pairs = zip(rule.sources, rows.values(), strict=True)
    return replace(rule, sources=tuple(replace(source, rows=r) for source, r in pairs))


def _full_attention(c: Qwen35Config, region: str, source: str) -> list[WeightRule]:
    own, query, kv = f"{source}.self_attn", c.query_heads * c.head_dim, c.kv_heads * c.head_dim
    return [
        matrix(
            f"{region}.qkv",  # rows [per head: query, gate | k | v]
            c.hidden,
            (f"{own}.q_proj.weight", 2 * query),
            (f"{own}.k_proj.weight", kv),
            (f"{own}.v_proj.weight", kv),
        ),
        _norm(f"{region}.q_norm", f"{own}.q_norm", c.head_dim),
        _norm(f"{region}.k_norm", f"{own}.k_norm", c.head_dim),
        matrix(f"{region}.o_proj", query, (f"{own}.o_proj.weight", c.hidden)),
    ]


def _draft_head(c: Qwen35Config) -> list[WeightRule]:
    return [
        _norm(f"{DRAFT_HEAD}.embedding_norm", "mtp.pre_fc_norm_embedding", c.hidden),
        _norm(f"{DRAFT_HEAD}.hidden_norm", "mtp.pre_fc_norm_hidden", c.hidden),
        matrix(f"{DRAFT_HEAD}.fc", 2 * c.hidden, ("mtp.fc.weight", c.hidden)),
        *_layer(c, f"{DRAFT_HEAD}.layer", "mtp.layers.0", LayerKind.FULL, is_sparse=True),
        _norm(f"{DRAFT_HEAD}.norm", "mtp.norm", c.hidden),
    ]


def _norm(region: str, source: str, size: int) -> WeightRule:
    """A norm whose checkpoint weight is zero-centred: the region holds 1 + weight."""
    return vector(region, f"{source}.weight", size, Transform.ONE_PLUS)
