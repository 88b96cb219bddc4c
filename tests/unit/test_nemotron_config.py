"""config.json -> Nemotron-H: defaults, names of fields, kinds of layers, refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from flashrt.base.errors import CheckpointError
from flashrt.core.op import Op
from flashrt.models import model_for
from flashrt.models.nemotron.config import LayerKind, parse_config
from flashrt.ops import table as ops
from tests.families import SETS

Config = dict[str, Any]
TINY, ODD = (
    json.loads((SETS / name / "config.json").read_text()) for name in ("nemotron", "nemotron-odd")
)
MAMBA, ATTENTION, MLP = LayerKind.MAMBA, LayerKind.ATTENTION, LayerKind.MLP


def test_silence_means_what_it_means_in_transformers() -> None:
    """And `time_step_limit` what it means in NVIDIA's own code: time_step_min is of no effect."""
    c = parse_config({"hybrid_override_pattern": "M-*", "time_step_min": 0.01})
    assert (c.vocab_size, c.hidden, c.intermediate) == (131072, 4096, 21504)
    assert (c.query_heads, c.kv_heads, c.head_dim, c.eps) == (32, 8, 128, 1e-5)
    assert (c.ssm.heads, c.ssm.head_dim, c.ssm.state_dim, c.ssm.groups) == (128, 64, 128, 8)
    assert (c.ssm.conv_taps, c.ssm.has_conv_bias, c.ssm.has_proj_bias) == (4, True, False)
    assert c.ssm.time_limits == (0.0, math.inf)
    assert not (c.has_attention_bias or c.has_mlp_bias or c.is_tied)
    assert parse_config(TINY | {"num_key_value_heads": None}).kv_heads == 4


def test_kinds_of_layers() -> None:
    assert parse_config(TINY).layers == (MAMBA, MLP, MAMBA, ATTENTION, MAMBA, MLP)
    assert parse_config(ODD).layers == (MLP, ATTENTION, MAMBA, MLP, ATTENTION)
    later = ["linear_attention", "mlp", "full_attention"]
    named = {"layers_block_type": later, "num_hidden_layers": 3}
    assert parse_config(TINY | named).layers == (MAMBA, MLP, ATTENTION)


def test_other_names_of_fields() -> None:
    older = {
        "mamba_n_groups": 4, "mamba_d_conv": 3, "mamba_dt_limit": [0.1, 2], "mamba_d_state": 8,
        "mamba_conv_bias": False, "attention_head_dim": 32,
    }  # fmt: skip
    usual = ("n_groups", "conv_kernel", "time_step_limit", "use_conv_bias", "head_dim")
    rest = {k: v for k, v in TINY.items() if k not in (*usual, "ssm_state_size")}
    c = parse_config(rest | older)
    assert (c.ssm.groups, c.ssm.conv_taps, c.ssm.state_dim, c.head_dim) == (4, 3, 8, 32)
    assert (c.ssm.time_limits, c.ssm.has_conv_bias) == ((0.1, 2.0), False)


def test_infinity_as_transformers_5_writes_it() -> None:
    limit = [0.0, {"__float__": "Infinity"}]
    assert parse_config(TINY | {"time_step_limit": limit}) == parse_config(TINY)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hybrid_override_pattern": "MEMEM*", "num_hidden_layers": 6}, "has 2 layers of experts"),
        ({"layers_block_type": ["mamba", "moe"]}, "layers_block_type has 1 layers of experts"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern is missing"),
        ({"hybrid_override_pattern": "M-M*M+"}, "hybrid_override_pattern[5] is '+', expected M"),
        ({"hybrid_override_pattern": "M-"}, "is of 2 layers, num_hidden_layers is 6"),
        ({"hybrid_override_pattern": "------"}, "no layer reads other tokens than its own"),
        ({"layers_block_type": "x"}, "layers_block_type[0] is 'x'"),
        ({"layers_block_type": {}}, "layers_block_type is {}, expected names or letters"),
        ({"layers_block_type": ["conv"] * 6}, "layers_block_type[0] is 'conv', expected mamba"),
        ({"mamba_num_groups": 4}, "mamba_num_groups is 4, but n_groups is 2; keep one"),
        ({"mamba_num_heads": 9}, "mamba_num_heads 9 is no multiple of n_groups 2"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'; only 'relu2'"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act is 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window is 4096; only None"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        ({"time_step_limit": [1, 0]}, "time_step_limit is [1, 0], expected two numbers"),
        ({"time_step_limit": [False, 1]}, "time_step_limit is [False, 1], expected two numbers"),
        ({"conv_kernel": 1}, "conv_kernel is 1, expected 2 to 16"),
    ],
)
def test_refusals(change: Config, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(TINY | change)
    assert words in str(caught.value)


def test_of_a_prompt_one_row_goes_on_behind_the_last_state() -> None:
    """Red where an MLP behind the last layer with a state is computed for every row."""
    launches = model_for(TINY, max_positions=128).record("prefill", 64).launches

    def rows(op: Op) -> list[int]:
        return [n.dims["T"] for n in launches if n.op is op]

    assert rows(ops.RELU_SQUARED) == [64, 1]
    assert rows(ops.SILU_RMSNORM) == [64, 64, 1]


@pytest.mark.parametrize("pattern", ["M-M", "*-", "-M*"])
def test_every_region_and_weight_is_used(pattern: str) -> None:
    """Also of models with layers of one kind alone. `logits_before` is the engine's."""
    biases = dict.fromkeys(("use_bias", "mlp_bias", "attention_bias"), True)
    config = TINY | biases | {"hybrid_override_pattern": pattern, "num_hidden_layers": None}
    model = model_for(config, max_positions=64)
    used = {v.region for p in model.phases for n in model.record(*p).launches for v in n.operands}
    regions = {*model.lane_regions, *(rule.region for rule in model.weights)}
    assert {r.name for r in regions - used} == {"logits_before"}
