"""GGUF files, written by ggml's own package: headers, hostile ones too, and the original's tensors.

The golden checkpoint is written as llama.cpp's converter does, by the few lines here, and must come
back as it was.
"""

from __future__ import annotations

import gc
import json
import os
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import flashrt
from flashrt.base.errors import CheckpointError
from flashrt.base.tensor_file import write_tensors
from flashrt.models.qwen35.config import parse_config
from flashrt.models.qwen35.weights import weight_rules
from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.gguf.checkpoint import GgufCheckpoint, open_gguf
from flashrt.weights.gguf.file import TYPES, read_gguf, read_metadata
from flashrt.weights.loader import check_sources
from flashrt.weights.rules import as_stored

GOLDEN = Path(__file__).parents[1] / "golden"
Array = NDArray[Any]
Kind = gguf.GGMLQuantizationType


def values_of(checkpoint: Checkpoint, name: str) -> Array:
    """A tensor in float32, as a model that holds w, not 1 + w, would have it."""
    matrix = checkpoint.matrix(name)
    if matrix is not None:
        rows = matrix.read(0, matrix.shape[0], checkpoint.read_into)
        return dequantise(matrix.dtype, matrix.groups, rows)
    array = checkpoint.array(name)
    assert array is not None
    values = array.read(checkpoint.read_into)
    return values - 1 if array.is_final else values


