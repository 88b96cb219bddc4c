"""config.json -> LFM2: defaults, the size of the MLP, kinds of layers, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flashrt.base.errors import CheckpointError
from flashrt.models import model_for
from flashrt.models.lfm2.config import LayerKind, parse_config
from flashrt.models.released import RELEASED
from tests.families import SETS

Config = dict[str, Any]
BASE: Config = json.loads((SETS / "lfm2" / "config.json").read_text())
CONV, FULL = LayerKind.CONV, LayerKind.FULL


def test_silence_means_what_it_means_in_transformers() -> None:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    c = parse_config({"model_type": "lfm2", "num_attention_heads": 8} | {
        n: BASE[n] for n in names if n != "num_attention_heads"})  # fmt: skip
    assert (c.kv_heads, c.head_dim, c.conv_taps, c.eps) == (8, 8, 3, 1e-5)
    assert c.is_tied and not c.has_conv_bias
    assert c.layers == (FULL,) * 4, "without a word on layers, all have attention"
    assert c.intermediate == 8192
    assert c.rotation.inv_freq[1] == pytest.approx(1e6 ** (-2 / 8))


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({"intermediate_size": 100, "block_auto_adjust_ff_dim": False}, 100),
        ({"intermediate_size": 100}, 96),  # 66, then up to a multiple of 32
        ({"intermediate_size": 7, "block_ff_dim": 100}, 96),
        ({"intermediate_size": 100, "block_ffn_dim_multiplier": 1.5}, 128),  # 99
        ({"intermediate_size": 100, "block_ffn_dim_multiplier": None}, 66),  # then not rounded
    ],
)
def test_the_size_of_the_mlp(change: Config, size: int) -> None:
    assert parse_config(BASE | change).intermediate == size


def test_kinds_of_layers() -> None:
    older = {k: v for k, v in BASE.items() if k != "layer_types"}
    assert parse_config(BASE).layers == (CONV, CONV, FULL, CONV)
    assert parse_config(older | {"full_attn_idxs": [0, 3]}).layers == (FULL, CONV, CONV, FULL)
    assert parse_config(BASE | {"full_attn_idxs": [0]}).layers == (CONV, CONV, FULL, CONV)


def test_both_spellings_of_a_tied_head() -> None:
    assert not parse_config(BASE | {"tie_embedding": False, "tie_word_embeddings": True}).is_tied
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        parse_config(BASE | {"tie_embedding": False}, lacks_head=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["conv"] * 3}, "expected a list of num_hidden_layers = 4 names"),
        ({"layer_types": ["mamba"] * 4}, "layer_types[0] is 'mamba', expected conv or"),
        ({"layer_types": None, "full_attn_idxs": [True]}, "expected a list of layer numbers"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1, expected 2 to 16"),
        ({"conv_dim": 32}, "conv_dim is 32; only 64 or None is supported"),
        ({"block_use_swiglu": False}, "block_use_swiglu is False"),
        ({"use_pos_enc": False}, "use_pos_enc is False"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of"),
        ({"hidden_size": 66}, "hidden_size 66 is no multiple of num_attention_heads 4"),
        ({"block_ffn_dim_multiplier": 1024.0, "block_ff_dim": 1 << 18}, "make an MLP of size"),
        ({"intermediate_size": 1}, "make an MLP of size 0"),
        ({"num_experts": 32}, "num_experts is 32"),
    ],
)
def test_refusals(change: Config, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(BASE | change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("lfm2.5-230m", 2560),
        ("lfm2-350m", 4608),
        ("lfm2-700m", 6912),
        ("lfm2-1.2b", 8192),
        ("lfm2-2.6b", 10752),
    ],
)
def test_released_sizes_of_the_mlp(name: str, size: int) -> None:
    assert parse_config(RELEASED[name]).intermediate == size


@pytest.mark.parametrize("kinds", [["conv"] * 4, ["full_attention"] * 4, BASE["layer_types"]])
def test_every_region_and_weight_is_used(kinds: list[str]) -> None:
    """Also of models with layers of one kind alone. `logits_before` is the engine's."""
    model = model_for(BASE | {"layer_types": kinds, "conv_bias": True}, max_positions=64)
    used = {v.region for p in model.phases for n in model.record(*p).launches for v in n.operands}
    regions = {*model.lane_regions, *(rule.region for rule in model.weights)}
    assert {r.name for r in regions - used} == {"logits_before"}
