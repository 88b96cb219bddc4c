"""Weight rules of dense decoders.

IS: the region of each projection, norm and bias, and the tensors behind it: names and shapes.
Projections that share an input are stacked into one matrix. IS NOT: reading (weights/loader).
"""

from __future__ import annotations

from flashrt.models.blocks import INV_FREQ, NO_NORM, NO_ROPE
from flashrt.models.decoder import EMBED, FINAL_NORM, HEAD, bias_rule, layer_name
from flashrt.models.dense.config import DenseConfig
from flashrt.weights.rules import WeightRule, constant, matrix, vector


def weight_rules(config: DenseConfig) -> tuple[WeightRule, ...]:
    """All rules, in the order in which a forward pass meets the weights."""
    c = config
    rules = [matrix(EMBED, c.hidden, ("model.embed_tokens.weight", c.vocab_size))]
    if any(c.turned):
        rules.append(constant(INV_FREQ, c.rotation.inv_freq))
    if not all(c.turned):
        rules.append(constant(NO_ROPE, (0.0,)))
    if not c.is_normed:
        rules.append(constant(NO_NORM, (1.0,) * c.head_dim))
    for i in range(c.n_layers):
        rules += _layer(c, layer_name(i), f"model.layers.{i}")
    rules.append(vector(FINAL_NORM, "model.norm.weight", c.hidden))
    if not c.is_tied:
        rules.append(matrix(HEAD, c.hidden, ("lm_head.weight", c.vocab_size)))
    return tuple(rules)


def _layer(c: DenseConfig, region: str, source: str) -> list[WeightRule]:
    return [
        vector(f"{region}.input_norm", f"{source}.input_layernorm.weight", c.hidden),
        *_attention(c, region, f"{source}.self_attn"),
        vector(f"{region}.mlp_norm", f"{source}.post_attention_layernorm.weight", c.hidden),
        matrix(
            f"{region}.gate_up",
            c.hidden,
            (f"{source}.mlp.gate_proj.weight", c.intermediate),
            (f"{source}.mlp.up_proj.weight", c.intermediate),
        ),
        matrix(f"{region}.down", c.intermediate, (f"{source}.mlp.down_proj.weight", c.hidden)),
    ]


def _attention(c: DenseConfig, region: str, own: str) -> list[WeightRule]:
    query, kv = c.query_heads * c.head_dim, c.kv_heads * c.head_dim
    stacked = (("q_proj", query), ("k_proj", kv), ("v_proj", kv))
    qkv, output = f"{region}.qkv", f"{region}.o_proj"
    rules = [matrix(qkv, c.hidden, *((f"{own}.{n}.weight", rows) for n, rows in stacked))]
    if c.has_qkv_bias:
        rules.append(bias_rule(qkv, *((f"{own}.{n}.bias", rows) for n, rows in stacked)))
    if c.is_normed:
        for name in ("q_norm", "k_norm"):
            rules.append(vector(f"{region}.{name}", f"{own}.{name}.weight", c.head_dim))
    rules.append(matrix(output, query, (f"{own}.o_proj.weight", c.hidden)))
    if c.has_output_bias:
        rules.append(bias_rule(output, (f"{own}.o_proj.bias", c.hidden)))
    return rules