def write(
    path: Path,
    architecture: str,
    keys: Mapping[str, object],
    tensors: Mapping[str, Array | tuple[Array, Kind]],
    split: int = 0,
) -> Path:
    """A file by ggml's writer. Keys without a dot are the architecture's, `__` for a dot."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    for key, value in keys.items():
        name = key if "." in key else f"{architecture}.{key.replace('__', '.')}"
        match value:
            case int() if name == "general.alignment":
                writer.add_custom_alignment(value)
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                assert isinstance(value, list)
                writer.add_array(name, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            raw = gguf.quants.quantize(tensor[0], tensor[1])
            writer.add_tensor(name, raw, raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# -- qwen35: there and back -----------------------------------------------------------------------


def converted(original: Checkpoint) -> tuple[dict[str, object], dict[str, Array]]:
    """Metadata and tensors as llama.cpp's converter writes them, in float16 and float32."""
    outer = original.config
    c: Any = outer.get("text_config", outer)
    key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    width, n_layers = c["linear_value_head_dim"], c["num_hidden_layers"]
    rope = c["rope_parameters"]
    keys: dict[str, object] = {
        "block_count": n_layers + 1,
        "nextn_predict_layers": 1,
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        **_sizes_of_mlps(c),
        "attention__head_count": c["num_attention_heads"],
        "attention__head_count_kv": c["num_key_value_heads"],
        "attention__key_length": c["head_dim"],
        "attention__value_length": c["head_dim"],
        "attention__layer_norm_rms_epsilon": c["rms_norm_eps"],
        "rope__dimension_count": int(c["head_dim"] * rope["partial_rotary_factor"]),
        "rope__dimension_sections": [*rope.get("mrope_section", [2, 1, 1]), 0],
        "rope__freq_base": float(rope["rope_theta"]),
        "full_attention_interval": c["full_attention_interval"],
        "ssm__conv_kernel": c["linear_conv_kernel_dim"],
        "ssm__state_size": c["linear_key_head_dim"],
        "ssm__group_count": key_heads,
        "ssm__time_step_rank": value_heads,
        "ssm__inner_size": width * value_heads,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": 0xFFFFFFFF,  # none
        "general.alignment": 64,
    }

    def tiled(a: Array, axis: int, size: int) -> Array:
        shape = (*a.shape[:axis], key_heads, value_heads // key_heads, size, *a.shape[axis + 1 :])
        return a.reshape(shape).swapaxes(axis, axis + 1).reshape(a.shape)

    def rearranged(part: str, a: Array) -> Array:
        before = 2 * key_heads * c["linear_key_head_dim"]
        match part:
            case "in_proj_qkv.weight":
                return np.concatenate([a[:before], tiled(a[before:], 0, width)])
            case "conv1d.weight":
                a = a[:, 0]
                return np.concatenate([a[:before], tiled(a[before:], 0, width)])
            case "in_proj_z.weight":
                return tiled(a, 0, width)
            case "out_proj.weight":
                return tiled(a, 1, width)
            case "A_log":
                return -np.exp(tiled(a, 0, 1))
            case "norm.weight":
                return a
        return tiled(a, 0, 1)

    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "linear_attn.in_proj_qkv": "attn_qkv",
        "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha",
        "linear_attn.in_proj_b": "ssm_beta", "linear_attn.conv1d": "ssm_conv1d",
        "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
        "mlp.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
        **{f"mlp.shared_expert.{n}_proj": f"ffn_{n}_shexp" for n in ("gate", "up", "down")},
        **{f"mlp.experts.{n}_proj": f"ffn_{n}_exps" for n in ("gate", "up", "down")},
    }  # fmt: skip
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight", "mtp.fc.weight": f"blk.{n_layers}.nextn.eh_proj.weight",
        "mtp.pre_fc_norm_embedding.weight": f"blk.{n_layers}.nextn.enorm.weight",
        "mtp.pre_fc_norm_hidden.weight": f"blk.{n_layers}.nextn.hnorm.weight",
        "mtp.norm.weight": f"blk.{n_layers}.nextn.shared_head_norm.weight",
    }  # fmt: skip
    tensors = {}
    for own in original.tensors:
        name, values = own, values_of(original, own)
        if ".experts." in own:  # all of a layer in one tensor
            before, part = own.split(".experts.")[0], own.split(".")[-2]
            each = [f"{before}.experts.{i}.{part}.weight" for i in range(c["num_experts"])]
            name = f"{before}.experts.{part}.weight"
            values = np.stack([values_of(original, n) for n in each])
        if ".linear_attn." in name:
            values = rearranged(name.rpartition(".linear_attn.")[2], values)
        elif "norm" in name:
            values = 1 + values
        if name in fixed:
            stored = fixed[name]
        else:
            layer, _, part = name.partition("layers.")[2].partition(".")
            block = n_layers if name.startswith("mtp.") else int(layer)
            ends = {"linear_attn.A_log": "ssm_a", "linear_attn.dt_bias": "ssm_dt.bias"}
            stem = ends.get(part) or parts[part.removesuffix(".weight")] + ".weight"
            stored = f"blk.{block}.{stem}"
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        is_matrix = values.ndim > 1 and "conv1d" not in stored and "_inp" not in stored
        tensors[stored] = values.astype(np.float16 if is_matrix else np.float32)
    return keys, tensors


