"""Weight rules of Granite-4.0-H.

IS: the region of each projection, norm and bias, and the tensors behind it: names and shapes.
Projections that share an input are stacked into one matrix. IS NOT: reading (weights/loader).
"""

from __future__ import annotations

from dataclasses import replace

from flashrt.models.blocks import INV_FREQ, NO_NORM
from flashrt.models.decoder import EMBED, FINAL_NORM, HEAD, bias_rule, layer_name
from flashrt.models.experts import Names, constants, expert_rules
from flashrt.models.granite.config import GraniteConfig, LayerKind
from flashrt.weights.rules import WeightRule, constant, matrix, vector


def weight_rules(config: GraniteConfig) -> tuple[WeightRule, ...]:
    """All rules, in the order in which a forward pass meets the weights."""
    c = config
    rules = [matrix(EMBED, c.hidden, ("model.embed_tokens.weight", c.vocab_size))]
    if c.count(LayerKind.ATTENTION):
        rules.append(constant(INV_FREQ, c.rotation.inv_freq))
        rules.append(constant(NO_NORM, (1.0,) * c.head_dim))
    rules += constants(c.experts)
    for i, kind in enumerate(c.layers):
        rules += _layer(c, layer_name(i), f"model.layers.{i}", kind)
    final_norm = vector(FINAL_NORM, "model.norm.weight", c.hidden)
    rules.append(replace(final_norm, factor=1.0 / c.logits_scaling))
    if not c.is_tied:
        rules.append(matrix(HEAD, c.hidden, ("lm_head.weight", c.vocab_size)))
    return tuple(rules)


def _layer(c: GraniteConfig, region: str, source: str, kind: LayerKind) -> list[WeightRule]:
    own = f"{source}.shared_mlp"
    first = [(f"{own}.input_linear.weight", 2 * c.intermediate)]  # rows [gate | up]
    if c.has_split_mlp:
        halves = ("gate_linear", "up_linear")
        first = [(f"{own}.{name}.weight", c.intermediate) for name in halves]
    experts = []
    if c.experts is not None:
        of = f"{source}.block_sparse_moe"
        names = Names(router=f"{of}.router.layer", expert=f"{of}.experts.{{}}")
        experts = expert_rules(region, c.experts, c.hidden, names)
    mixer = (
        c.ssm.weights(region, f"{source}.mamba", c.hidden)
        if kind is LayerKind.MAMBA
        else _attention(c, region, source)
    )
    return [
        vector(f"{region}.input_norm", f"{source}.input_layernorm.weight", c.hidden),
        *mixer,
        vector(f"{region}.mlp_norm", f"{source}.post_attention_layernorm.weight", c.hidden),
        *experts,
        matrix(f"{region}.gate_up", c.hidden, *first),
        matrix(f"{region}.down", c.intermediate, (f"{own}.output_linear.weight", c.hidden)),
    ]


def _attention(c: GraniteConfig, region: str, source: str) -> list[WeightRule]:
    own, query, kv = f"{source}.self_attn", c.query_heads * c.head_dim, c.kv_heads * c.head_dim
    stacked = (("q_proj", query), ("k_proj", kv), ("v_proj", kv))
    qkv, output = f"{region}.qkv", f"{region}.o_proj"
    rules = [
        matrix(qkv, c.hidden, *((f"{own}.{n}.weight", rows) for n, rows in stacked)),
        matrix(output, query, (f"{own}.o_proj.weight", c.hidden)),
    ]
    if c.has_attention_bias:
        rules.append(bias_rule(qkv, *((f"{own}.{n}.bias", rows) for n, rows in stacked)))
        rules.append(bias_rule(output, (f"{own}.o_proj.bias", c.hidden)))
    return rules
