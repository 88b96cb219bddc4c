"""config.json -> dense model: defaults of each model type, windows, rotary scalings, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flashrt.base.errors import CheckpointError
from flashrt.models import model_for, notes_on, promises_draft_head, rope
from flashrt.models.dense.config import DenseConfig, parse_config
from flashrt.models.model import TokenModel
from tests import dense_models
from tests.dense_models import CONFIGS, Config


def build(config: Config, max_positions: int = 300) -> TokenModel:
    return model_for(config, max_positions=max_positions)


def without(name: str, *fields: str) -> Config:
    return {k: v for k, v in CONFIGS[name].items() if k not in fields}


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_are_those_that_the_model_type_has(name: str) -> None:
    """Red when a bias or a norm is of another model type."""
    config = CONFIGS[name]
    sources = {s.name: s.shape for rule in build(config).weights for s in rule.sources}
    assert sources == dense_models.shapes(config)


def defaults(model_type: str) -> DenseConfig:
    """Of a config that says what it must."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = {n: CONFIGS["llama"][n] for n in names}
    return parse_config(
        config | {"model_type": model_type, "num_attention_heads": 32, "hidden_size": 128}
    )


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "head_dim", "theta", "is_tied"),
    [("llama", 32, 4, 1e4, False), ("mistral", 8, 4, 1e4, False), ("qwen2", 32, 4, 1e4, False),
     ("qwen3", 32, 128, 1e4, False), ("smollm3", 4, 4, 2e6, True)],
)  # fmt: skip
def test_silence_means_what_it_means_in_transformers(
    model_type: str, kv_heads: int, head_dim: int, theta: float, is_tied: bool
) -> None:
    c = defaults(model_type)
    assert (c.kv_heads, c.head_dim, c.is_tied) == (kv_heads, head_dim, is_tied)
    assert c.rotation == rope.Rotation(tuple(map(float, rope.plain(theta, head_dim))))
    assert c.eps == 1e-6
    assert c.turned == ((True, True, True) if model_type != "smollm3" else (True,) * 3)


def test_layers_without_rotary_positions() -> None:
    """Red when 0 and 1 change places, or the interval counts from 0."""
    config = CONFIGS["smollm3"]
    assert parse_config(config).turned == (True, False, True, False)
    every = without("smollm3", "no_rope_layers") | {"num_hidden_layers": 5}
    assert parse_config(every).turned == (True, True, True, False, True)
    assert parse_config(every | {"no_rope_layer_interval": 2}).turned == (True, False) * 2 + (True,)
    launches = build(config).record("decode", 1).launches
    turns = [n.operand("inv_freq").region.name for n in launches if n.op.name == "rope_append"]
    assert turns == ["inv_freq", "no_rope"] * 2


def test_null_means_as_many_key_heads_as_query_heads() -> None:
    assert parse_config(CONFIGS["mistral"] | {"num_key_value_heads": None}).kv_heads == 4
    assert parse_config(without("mistral", "num_key_value_heads") | {
        "num_attention_heads": 8}).kv_heads == 8  # fmt: skip


WINDOWS = [  # model type, change, positions up to which it runs; None: any
    ("mistral", {"sliding_window": 64}, 64),
    ("mistral", {"sliding_window": None}, None),
    ("qwen2", {"sliding_window": 64}, None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, None),  # from layer 28 on
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}, 64),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, None),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64,
               "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, 64),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 64}, 64),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 64,
                 "layer_types": ["full_attention"] * 4}, None),
    ("llama", {"layer_types": ["full_attention"] * 3}, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "most"), WINDOWS)
def test_a_window_that_hides_keys_is_refused(name: str, change: Config, most: int | None) -> None:
    """Red when an active window is ignored, or one that changes nothing is refused."""
    config = CONFIGS[name] | change
    build(config, most or 4096)
    if most is not None:
        with pytest.raises(CheckpointError, match="load with max_positions up to 64"):
            build(config, most + 1)


def test_mistral_without_a_word_has_a_window_of_4096() -> None:
    config = without("mistral", "sliding_window") | {"max_position_embeddings": 1 << 17}
    build(config, 4096)
    with pytest.raises(CheckpointError, match=r"sliding_window is 4,096"):
        build(config, 4097)