def _sizes_of_mlps(c: Mapping[str, Any]) -> dict[str, object]:
    if "num_experts" not in c:
        return {"feed_forward_length": c["intermediate_size"]}
    return {
        "expert_count": c["num_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_feed_forward_length": c["shared_expert_intermediate_size"],
    }


def three_to_one(folder: Path) -> Checkpoint:
    """A random checkpoint with 3 value heads for each of 2 key heads: unlike 2 for each of 2, their
    order and the way back differ.
    """
    config = json.loads((GOLDEN / "tiny" / "config.json").read_text())
    config["linear_num_value_heads"] = 6
    rules = weight_rules(parse_config(config, True, True), has_draft_head=True)
    rng = np.random.default_rng(0)
    folder.mkdir()
    write_tensors(
        folder / "model.safetensors",
        {s.name: rng.normal(size=s.shape).astype(np.float32) for r in rules for s in r.sources},
        {},
    )
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.mark.parametrize("golden", ["tiny", "tiny-untied-odd", None])
def test_a_checkpoint_comes_back(golden: str | None, tmp_path: Path) -> None:
    """Red if a head is in another place, a norm has 1 twice, or a name or field is another one."""
    original = open_checkpoint(GOLDEN / golden) if golden else three_to_one(tmp_path / "random")
    keys, tensors = converted(original)
    made = open_gguf(write(tmp_path / "m.gguf", "qwen35", keys, tensors))
    assert made.tensors.keys() == original.tensors.keys()
    assert made.stop_tokens == (7,)
    for name in original.tensors:
        expected, got = values_of(original, name), values_of(made, name)
        assert got.shape == expected.shape
        if made.matrix(name) is not None:
            assert (got == expected.astype(np.float16)).all(), name
        else:  # 1 + w and exp(A_log) were rounded
            assert np.allclose(got, expected, rtol=1e-6, atol=1e-6), name
    lacks_head = "lm_head.weight" not in made.tensors
    config = parse_config(made.config, lacks_head, has_draft_head=True)
    assert config == parse_config(original.config, lacks_head, has_draft_head=True)
    check_sources(weight_rules(config, has_draft_head=True), made)


def test_experts_come_back(tmp_path: Path) -> None:
    """Red if an expert is another's, or a router or a shared expert goes by another name; value
    heads are in another order here too.
    """
    original = open_checkpoint(GOLDEN / "families" / "qwen3-5-moe")
    keys, tensors = converted(original)
    packed = {
        name: (t.astype(np.float32), Kind.Q4_0) if "_exps." in name else t
        for name, t in tensors.items()
    }
    made = open_gguf(write(tmp_path / "m.gguf", "qwen35moe", keys, packed))
    assert made.tensors.keys() == original.tensors.keys()
    for name in original.tensors:
        expected, got = values_of(original, name), values_of(made, name)
        if ".experts." in name:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, Kind.Q4_0), Kind.Q4_0)
            assert (got == expected).all(), name
        else:
            assert np.allclose(got, expected, rtol=1e-3, atol=1e-6), name
    config = parse_config(made.config, False, has_draft_head=True)
    assert config == parse_config(original.config, False, has_draft_head=True)
    check_sources(as_stored(weight_rules(config, has_draft_head=True), made.stored), made)
    with pytest.raises(CheckpointError, match="expert_weights_scale is 2"):
        open_gguf(
            write(tmp_path / "n.gguf", "qwen35moe", keys | {"expert_weights_scale": 2.5}, packed)
        )


def test_quantised_heads_come_back(tmp_path: Path) -> None:
    """Red if a code and its scale part where the columns of ssm_out are put in order."""
    original = open_checkpoint(GOLDEN / "tiny")
    keys, tensors = converted(original)
    packed = {
        name: (t.astype(np.float32), Kind.Q8_0) if t.dtype == np.float16 else t
        for name, t in tensors.items()
    }
    made = open_gguf(write(tmp_path / "m.gguf", "qwen35", keys, packed))
    plain = open_gguf(write(tmp_path / "p.gguf", "qwen35", keys, tensors))
    for name in original.tensors:
        expected = values_of(plain, name)
        assert np.abs(values_of(made, name) - expected).max() <= np.abs(expected).max() / 200


# -- the llama family -----------------------------------------------------------------------------

LLAMA: dict[str, object] = {
    "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
    "attention__head_count": 4, "attention__head_count_kv": 2,
    "attention__layer_norm_rms_epsilon": 1e-5, "rope__freq_base": 500000.0,
}  # fmt: skip
HEADS = {"q": 4, "k": 2, "v": 2}


