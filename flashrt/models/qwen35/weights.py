"""Weight rules of Qwen3.5 dense text models.

IS: the region of each projection, norm and gate, and the tensors behind it: names and shapes.
Projections that share an input are stacked into one matrix. IS NOT: reading (weights/loader).
"""

from __future__ import annotations

from flashrt.models.blocks import INV_FREQ
from flashrt.models.qwen35.config import LayerKind, Qwen35Config
from flashrt.weights.rules import Transform, WeightRule, constant, depthwise_conv, matrix, vector

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
    for i, kind in enumerate(c.layers):
        rules += _layer(c, layer_name(i), f"model.layers.{i}", kind)
    rules.append(_norm(FINAL_NORM, "model.norm", c.hidden))
    if not c.is_tied:
        rules.append(matrix(HEAD, c.hidden, ("lm_head.weight", c.vocab_size)))
    if has_draft_head:
        rules += _draft_head(c)
    return tuple(rules)


def _layer(c: Qwen35Config, region: str, source: str, kind: LayerKind) -> list[WeightRule]:
    mixer = _linear_attention if kind is LayerKind.LINEAR else _full_attention
    return [
        _norm(f"{region}.input_norm", f"{source}.input_layernorm", c.hidden),
        *mixer(c, region, source),
        _norm(f"{region}.mlp_norm", f"{source}.post_attention_layernorm", c.hidden),
        matrix(
            f"{region}.gate_up",
            c.hidden,
            (f"{source}.mlp.gate_proj.weight", c.intermediate),
            (f"{source}.mlp.up_proj.weight", c.intermediate),
        ),
        matrix(f"{region}.down", c.intermediate, (f"{source}.mlp.down_proj.weight", c.hidden)),
    ]


def _linear_attention(c: Qwen35Config, region: str, source: str) -> list[WeightRule]:
    own, inner = f"{source}.linear_attn", c.value_heads * c.value_dim
    return [
        matrix(
            f"{region}.in_proj",  # rows [qkv | z | b | a]
            c.hidden,
            (f"{own}.in_proj_qkv.weight", c.conv_channels),
            (f"{own}.in_proj_z.weight", inner),
            (f"{own}.in_proj_b.weight", c.value_heads),
            (f"{own}.in_proj_a.weight", c.value_heads),
        ),
        depthwise_conv(f"{region}.conv", f"{own}.conv1d.weight", c.conv_channels, c.conv_taps),
        vector(f"{region}.a_log", f"{own}.A_log", c.value_heads),
        vector(f"{region}.dt_bias", f"{own}.dt_bias", c.value_heads),
        vector(f"{region}.gated_norm", f"{own}.norm.weight", c.value_dim),  # plain, not 1 + w
        matrix(f"{region}.out_proj", inner, (f"{own}.out_proj.weight", c.hidden)),
    ]


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
        *_layer(c, f"{DRAFT_HEAD}.layer", "mtp.layers.0", LayerKind.FULL),
        _norm(f"{DRAFT_HEAD}.norm", "mtp.norm", c.hidden),
    ]


def _norm(region: str, source: str, size: int) -> WeightRule:
    """A norm whose checkpoint weight is zero-centred: the region holds 1 + weight."""
    return vector(region, f"{source}.weight", size, Transform.ONE_PLUS)