BAD: list[tuple[str, Config, str]] = [
    ("llama", {"mlp_bias": True}, "mlp_bias is True; only False or None is supported"),
    ("llama", {"num_local_experts": 8}, "num_local_experts is 8"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes', expected true or false"),
    ("llama", {"hidden_size": 65}, "hidden_size 65 is no multiple of num_attention_heads 4"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of"),
    ("llama", {"layer_types": ["sliding_attention"] * 3}, "layer_types[0] is 'sliding_attention'"),
    ("llama", {"attn_output_gate": True}, "attn_output_gate is True"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor is missing"),
    ("mistral", {"attention_bias": True}, "attention_bias is True"),
    ("mistral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ("mistral", {"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'"),
    ("mistral", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": -1}, "sliding_window is -1"),
    ("qwen3", {"use_sliding_window": 1}, "use_sliding_window is 1, expected true or false"),
    ("qwen3", {"head_dim": 33}, "turns 33 dims, expected an even number"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0], expected a list"),
    ("smollm3", {"no_rope_layers": [2] * 4}, "each 1 (rotary positions) or 0 (none)"),
    ("smollm3", {"layer_types": "full"}, "layer_types is 'full', expected a list"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), BAD, ids=[words[:40] for *_, words in BAD])
def test_refusals(name: str, change: Config, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(CONFIGS[name] | change)
    assert words in str(caught.value)


def test_dynamic_scaling_runs_within_the_trained_positions() -> None:
    """Red when frequencies that change with the text are taken for fixed ones."""
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    config = CONFIGS["mistral"] | scaling
    assert parse_config(config, None, 4096).rotation == parse_config(CONFIGS["mistral"]).rotation
    with pytest.raises(CheckpointError, match=r"load with max_positions up to 4,096"):
        build(config, 4097)


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_those_of_the_formulas(name: str) -> None:
    wanted, magnitude = dense_models.frequencies(CONFIGS[name])
    found = parse_config(CONFIGS[name]).rotation
    np.testing.assert_allclose(found.inv_freq, wanted, rtol=1e-6)
    assert found.magnitude == pytest.approx(magnitude)


def test_yarn_takes_its_magnitude_from_the_config() -> None:
    def magnitude(**own: object) -> float:
        scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
        return parse_config(CONFIGS["mistral"] | {"rope_scaling": scaling | own}).rotation.magnitude

    assert magnitude(attention_factor=1.5) == 1.5
    assert magnitude() == pytest.approx(0.1 * math.log(8) + 1)
    ratio = (0.05 * math.log(8) + 1) / (0.1 * math.log(8) + 1)
    assert magnitude(mscale=0.5, mscale_all_dim=1.0) == pytest.approx(ratio)
    assert magnitude(mscale=0.5) == magnitude()  # transformers wants both


def test_what_says_how_long_texts_may_be() -> None:
    """Red when a config that adds yarn is said to be good for the unscaled length only."""
    assert notes_on(CONFIGS["mistral"], 4096) == ()
    assert "beyond the 4,096" in notes_on(CONFIGS["mistral"], 4097)[0]
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    scaled = CONFIGS["mistral"] | {"rope_scaling": scaling}
    assert notes_on(scaled, 16384) == ()
    assert "beyond the 16,384" in notes_on(scaled, 16385)[0]


def test_no_model_of_the_family_has_a_draft_head() -> None:
    config = CONFIGS["qwen3"] | {"mtp_num_hidden_layers": 1}
    assert not promises_draft_head(config)
    with pytest.raises(CheckpointError, match=r"no draft head; load without: draft=False"):
        model_for(config, max_positions=8, has_draft_head=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_region_and_weight_is_used(name: str) -> None:
    model = build(CONFIGS[name])
    used = {v.region for p in model.phases for n in model.record(*p).launches for v in n.operands}
    known = {r for r in model.lane_regions if r.name != "logits_before"}  # the engine copies there
    assert {*known, *(rule.region for rule in model.weights)} <= used


def test_a_silent_smollm3_is_tied_and_a_silent_llama_is_not() -> None:
    """Red when a config that transformers wrote without the default is refused."""
    silent = without("smollm3", "tie_word_embeddings")
    assert parse_config(silent, lacks_head=True).is_tied
    with pytest.raises(CheckpointError, match=r"the head is lm_head\.weight"):
        parse_config(without("llama", "tie_word_embeddings"), lacks_head=True)