def llama_tensors(has_bias: bool = False) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (50, 32), "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,), "blk.0.ffn_norm.weight": (32,),
        **{f"blk.0.attn_{k}.weight": (8 * n, 32) for k, n in HEADS.items()},
        "blk.0.attn_output.weight": (32, 32), "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32), "blk.0.ffn_down.weight": (32, 64),
    }  # fmt: skip
    if has_bias:
        shapes |= {f"blk.0.attn_{k}.bias": (8 * n,) for k, n in HEADS.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def opened_llama(
    tmp_path: Path, architecture: str = "llama", has_bias: bool = False, **keys: object
) -> GgufCheckpoint:
    return open_gguf(
        write(tmp_path / "m.gguf", architecture, LLAMA | keys, llama_tensors(has_bias))
    )


@pytest.mark.parametrize("architecture", ["llama", "smollm3", "qwen2", "qwen3"])
def test_pairs_of_q_and_k(architecture: str, tmp_path: Path) -> None:
    """Red if rows or biases of q and k stay in pairs, v is touched, or qwen's are."""
    made, stored = opened_llama(tmp_path, architecture, has_bias=True), llama_tensors(True)
    for part, heads in HEADS.items():
        for kind in ("weight", "bias"):
            a = stored[f"blk.0.attn_{part}.{kind}"]
            if architecture in ("llama", "smollm3") and part != "v":
                a = a.reshape(heads, 4, 2, -1).swapaxes(1, 2).reshape(a.shape)
            got = values_of(made, f"model.layers.0.self_attn.{part}_proj.{kind}")
            assert (got == a).all(), (part, kind)


def test_the_words_of_config_json(tmp_path: Path) -> None:
    """Red if a field is read from another key, or a float32 shows as 9.99e-06."""
    made = opened_llama(tmp_path, **{"tokenizer.ggml.eos_token_id": 3})
    assert made.config == {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False,
        "mlp_bias": False,
    }  # fmt: skip
    assert made.stop_tokens == (3,)


def test_scaled_positions(tmp_path: Path) -> None:
    """Red if yarn, linear scaling, a window or a layer without rope is lost."""
    yarn = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
    }  # fmt: skip
    made = opened_llama(tmp_path, "qwen3", **{f"qwen3.{k}": v for k, v in yarn.items()})
    assert made.config["rope_scaling"] == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    made = opened_llama(tmp_path, **linear)
    assert made.config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    made = opened_llama(tmp_path, attention__sliding_window=16)
    assert (made.config["model_type"], made.config["sliding_window"]) == ("mistral", 16)
    made = opened_llama(tmp_path, "smollm3")
    assert (made.config["no_rope_layer_interval"], made.config["no_rope_layers"]) == (4, [1])


def llama3_factors(theta: float, dims: int, factor: float) -> Array:
    """As llama.cpp's converter computes them."""
    made = []
    for frequency in 1 / theta ** (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)):
        wave = 2 * np.pi / frequency
        smooth = (8192 / wave - 1) / (4 - 1)
        is_mixed = 8192 / 4 <= wave <= 8192
        mixed = 1 / ((1 - smooth) / factor + smooth)
        made.append(mixed if is_mixed else factor if wave > 8192 else 1.0)
    return np.array(made, np.float32)


def test_llama3_is_known_by_its_factors(tmp_path: Path) -> None:
    """Red if positions of Llama 3.1 stay unscaled, or other factors are taken for its."""
    keys = LLAMA | {"attention__key_length": 64, "attention__value_length": 64}
    tensors = llama_tensors()
    for part, heads in HEADS.items():
        tensors[f"blk.0.attn_{part}.weight"] = np.ones((64 * heads, 32), np.float32)
    tensors["blk.0.attn_output.weight"] = np.ones((32, 256), np.float32)
    tensors["rope_freqs.weight"] = llama3_factors(500000.0, 64, 32.0)
    made = open_gguf(write(tmp_path / "m.gguf", "llama", keys, tensors))
    assert made.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs.weight" not in made.tensors
    tensors["rope_freqs.weight"] = own = np.linspace(1, 2, 32, dtype=np.float32)
    made = open_gguf(write(tmp_path / "m.gguf", "llama", keys, tensors))
    assert made.config["rope_scaling"] == {"rope_type": "factors", "factors": own.tolist()}


