"""Weight rules of Nemotron-H: names and shapes.

IS: the region of each projection, norm and bias, and the tensors behind it. Projections that share
an input are stacked into one matrix. Released files say `backbone.` for `model.`; the checkpoint
has both as `model.`. IS NOT: reading (weights/loader).
"""

from __future__ import annotations

from flashrt.models.blocks import NO_NORM, NO_ROPE
from flashrt.models.decoder import EMBED, FINAL_NORM, HEAD, bias_rule, layer_name
from flashrt.models.nemotron.config import LayerKind, NemotronConfig
from flashrt.weights.rules import WeightRule, constant, matrix, vector


def weight_rules(config: NemotronConfig) -> tuple[WeightRule, ...]:
    """All rules, in the order in which a forward pass meets the weights."""
    c = config
    rules = [matrix(EMBED, c.hidden, ("model.embeddings.weight", c.vocab_size))]
    if c.count(LayerKind.ATTENTION):
        rules.append(constant(NO_ROPE, (0.0,)))
        rules.append(constant(NO_NORM, (1.0,) * c.head_dim))
    for i, kind in enumerate(c.layers):
        region, source = layer_name(i), f"model.layers.{i}"
        rules.append(vector(f"{region}.input_norm", f"{source}.norm.weight", c.hidden))
        rules += _block(c, kind, region, f"{source}.mixer")
    rules.append(vector(FINAL_NORM, "model.norm_f.weight", c.hidden))
    if not c.is_tied:
        rules.append(matrix(HEAD, c.hidden, ("lm_head.weight", c.vocab_size)))
    return tuple(rules)


def _block(c: NemotronConfig, kind: LayerKind, region: str, source: str) -> list[WeightRule]:
    if kind is LayerKind.MAMBA:
        return c.ssm.weights(region, source, c.hidden)
    if kind is LayerKind.MLP:
        up, down = f"{region}.up", f"{region}.down"
        rules = [
            matrix(up, c.hidden, (f"{source}.up_proj.weight", c.intermediate)),
            matrix(down, c.intermediate, (f"{source}.down_proj.weight", c.hidden)),
        ]
        if c.has_mlp_bias:
            rules.append(bias_rule(up, (f"{source}.up_proj.bias", c.intermediate)))
            rules.append(bias_rule(down, (f"{source}.down_proj.bias", c.hidden)))
        return rules
    query, kv = c.query_heads * c.head_dim, c.kv_heads * c.head_dim
    stacked = (("q_proj", query), ("k_proj", kv), ("v_proj", kv))
    qkv, output = f"{region}.qkv", f"{region}.o_proj"
    rules = [
        matrix(qkv, c.hidden, *((f"{source}.{n}.weight", rows) for n, rows in stacked)),
        matrix(output, query, (f"{source}.o_proj.weight", c.hidden)),
    ]
    if c.has_attention_bias:
        rules.append(bias_rule(qkv, *((f"{source}.{n}.bias", rows) for n, rows in stacked)))
        rules.append(bias_rule(output, (f"{source}.o_proj.bias", c.hidden)))
    return rules
