"""Weight rules of Granite-4.0-H.

IS: the region of each projection, norm and bias, and the tensors behind it: names and shapes.
Projections that share an input are stacked into one matrix. IS NOT: reading (weights/loader).
"""

from __future__ import annotations

from dataclasses import replace

from flashrt.core.region import DType, Region, Role
from flashrt.models.blocks import INV_FREQ, NO_NORM, bias_name
from flashrt.models.experts import Names, constants, expert_rules
from flashrt.models.granite.config import GraniteConfig, LayerKind
from flashrt.weights.rules import Source, WeightRule, constant, depthwise_conv, matrix, vector

EMBED, HEAD, FINAL_NORM = "embed", "head", "final_norm"


def layer_name(index: int) -> str:
    """Prefix of the weight and scratch regions of a layer."""
    return f"layers.{index}"


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
    mixer = _mamba if kind is LayerKind.MAMBA else _attention
    own = f"{source}.shared_mlp"
    experts = []
    if c.experts is not None:
        of = f"{source}.block_sparse_moe"
        names = Names(router=f"{of}.router.layer", expert=f"{of}.experts.{{}}")
        experts = expert_rules(region, c.experts, c.hidden, names)
    return [
        vector(f"{region}.input_norm", f"{source}.input_layernorm.weight", c.hidden),
        *mixer(c, region, source),
        vector(f"{region}.mlp_norm", f"{source}.post_attention_layernorm.weight", c.hidden),
        *experts,
        # rows [gate | up]
        matrix(f"{region}.gate_up", c.hidden, (f"{own}.input_linear.weight", 2 * c.intermediate)),
        matrix(f"{region}.down", c.intermediate, (f"{own}.output_linear.weight", c.hidden)),
    ]


def _mamba(c: GraniteConfig, region: str, source: str) -> list[WeightRule]:
    own, rows = f"{source}.mamba", c.inner + c.conv_channels + c.ssm_heads
    in_proj, conv, out_proj = (f"{region}.{name}" for name in ("in_proj", "conv", "out_proj"))
    rules = [
        matrix(in_proj, c.hidden, (f"{own}.in_proj.weight", rows)),  # [z | x B C | dt]
        depthwise_conv(conv, f"{own}.conv1d.weight", c.conv_channels, c.conv_taps),
        vector(f"{region}.a_log", f"{own}.A_log", c.ssm_heads),
        vector(f"{region}.dt_bias", f"{own}.dt_bias", c.ssm_heads),
        vector(f"{region}.d", f"{own}.D", c.ssm_heads),
        vector(f"{region}.ssm_norm", f"{own}.norm.weight", c.inner),
        matrix(out_proj, c.inner, (f"{own}.out_proj.weight", c.hidden)),
    ]
    if c.has_conv_bias:
        rules.append(_bias(conv, (f"{own}.conv1d.bias", c.conv_channels)))
    if c.has_proj_bias:
        rules.append(_bias(in_proj, (f"{own}.in_proj.bias", rows)))
        rules.append(_bias(out_proj, (f"{own}.out_proj.bias", c.hidden)))
    return rules


def _attention(c: GraniteConfig, region: str, source: str) -> list[WeightRule]:
    own, query, kv = f"{source}.self_attn", c.query_heads * c.head_dim, c.kv_heads * c.head_dim
    stacked = (("q_proj", query), ("k_proj", kv), ("v_proj", kv))
    qkv, output = f"{region}.qkv", f"{region}.o_proj"
    rules = [
        matrix(qkv, c.hidden, *((f"{own}.{n}.weight", rows) for n, rows in stacked)),
        matrix(output, query, (f"{own}.o_proj.weight", c.hidden)),
    ]
    if c.has_attention_bias:
        rules.append(_bias(qkv, *((f"{own}.{n}.bias", rows) for n, rows in stacked)))
        rules.append(_bias(output, (f"{own}.o_proj.bias", c.hidden)))
    return rules


def _bias(of: str, *sources: tuple[str, int]) -> WeightRule:
    """The bias of a matrix or a convolution, stacked as its rows are."""
    size = sum(rows for _, rows in sources)
    region = Region(bias_name(of), (size,), DType.F32, Role.WEIGHT)
    return WeightRule(region, tuple(Source(name, (rows,)) for name, rows in sources))