def test_what_is_refused_by_name(tmp_path: Path) -> None:
    """Red if a key, a tensor, a block type or an architecture that is not known is passed over."""
    path = tmp_path / "m.gguf"

    def refused(architecture: str, keys: Mapping[str, object], **more: Any) -> str:
        tensors = llama_tensors() | more
        with pytest.raises(CheckpointError) as caught:
            open_gguf(write(path, architecture, keys, tensors))
        text = str(caught.value)
        assert str(path) in text and len(text) < 2000
        return text

    assert "'mamba'" in refused("mamba", {})
    assert "vision part" in refused("clip", {})
    assert "llama.expert_count is 8" in refused("llama", LLAMA | {"expert_count": 8})
    assert "llama.logit_scale" in refused("llama", LLAMA | {"logit_scale": 2.0})
    assert "llama.softcap" in refused("llama", LLAMA | {"softcap": 30.0})
    assert "block_count is 'x'" in refused("llama", LLAMA | {"block_count": "x"})
    assert "block_count is 1,000,000" in refused("llama", LLAMA | {"block_count": 1_000_000})
    scale = np.ones(1, np.float32)
    assert "scales beside a weight" in refused("llama", LLAMA, **{"blk.0.attn_q.scale": scale})
    assert "blk.1.attn_q.weight" in refused("llama", LLAMA, **{"blk.1.attn_q.weight": scale})
    assert "not known" in refused("llama", LLAMA | {"rope__dimension_count": 4})
    assert "attn_factor" in refused("llama", LLAMA | {"rope__scaling__attn_factor": 2.0})
    assert "longrope" in refused("llama", LLAMA | {"rope__scaling__type": "longrope"})
    assert "takes pairs" in refused("llama", LLAMA | {"attention__key_length": 7})
    assert "has 16 rows" in refused("llama", LLAMA | {"attention__head_count_kv": 4})
    packed = (np.ones((64, 32), np.float32), Kind.MXFP4)
    assert "1 of MXFP4" in refused("llama", LLAMA, **{"blk.0.ffn_up.weight": packed})
    many: dict[str, object] = {"tokenizer.ggml.tokens": ["a"] * 51}
    assert "51" in refused("llama", LLAMA | many)
    none: dict[str, object] = {"tokenizer.ggml.eos_token_id": 50}
    assert "[0, 50)" in refused("llama", LLAMA | none)


# -- the file -------------------------------------------------------------------------------------


def test_types_are_ggml_s() -> None:
    """Red if a block has another size: every tensor after it would be read from elsewhere."""
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert dict(TYPES) == theirs


def test_metadata_of_every_type(tmp_path: Path) -> None:
    """Red if a type is read with another width or sign, or a text is cut."""
    path, expected = tmp_path / "m.gguf", {}
    writer = gguf.GGUFWriter(path, "llama")
    kinds = gguf.GGUFValueType
    values: dict[gguf.GGUFValueType, Any] = {
        kinds.UINT8: 255, kinds.INT8: -128, kinds.UINT16: 65535, kinds.INT16: -32768,
        kinds.UINT32: 2**32 - 1, kinds.INT32: -(2**31), kinds.FLOAT32: 0.5, kinds.BOOL: True,
        kinds.STRING: "Ġ über\0", kinds.UINT64: 2**64 - 1, kinds.INT64: -(2**63),
        kinds.FLOAT64: 0.1,
    }  # fmt: skip
    for kind, value in values.items():
        writer.add_key_value(f"x.{kind.name}", value, kind)
        expected[f"x.{kind.name}"] = value
    lists: dict[str, list[Any]] = {
        "ints": [1, -2, 3], "texts": ["a", "", "ß"], "flags": [True, False], "deep": [[1, 2], [3]],
    }  # fmt: skip
    for name, items in lists.items():
        writer.add_array(f"x.{name}", items)
        expected[f"x.{name}"] = items
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_metadata(path)
    assert {k: metadata[k] for k in expected} == expected
    assert metadata["general.architecture"] == "llama"


