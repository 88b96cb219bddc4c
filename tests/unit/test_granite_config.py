"""config.json of Granite-4.0-H: what is read, what stands in, what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from flashrt.base.errors import CheckpointError
from flashrt.core.region import DType
from flashrt.models import TokenModel, model_for
from flashrt.models.granite.config import parse_config
from tests.families import SETS

Config = dict[str, Any]
TINY, ODD = (
    json.loads((SETS / name / "config.json").read_text()) for name in ("granite", "granite-odd")
)


def build(config: Config) -> TokenModel:
    return model_for(config, max_positions=256, kv_dtype=DType.BF16)


def without(*names: str) -> Config:
    return {name: value for name, value in ODD.items() if name not in names}


def test_sizes_and_multipliers() -> None:
    c = parse_config(ODD)
    assert (c.ssm.inner, c.ssm.conv_channels, c.ssm.time_limits) == (216, 216 + 2 * 60, (0.02, 1.5))
    assert c.embedding_factor == pytest.approx(2.0 / 0.7)
    assert c.stream_eps == pytest.approx(1e-6 / 0.49)
    assert c.rotation.magnitude**2 / math.sqrt(c.head_dim) == pytest.approx(0.3)
    nope = parse_config(TINY)
    assert nope.rotation.inv_freq == (0.0,) * 8
    assert nope.rotation.magnitude**2 / math.sqrt(16) == pytest.approx(0.11)


def test_norms_of_the_divided_stream_have_its_eps() -> None:
    """Too small to show in logits: red when the norm of a Mamba layer has the stream's, or the
    stream's norms the config's.
    """
    seen: dict[str, set[object]] = {}
    for launch in build(ODD).record("decode", 1).launches:
        if launch.op.name.endswith("rmsnorm"):
            seen.setdefault(launch.op.name, set()).add(launch.attr("eps"))
    stream = {parse_config(ODD).stream_eps}
    assert seen == {"rmsnorm": stream, "add_rmsnorm": stream, "silu_rmsnorm": {1e-6}}


def test_what_stands_in_for_missing_fields() -> None:
    """As transformers' GraniteMoeHybridConfig has it; `layers_block_type` in older files."""
    c = parse_config(without("time_step_limit", "mamba_d_head", "num_key_value_heads"))
    assert (c.ssm.time_limits, c.ssm.head_dim, c.kv_heads) == ((0.0, math.inf), 24, 3)
    older = without("layer_types") | {"layers_block_type": ["mamba", "attention", "mamba"]}
    newer = ODD | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    assert parse_config(older).layers == parse_config(newer).layers
    assert set(parse_config(without("layer_types")).layers) == {"mamba"}


def test_models_of_other_scales_are_not_each_other() -> None:
    """Red when a capsule could move between models that differ in the scale of logits alone."""
    assert build(ODD).identity != build(ODD | {"logits_scaling": 4.0}).identity


BAD: list[tuple[Config, str]] = [
    ({"num_local_experts": 8, "intermediate_size": 96}, "num_experts_per_tok is 0"),
    (
        {"num_local_experts": 3, "num_experts_per_tok": 4, "intermediate_size": 96},
        "num_experts_per_tok 4 is more than the 3 experts",
    ),
    (
        {"num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size": 90},
        "intermediate_size 90 is no multiple of 32",
    ),
    ({"num_local_experts": True}, "num_local_experts is True"),
    ({"layer_types": ["mamba", "moe", "attention"]}, "layer_types[1] is 'moe'"),
    ({"layer_types": ["mamba"]}, "expected a list of num_hidden_layers = 3"),
    ({"mamba_d_head": 20}, "are not mamba_expand * hidden_size = 216"),
    ({"mamba_n_groups": 2}, "mamba_n_heads 9 is no multiple of mamba_n_groups 2"),
    ({"time_step_limit": [1, 0.5]}, "time_step_limit is [1, 0.5], expected two numbers"),
    ({"time_step_limit": [0, "inf"]}, "time_step_limit is [0, 'inf']"),
    ({"residual_multiplier": 0}, "residual_multiplier is 0, expected a positive number"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
    ({"head_dim": 9}, "heads have 9 dims; an even number is needed"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not 1"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_refusals(change: Config, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(ODD | change)
    assert words in str(caught.value)


def test_silence_about_experts_means_eight() -> None:
    moe = ODD | {
        "hidden_size": 96, "mamba_d_head": 32, "intermediate_size": 64, "num_experts_per_tok": 2,
    }  # fmt: skip
    del moe["num_local_experts"]
    experts = parse_config(moe).experts
    assert experts is not None and experts.n == 8
    assert parse_config(ODD).experts is None  # which says 0
