"""Weight rules of LFM2: names and shapes.

IS: the region of each projection, norm, tap and bias, and the tensors behind it. Projections that
share an input are stacked into one matrix. IS NOT: reading (weights/loader).
"""

from __future__ import annotations

from flashrt.models.blocks import INV_FREQ, bias_name
from flashrt.models.decoder import EMBED, FINAL_NORM, HEAD, layer_name
from flashrt.models.experts import Experts, Names, constants, expert_rules
from flashrt.models.lfm2.config import LayerKind, Lfm2Config
from flashrt.weights.rules import WeightRule, constant, depthwise_conv, matrix, vector


def weight_rules(config: Lfm2Config) -> tuple[WeightRule, ...]:
    """All rules, in the order in which a forward pass meets the weights."""
    c = config
    rules = [matrix(EMBED, c.hidden, ("model.embed_tokens.weight", c.vocab_size))]
    if c.n_full:
        rules.append(constant(INV_FREQ, c.rotation.inv_freq))
    rules += constants(c.experts)
    for i, kind in enumerate(c.layers):
        experts = c.experts if i >= c.n_dense else None
        rules += _layer(c, layer_name(i), f"model.layers.{i}", kind, experts)
    rules.append(vector(FINAL_NORM, "model.embedding_norm.weight", c.hidden))
    if not c.is_tied:
        rules.append(matrix(HEAD, c.hidden, ("lm_head.weight", c.vocab_size)))
    return tuple(rules)


def _layer(
    c: Lfm2Config, region: str, source: str, kind: LayerKind, experts: Experts | None
) -> list[WeightRule]:
    mixer = _conv if kind is LayerKind.CONV else _attention
    return [
        vector(f"{region}.input_norm", f"{source}.operator_norm.weight", c.hidden),
        *mixer(c, region, source),
        vector(f"{region}.mlp_norm", f"{source}.ffn_norm.weight", c.hidden),
        *_feed_forward(c, region, f"{source}.feed_forward", experts),
    ]


def _feed_forward(
    c: Lfm2Config, region: str, own: str, experts: Experts | None
) -> list[WeightRule]:
    """An MLP, or experts."""
    if experts is not None:
        names = Names(
            router=f"{own}.gate",
            router_bias=f"{own}.expert_bias",
            expert=f"{own}.experts.{{}}",
            gate="w1",
            up="w3",
            down="w2",
        )
        return expert_rules(region, experts, c.hidden, names)
    return [
        matrix(
            f"{region}.gate_up",
            c.hidden,
            (f"{own}.w1.weight", c.intermediate),
            (f"{own}.w3.weight", c.intermediate),
        ),
        matrix(f"{region}.down", c.intermediate, (f"{own}.w2.weight", c.hidden)),
    ]


def _conv(c: Lfm2Config, region: str, source: str) -> list[WeightRule]:
    own = f"{source}.conv"
    rules = [
        matrix(f"{region}.in_proj", c.hidden, (f"{own}.in_proj.weight", 3 * c.hidden)),
        depthwise_conv(f"{region}.conv", f"{own}.conv.weight", c.hidden, c.conv_taps),
        matrix(f"{region}.out_proj", c.hidden, (f"{own}.out_proj.weight", c.hidden)),
    ]
    if c.has_conv_bias:
        sizes = {"in_proj": 3 * c.hidden, "conv": c.hidden, "out_proj": c.hidden}
        rules += [
            vector(bias_name(f"{region}.{name}"), f"{own}.{name}.bias", size)
            for name, size in sizes.items()
        ]
    return rules


def _attention(c: Lfm2Config, region: str, source: str) -> list[WeightRule]:
    own, query, kv = f"{source}.self_attn", c.query_heads * c.head_dim, c.kv_heads * c.head_dim
    return [
        matrix(
            f"{region}.qkv",
            c.hidden,
            (f"{own}.q_proj.weight", query),
            (f"{own}.k_proj.weight", kv),
            (f"{own}.v_proj.weight", kv),
        ),
        vector(f"{region}.q_norm", f"{own}.q_layernorm.weight", c.head_dim),
        vector(f"{region}.k_norm", f"{own}.k_layernorm.weight", c.head_dim),
        matrix(f"{region}.o_proj", query, (f"{own}.out_proj.weight", c.hidden)),
    ]