def test_tensors_lie_where_ggml_finds_them(tmp_path: Path) -> None:
    """Red if an offset counts from elsewhere, or sizes are in the other order."""
    keys = LLAMA | {"general.alignment": 256}
    path = write(tmp_path / "m.gguf", "llama", keys, llama_tensors())
    ours = read_gguf(path).tensors
    theirs = gguf.GGUFReader(path).tensors
    assert [t.name for t in theirs] == list(ours)
    for t in theirs:
        mine = ours[t.name]
        assert (mine.offset, mine.nbytes) == (t.data_offset, t.n_bytes)
        assert mine.shape == tuple(reversed(t.shape.tolist()))


def test_split_files(tmp_path: Path) -> None:
    """Red if a part is passed over, or taken for the whole."""
    write(tmp_path / "m.gguf", "llama", LLAMA, llama_tensors(), split=4)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) == 3
    for part in parts:
        made = open_gguf(part)
        assert made.path == parts[0]
        assert len(made.tensors) == len(llama_tensors())
        assert read_metadata(part)["llama.block_count"] == 1
    got = values_of(made, "model.layers.0.mlp.down_proj.weight")
    assert (got == llama_tensors()["blk.0.ffn_down.weight"]).all()
    made.close()
    lone = parts[1].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf missing beside it"):
        open_gguf(parts[0])
    with pytest.raises(CheckpointError, match=r"is part 1 .* of 3, but its name says 0 of 1"):
        open_gguf(lone)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match="is part 2"):
        open_gguf(parts[0])


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def made_by_hand(
    *parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3, data: int = 512
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32 + data)


