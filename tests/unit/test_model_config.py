"""config.json -> model: fall-backs, every refusal, regions and tapes of unusual shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from flashrt.base.errors import CheckpointError, PlanError
from flashrt.core.region import DType, Role
from flashrt.core.runs import RUNS
from flashrt.models import Model, model_for, notes_on
from flashrt.models.qwen35.config import LayerKind, parse_config
from flashrt.models.qwen35.model import Qwen35

GOLDEN = Path(__file__).parents[1] / "golden"
LINEAR, FULL = LayerKind.LINEAR, LayerKind.FULL


@pytest.fixture
def config() -> dict[str, object]:
    return json.loads((GOLDEN / "tiny" / "config.json").read_text())


def build(config: dict[str, object]) -> Model:
    return model_for(config, max_positions=300)


def test_nested_config_and_fall_backs(config: dict[str, object]) -> None:
    flat = parse_config(config)
    assert parse_config({"model_type": "qwen3_5", "text_config": config}) == flat
    rope = config.pop("rope_parameters")
    del config["layer_types"], config["rms_norm_eps"]
    config |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": 0.25}
    assert parse_config(config) == flat


def test_layer_list_wins_over_the_interval(config: dict[str, object]) -> None:
    config |= {"layer_types": [FULL.value] * 4, "full_attention_interval": 2}
    assert parse_config(config).layers == (FULL,) * 4
    del config["layer_types"]
    assert parse_config(config).layers == (LINEAR, FULL, LINEAR, FULL)


def test_inverse_frequencies(config: dict[str, object]) -> None:
    frequencies = parse_config(config).rotation.inv_freq
    assert len(frequencies) == 4  # 32 * 0.25 dims in pairs
    assert frequencies == pytest.approx([1e7 ** (-j / 4) for j in range(4)], rel=1e-7)


@pytest.mark.parametrize(
    ("outer", "inner", "given", "tied"),
    [(True, None, None, True), (True, False, None, False), (False, True, None, True),
     (None, None, None, False), (True, True, False, False), (False, True, True, True),
     (True, None, True, True)],
)  # fmt: skip
def test_tied_embeddings(
    config: dict[str, object],
    outer: bool | None,
    inner: bool | None,
    given: bool | None,
    tied: bool,
) -> None:
    del config["tie_word_embeddings"]
    if inner is not None:
        config["tie_word_embeddings"] = inner
    nested: dict[str, object] = {"model_type": "qwen3_5", "text_config": config}
    if outer is not None:
        nested["tie_word_embeddings"] = outer
    assert parse_config(nested, given).is_tied is tied


BAD = [
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": 2**40}, "vocab_size is"),
    ({"head_dim": 32.0}, "head_dim is 32.0"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"linear_num_value_heads": 3}, "linear_num_value_heads 3 is no multiple of"),
    ({"num_attention_heads": 3}, "num_attention_heads 3 is no multiple of"),
    ({"attention_bias": True}, "attention_bias is True; only False or None is supported"),
    ({"attention_bias": "no"}, "attention_bias is 'no'"),
    ({"attn_output_gate": False}, "attn_output_gate is False"),
    ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid'"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"is_causal": False}, "is_causal is False"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"num_experts": 256}, "num_experts is 256"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"vocab_size": 7}, "vocab_size is 7, expected 8 to 1,048,576"),
    ({"vocab_size": 20_000_000}, "vocab_size is 20000000, expected 8 to 1,048,576"),
    ({"head_dim": 2**30}, "head_dim is 1073741824, expected 1 to 1,024"),
    ({"hidden_size": 10**5000}, "hidden_size is an integer of 16,610 bits"),
    ({"max_position_embeddings": "long"}, "max_position_embeddings is 'long'"),
    ({"layer_types": ["mamba"] * 4}, "layer_types[3] is 'mamba'"),
    ({"layer_types": [{}] * 4}, "layer_types[0] is {}"),
    ({"layer_types": ["full_attention"]}, "expected a list of num_hidden_layers = 4"),
    ({"layer_types": "full_attention"}, "expected a list"),
    ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "turns 3 dims, expected an even number"),
    (
        {"rope_parameters": {"partial_rotary_factor": 2.0}},
        "partial_rotary_factor is 2.0, expected a positive number from 0 to 1",
    ),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'"),
    ({"rope_parameters": {"rope_theta": 0.5}}, "rope_theta is 0.5"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_type is 'longrope'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs by layer"),
    ({"rope_parameters": [1]}, "rope_parameters is [1]"),
    ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.rope_type is 'su'"),
    ({"rope_scaling": {"rope_theta": 1e4}}, "rope_theta is 10000000.0, but rope_scaling takes"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words[:48] for _, words in BAD])
def test_refusals(config: dict[str, object], change: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(config | change)
    assert words in str(caught.value)


HARMLESS = [
    {"hidden_act": "swish"},
    {"output_gate_type": "swish"},  # of Qwen3.6: another name of silu
    {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "use_sliding_window": False},
    {"rope_parameters": None, "rope_scaling": {"type": "mrope"}, "rope_theta": 1e7},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}},
    {"sliding_window": 4096, "attention_dropout": 0.1, "initializer_range": 1.0},
    {"mtp_num_hidden_layers": 2},  # matters only where the draft head is run
]


@pytest.mark.parametrize("change", HARMLESS, ids=[",".join(c) for c in HARMLESS])
def test_settings_that_change_nothing(config: dict[str, object], change: dict[str, object]) -> None:
    assert parse_config(config | change) == parse_config(config)


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope", "llama3"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_scaled_positions_beside_the_text_are_refused(
    config: dict[str, object], kind: str, place: str
) -> None:
    """Red when an outer level is not read: transformers ignores it, other programs apply it."""
    nested = {"model_type": "qwen3_5", "text_config": config}
    with pytest.raises(CheckpointError, match=f"rope_type is '{kind}'") as caught:
        build(nested | {place: {"rope_type": kind, "factor": 4.0}})
    assert "remove it" in str(caught.value)


def test_yarn_slows_the_long_waves_of_the_text(config: dict[str, object]) -> None:
    """Red when scaled positions are read and not applied."""
    rope = config["rope_parameters"]
    assert isinstance(rope, dict)
    scaled = rope | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384}
    plain, yarn = (parse_config(config | {"rope_parameters": r}).rotation for r in (rope, scaled))
    assert yarn.inv_freq[0] == plain.inv_freq[0]
    assert yarn.inv_freq[-1] == pytest.approx(plain.inv_freq[-1] / 4)
    assert yarn.magnitude == pytest.approx(0.1 * math.log(4.0) + 1)
    launches = build(config | {"rope_parameters": scaled}).record("prefill", 8).launches
    turns = [n.attr("magnitude") for n in launches if n.op.name == "rope_append"]
    assert set(turns) == {yarn.magnitude}


@pytest.mark.parametrize("said", [False, None])
def test_a_head_that_is_nowhere_is_not_tied_in_silence(
    config: dict[str, object], said: bool | None
) -> None:
    """Red when a missing lm_head.weight decides over `tie_word_embeddings`."""
    config["tie_word_embeddings"] = said
    with pytest.raises(CheckpointError, match=r"the head is lm_head\.weight, which the weight"):
        parse_config(config, lacks_head=True)
    assert not parse_config(config, lacks_head=False).is_tied


def test_a_draft_head_of_two_layers_names_both_ways_out(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError) as caught:
        model_for(config | {"mtp_num_hidden_layers": 2}, max_positions=8, has_draft_head=True)
    for words in ("mtp_num_hidden_layers is 2", "draft=False", "--no-draft"):
        assert words in str(caught.value)


def test_positions_beyond_those_of_training_are_noted(config: dict[str, object]) -> None:
    nested = {"model_type": "qwen3_5", "text_config": config}
    for given in (config, nested):
        assert notes_on(given, 32768) == ()
        (note,) = notes_on(given, 32769)
        assert "beyond the 32,768 of max_position_embeddings" in note


def test_one_error_lists_all_problems(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError) as caught:
        build(config | {"hidden_size": None, "hidden_act": "gelu", "num_attention_heads": 3})
    for words in ("hidden_size", "hidden_act", "num_attention_heads"):
        assert words in str(caught.value)


def test_many_problems_are_counted(config: dict[str, object]) -> None:
    """Red when a list in a message is not cut."""
    with pytest.raises(CheckpointError) as caught:
        build(config | {"num_hidden_layers": 300, "layer_types": ["mamba"] * 300})
    assert len(str(caught.value).splitlines()) == 10
    assert "and 292 more" in str(caught.value)


@pytest.mark.parametrize("nested", [None, [], "text"])
def test_nested_config_without_text(nested: object) -> None:
    with pytest.raises(CheckpointError, match="text_config is missing or not an object"):
        build({"model_type": "qwen3_5", "text_config": nested})


@pytest.mark.parametrize("model_type", [None, "gpt2", "qwen3_moe", ["qwen3_5"]])
def test_unknown_architecture(config: dict[str, object], model_type: object) -> None:
    with pytest.raises(CheckpointError, match="supported: qwen3_5_text, qwen3_5") as caught:
        build(config | {"model_type": model_type})
    assert repr(model_type) in str(caught.value)


# ---- regions and tapes ----


@pytest.mark.parametrize("kinds", [[LINEAR], [FULL], [FULL, LINEAR], [LINEAR, FULL, FULL]])
@pytest.mark.parametrize("has_draft_head", [False, True])
def test_any_mix_of_layers_records(
    config: dict[str, object], kinds: list[LayerKind], has_draft_head: bool
) -> None:
    config |= {"layer_types": [k.value for k in kinds], "num_hidden_layers": len(kinds)}
    model = model_for(config, max_positions=300, has_draft_head=has_draft_head)
    names = {r.name for r in model.lane_regions}
    assert ("state" in names) == ("window" in names) == (LINEAR in kinds)
    assert ("keys" in names) == ("values" in names) == (FULL in kinds)
    assert any(rule.region.name.startswith("draft.") for rule in model.weights) == has_draft_head
    for phase, rows in (*model.phases, *model.shared_phases(16)):
        tape = model.record(phase, rows)
        used = {view.region for launch in tape.launches for view in launch.operands} - {RUNS}
        known = {*model.lane_regions, *(rule.region for rule in model.weights), *tape.lifetimes()}
        assert used <= known
        assert (tape.phase, tape.rows) == (phase, rows)


@pytest.mark.parametrize("has_draft_head", [False, True])
def test_every_region_and_weight_is_used(config: dict[str, object], has_draft_head: bool) -> None:
    model = model_for(config, max_positions=300, has_draft_head=has_draft_head)
    used = {v.region for p in model.phases for n in model.record(*p).launches for v in n.operands}
    known = {r for r in model.lane_regions if r.name != "logits_before"}  # the engine copies there
    assert {*known, *(rule.region for rule in model.weights)} <= used


def test_tied_head_shares_the_embedding(config: dict[str, object]) -> None:
    def head(is_tied: bool) -> str:
        model = model_for(config, max_positions=300, is_tied=is_tied)
        return model.record("sample", 1).launches[0].operand("w").region.name

    assert (head(True), head(False)) == ("embed", "head")


def test_attention_partials_follow_the_bucket(config: dict[str, object]) -> None:
    model = model_for(config, max_positions=300, has_draft_head=True)
    for rows, spread in ((1, 1), (8, 8), (64, 1), (256, 1)):
        launch = next(n for n in model.record("prefill", rows).launches if n.op.name == "attention")
        assert launch.operand("partials").shape == (spread, 4, 2, 34)  # 300 positions: 2 blocks


def test_decode_reads_the_sampled_token_and_prefill_has_no_head(config: dict[str, object]) -> None:
    model = build(config)
    embed = model.record("decode", 1).launches[0].operand("tokens")
    assert (embed.region.name, embed.col, embed.shape) == ("cursor", 2, (1,))
    names = [n.op.name for n in model.record("prefill", 8).launches]
    assert "sample" not in names and names[-1] == "advance"


@pytest.mark.parametrize("kind", [LINEAR, FULL])
def test_prefill_ends_in_one_row_unless_a_draft_head_wants_all(
    config: dict[str, object], kind: LayerKind
) -> None:
    config["layer_types"] = [FULL.value, LINEAR.value, FULL.value, kind.value]
    updates = {LINEAR: "delta_rule", FULL: "rope_append"}[kind]
    for has_draft_head in (False, True):
        model = model_for(config, max_positions=300, has_draft_head=has_draft_head)
        launches = model.record("prefill", 64).launches
        state = [n.dims["T"] for n in launches if n.op.name == updates]
        mlps = [n.dims["T"] for n in launches if n.op.name == "silu_mul"]
        assert set(state) == {64} and mlps == [64, 64, 64, 64 if has_draft_head else 1]
        assert ("last_cursor" in {n.op.name for n in launches}) is not has_draft_head


def test_only_what_decides_the_next_logits_is_digested(config: dict[str, object]) -> None:
    for has_draft_head in (False, True):
        regions = model_for(config, max_positions=300, has_draft_head=has_draft_head).lane_regions
        digested = {r.name for r in regions if r.is_digested}
        head = {"draft_keys", "draft_values"} if has_draft_head else set()
        assert digested == {"state", "window", "last_hidden", "journal", "keys", "values"} | head
        lasting = {r.name for r in regions if r.role in (Role.FIXED, Role.ROWS)}
        assert lasting - digested == {"cursor", "sampler", "bias", "mask"}


def test_arguments_are_checked(config: dict[str, object]) -> None:
    parsed = parse_config(config)
    with pytest.raises(PlanError, match="max_positions"):
        Qwen35(parsed, max_positions=0, kv_dtype=DType.BF16, has_draft_head=False)
    with pytest.raises(PlanError, match="kv_dtype is uint8"):
        Qwen35(parsed, max_positions=8, kv_dtype=DType.U8, has_draft_head=False)
    with pytest.raises(PlanError, match="no phase 'prefill' of 7 rows"):
        build(config).record("prefill", 7)