HUGE = struct.pack("<Q", 1 << 60)
DEEP = struct.pack("<IQ", 9, 1) * 50
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no magic": (b"GGML" + bytes(99), "does not begin as a GGUF file"),
    "empty": (b"", "does not begin as a GGUF file"),
    "version 1": (made_by_hand(version=1), "version 1"),
    "version 9": (made_by_hand(version=9), "reads versions 2, 3"),
    "big endian": (made_by_hand(version=3 << 24), "big endian"),
    "keys": (made_by_hand(keys=1 << 60), "claims"),
    "tensors": (made_by_hand(tensors=1 << 60), "claims"),
    "long key": (made_by_hand(HUGE, keys=1), "ends inside its header"),
    "long text": (made_by_hand(key("a", 8, HUGE), keys=1), "ends inside its header"),
    "array": (made_by_hand(key("a", 9, struct.pack("<I", 4) + HUGE), keys=1), "elements"),
    "texts": (made_by_hand(key("a", 9, struct.pack("<I", 8) + HUGE), keys=1), "elements"),
    "nested": (made_by_hand(key("a", 9, DEEP), keys=1), "nested too deeply"),
    "type": (made_by_hand(key("a", 13, b""), keys=1), "of type 13"),
    "array type": (made_by_hand(key("a", 9, struct.pack("<IQ", 99, 0)), keys=1), "type 99"),
    "bool": (made_by_hand(key("a", 7, b"\2"), keys=1), "neither true nor false"),
    "key twice": (made_by_hand(key("a", 0, b"\1") * 2, keys=2), "'a' occurs twice"),
    "no utf-8": (made_by_hand(key("a", 0, b"\1").replace(b"a", b"\xff"), keys=1), "utf-8"),
    "alignment": (
        made_by_hand(key("general.alignment", 4, struct.pack("<I", 48)), keys=1), "power of two"
    ),
    "tensor twice": (made_by_hand(info("t"), info("t"), tensors=2), "'t' occurs twice"),
    "overlap": (made_by_hand(info("t"), info("u", offset=32), tensors=2), "'t' and 'u' overlap"),
    "axes": (made_by_hand(info("t", (1,) * 5), tensors=1), "5 axes"),
    "no axes": (made_by_hand(info("t", ()), tensors=1), "0 axes"),
    "zero": (made_by_hand(info("t", (0,)), tensors=1), "cannot fill"),
    "blocks": (made_by_hand(info("t", (33,), 2), tensors=1), "blocks of 32 Q4_0"),
    "tensor type": (made_by_hand(info("t", (32,), 4), tensors=1), "of type 4"),
    "off": (made_by_hand(info("t", offset=8), tensors=1), "off the alignment of 32"),
    "beyond": (made_by_hand(info("t", offset=512), tensors=1), "would end at byte"),
    "product": (made_by_hand(info("t", (1 << 62,) * 4), tensors=1), "would end at byte"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(name: str, tmp_path: Path) -> None:
    """Red if a header is believed, or a count is paid for in memory."""
    path = tmp_path / "m.gguf"
    raw, said = HOSTILE[name]
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="(?s)" + said) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    """Red if reading waits for a writer that never comes."""
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="a pipe, not a plain file"):
        open_gguf(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_gguf(tmp_path / "none.gguf")


def test_files_cut_short(tmp_path: Path) -> None:
    """Red if a file that ends early is opened as if it were whole."""
    path = write(tmp_path / "m.gguf", "llama", LLAMA, llama_tensors())
    raw = path.read_bytes()
    last = max(t.offset + t.nbytes for t in read_gguf(path).tensors.values())
    for size in [*range(0, 1500, 7), last - 1]:
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            open_gguf(path)
    path.write_bytes(raw)
    made = open_gguf(path)
    path.write_bytes(raw[: len(raw) // 2])  # cut after its header was read
    with pytest.raises(CheckpointError, match="ends inside blk"):
        for name in made.tensors:
            values_of(made, name)


@pytest.fixture(scope="module")
def opened_changed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], None]:
    """Opens a small file with one byte changed, and reads all of it."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    raw = write(path, "llama", LLAMA, llama_tensors()).read_bytes()

    def opened(at: int, value: int) -> None:
        path.write_bytes(raw[:at] + bytes([value]) + raw[at + 1 :])
        made = open_gguf(path)
        for name in made.tensors:
            values_of(made, name)
        made.close()

    return opened


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(at=st.integers(0, 1400), value=st.integers(0, 255))
def test_one_byte_changed(opened_changed: Callable[[int, int], None], at: int, value: int) -> None:
    """Red if a header of any bytes raises what is no CheckpointError."""
    try:
        opened_changed(at, value)
    except CheckpointError as error:
        assert 0 < len(str(error)) < 4000
        str(error).encode()


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.binary(max_size=9) | st.sampled_from([b"\xff", b"\xc3", b"a" * 700])))
def test_arrays_of_texts_are_cut_where_their_sizes_say(
    texts: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Fault: decoded all at once, a text takes bytes of the next one, or is cut inside."""
    path = tmp_path_factory.mktemp("texts") / "t.gguf"
    array = struct.pack("<IQ", 8, len(texts)) + b"".join(text(t) for t in texts)
    path.write_bytes(made_by_hand(key("a", 9, array), keys=1))
    wanted = [t.decode("utf-8", "surrogateescape") for t in texts]
    assert read_metadata(path)["a"] == wanted


@pytest.mark.parametrize("pool_bytes", [0, -1])
def test_a_tokenizer_that_is_refused_is_told_first(pool_bytes: int, tmp_path: Path) -> None:
    """Fault: it is read beside the rest, and what it raises is lost, or something else is said."""
    keys = LLAMA | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(50)], "tokenizer.ggml.merges": ["t 1"],
    }  # fmt: skip
    path = write(tmp_path / "m.gguf", "llama", keys, llama_tensors())
    with pytest.raises(CheckpointError, match="pre is 'kimi-k2'"):
        flashrt.load(path, device="cpu", max_positions=32, pool_bytes=pool_bytes)
    assert gc.isenabled()
