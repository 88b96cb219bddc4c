"""Quantised formats of safetensors: the values that their own libraries read, or a clear refusal.

tests/data/quantised.* holds matrices that the library of each format packed, and the digest of what
that library reads from them in float32; make_quantised.py there made them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.tensor_file import read_table
from flashrt.core.groups import Groups, Planes, Scales
from flashrt.core.region import DType
from flashrt.weights.formats.coded import CodedMatrix
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.detect import (
    activation_scales,
    is_quantised,
    names_used,
    stored_matrix,
)
from flashrt.weights.formats.quantisation import Quantisation, quantisation_of
from flashrt.weights.formats.stored import Tensor

DATA = Path(__file__).parents[1] / "data"
FACTS: dict[str, Any] = json.loads((DATA / "quantised.json").read_text())
MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
ROOT = Path("model")
EXPECTED = {
    "packed int4, groups of 32": (DType.U4, Groups(32, Scales.F32)),
    "packed int4 with zero points": (DType.U4, Groups(32, Scales.F32_MIN)),
    "packed int4, float16": (DType.U4, Groups(128, Scales.F16)),
    "packed int4, a scale per row": (DType.U4, Groups(256, Scales.F32)),
    "packed int8 with zero points": (DType.I8, Groups(64, Scales.F32_MIN)),
    "int8, a scale per row": (DType.I8, Groups(256, Scales.F32)),
    "int8, groups of 64, with zero points": (DType.I8, Groups(64, Scales.F32_MIN)),
    "float8, a scale per row": (DType.E4M3, Groups(256, Scales.F32)),
    "float8, one scale": (DType.E4M3, Groups(256, Scales.F32)),
    "float8, blocks of 16 x 32": (DType.E4M3, Groups(32, Scales.F32)),
    "float8, official": (DType.E4M3, Groups(128, Scales.F32)),
    "nvfp4": (DType.E2M1, Groups(16, Scales.E4M3_OVER)),
    "gptq int4": (DType.U4, Groups(32, Scales.F16)),
    "gptq int4, whole rows": (DType.U4, Groups(256, Scales.F16)),
    "gptq int4 with zero points": (DType.U4, Groups(64, Scales.F32_MIN)),
    "gptq int8": (DType.I8, Groups(32, Scales.F16)),
    "gptq int8 with zero points": (DType.I8, Groups(32, Scales.F32_MIN)),
    "awq": (DType.U4, Groups(64, Scales.F32_MIN)),
}


class Stored:
    """Tensors in memory, as a checkpoint holds them; counts the bytes that are read of each."""

    def __init__(self, arrays: dict[str, tuple[str, NDArray[np.generic]]]) -> None:
        self.raw = {n: np.ascontiguousarray(a).reshape(-1).view(np.uint8) for n, (_, a) in
                    arrays.items()}  # fmt: skip
        self.tensors = {
            n: Tensor(n, code, a.shape, ROOT / "model.safetensors", 0, a.nbytes)
            for n, (code, a) in arrays.items()
        }
        self.read: list[tuple[str, int]] = []

    def reader(self, tensor: Tensor, first: int, out: memoryview) -> None:
        name = tensor.stored_name
        out[:] = self.raw[name][first : first + len(out)].data
        self.read += ((name, i) for i in range(first, first + len(out)))

    def matrix(self, section: dict[str, Any] | None, name: str = NAME) -> CodedMatrix | None:
        return stored_matrix(self.tensors, name, parsed(section))


def parsed(section: dict[str, Any] | None) -> Quantisation | None:
    return quantisation_of(ROOT, {} if section is None else {"quantization_config": section})


CODES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32,
    "I64": np.int64, "U8": np.uint8, "I8": np.int8, "F8_E4M3": np.uint8,
}  # fmt: skip


def fixtures() -> dict[str, dict[str, tuple[str, NDArray[np.generic]]]]:
    cases: dict[str, dict[str, tuple[str, NDArray[np.generic]]]] = {}
    path = DATA / "quantised.safetensors"
    handle = os.open(path, os.O_RDONLY)
    try:
        for name, t in read_table(handle, path.stat().st_size, 1 << 20).tensors.items():
            raw = np.frombuffer(os.pread(handle, t.nbytes, t.offset), np.uint8)
            case, tensor = name.split("/")
            array = raw.view(CODES[t.dtype]).reshape(t.shape)
            cases.setdefault(case, {})[tensor] = t.dtype, array
    finally:
        os.close(handle)
    return cases


FIXTURES = fixtures()


def stored_case(case: str) -> tuple[Stored, dict[str, Any]]:
    return Stored(dict(FIXTURES[case])), json.loads(json.dumps(FACTS[case]["quantization_config"]))


def values(matrix: CodedMatrix, stored: Stored, step: int) -> NDArray[np.float32]:
    n = matrix.shape[0]
    parts = [
        dequantise(matrix.dtype, matrix.groups, matrix.read(at, min(step, n - at), stored.reader))
        for at in range(0, n, step)
    ]
    return np.concatenate(parts)


# ---- values ----


@pytest.mark.parametrize("step", [1000, 7])
@pytest.mark.parametrize("case", FACTS)
def test_values_are_those_of_the_library(case: str, step: int) -> None:
    """Red when a nibble, a zero point, an order of columns or a scale is taken for another."""
    stored, section = stored_case(case)
    matrix = stored.matrix(section)
    assert matrix is not None and (matrix.dtype, matrix.groups) == EXPECTED[case]
    assert list(matrix.shape) == FACTS[case]["shape"]
    got = values(matrix, stored, step) + np.float32(0)  # -0 is 0
    assert got[0, :4].tolist() == FACTS[case]["first"]
    assert hashlib.sha256(got.tobytes()).hexdigest() == FACTS[case]["sha256"]


@pytest.mark.parametrize("case", FACTS)
def test_each_byte_is_read_once_and_in_the_same_order(case: str) -> None:
    """Red when a format reads scales with each chunk: the digest of a load would change."""
    orders = []
    for step in (1000, 5):
        stored, section = stored_case(case)
        matrix = stored.matrix(section)
        assert matrix is not None and sum(t.nbytes for t in matrix.tensors) == matrix.nbytes
        for _ in range(2):  # a second pass begins with row 0 again
            stored.read = []
            values(matrix, stored, step)
            orders.append(stored.read)
        expected = {(t.stored_name, i) for t in matrix.tensors for i in range(t.nbytes)}
        assert set(stored.read) == expected and len(stored.read) == len(expected)
        assert set(stored.tensors) <= set(names_used(NAME))
        assert is_quantised(stored.tensors.values())
    assert all(order == orders[0] for order in orders)


def test_modelopt_multiplies_by_its_second_scale() -> None:
    """Red when ModelOpt's scale is taken for compressed-tensors', which divides."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (6, 48), dtype=np.uint8)
    scale = rng.integers(40, 120, (6, 3), dtype=np.uint8)
    second = np.float32(0.00037)
    stored = Stored({
        f"{MODULE}.weight": ("U8", codes[:, ::2] | codes[:, 1::2] << 4),
        f"{MODULE}.weight_scale": ("F8_E4M3", scale),
        f"{MODULE}.weight_scale_2": ("F32", np.array(second)),
        f"{MODULE}.input_scale": ("F32", np.array(0.5, np.float32)),
    })  # fmt: skip
    side = {"producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "NVFP4", "group_size": 16,
                             "exclude_modules": ["lm_head", "*self_attn*"]}}  # fmt: skip
    quantisation = quantisation_of(ROOT, {}, side)
    matrix = stored_matrix(stored.tensors, NAME, quantisation)
    assert matrix is not None and matrix.groups == Groups(16, Scales.E4M3_TIMES)
    sign = np.where(codes & 8, np.float32(-1), np.float32(1))
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    whole = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * second
    expected = sign * table[codes & 7] * np.repeat(whole, 16, axis=1)
    assert (values(matrix, stored, 4) == expected).all()
    assert activation_scales(stored.tensors) == (f"{MODULE}.input_scale",)
    named = {n.replace("mlp.up_proj", "self_attn.q_proj"): t for n, t in stored.tensors.items()}
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json leaves .*q_proj out"):
        stored_matrix(named, NAME.replace("mlp.up_proj", "self_attn.q_proj"), quantisation)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([128, 64, 16, 512]),
       st.integers(1, 300), st.sampled_from(["F32", "BF16"]))  # fmt: skip
def test_float8_blocks_of_any_sizes(
    rows: int, columns: int, block: int, step: int, dtype: str
) -> None:
    """Red when a short last block, or a chunk that begins inside a block, takes another's scale."""
    rng = np.random.default_rng(rows * 1000 + columns)
    grid = math.ceil(rows / 128), math.ceil(columns / block)
    codes = rng.integers(0, 0x7F, (rows, columns), dtype=np.uint8)
    scale = rng.random(grid, np.float32).astype(CODES[dtype])
    stored = Stored({f"{MODULE}.weight": ("F8_E4M3", codes),
                     f"{MODULE}.weight_scale_inv": (dtype, scale)})  # fmt: skip
    matrix = stored.matrix({"quant_method": "fp8", "weight_block_size": [128, block]})
    assert matrix is not None
    wide = np.repeat(np.repeat(scale.astype(np.float32), 128, axis=0), block, axis=1)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * wide[:rows, :columns]
    assert (values(matrix, stored, step) == expected).all()


# ---- mixed checkpoints ----


def test_a_plain_weight_is_left_to_others() -> None:
    plain = Stored({NAME: ("BF16", np.ones((2, 2), ml_dtypes.bfloat16)),
                    f"{MODULE}.input_scale": ("F32", np.ones(1, np.float32))})  # fmt: skip
    assert plain.matrix({"quant_method": "fp8"}) is None
    assert plain.matrix(None) is None
    assert plain.matrix(None, "model.layers.9.mlp.up_proj.weight") is None
    assert plain.matrix(None, "model.layers.0.mlp.experts.down_proj") is None


def test_groups_of_a_mixed_checkpoint_each_have_their_scheme() -> None:
    """Red when the first group of the configuration is taken for every tensor."""
    four, eight = FIXTURES["nvfp4"], FIXTURES["float8, a scale per row"]
    down = MODULE.replace("up", "down")
    stored = Stored(four | {n.replace(MODULE, down): a for n, a in eight.items()})
    sections = [FACTS[c]["quantization_config"] for c in ("nvfp4", "float8, a scale per row")]
    groups = [dict(s["config_groups"]["group_0"]) for s in sections]
    groups[1]["targets"] = ["re:.*down_proj$"]
    section = {**sections[0], "format": "mixed-precision",
               "config_groups": {"a": groups[0], "b": groups[1]}}  # fmt: skip
    up, down_matrix = stored.matrix(section), stored.matrix(section, f"{down}.weight")
    assert up is not None and up.dtype is DType.E2M1
    assert down_matrix is not None and down_matrix.dtype is DType.E4M3
    with pytest.raises(CheckpointError, match="says compressed-tensors with floats of 4 bits"):
        stored.matrix({**section, "config_groups": {"a": groups[0]}}, f"{down}.weight")


def test_gptq_dynamic_excludes_and_overrides() -> None:
    """Red when `dynamic` is not looked at: attention of official checkpoints is plain."""
    stored, section = stored_case("gptq int4")
    section["dynamic"] = {"-:.*self_attn.*": {}, "+:.*up_proj$": {"group_size": 48}}
    with pytest.raises(CheckpointError, match=r"a scale per 48 of 96 inputs"):
        stored.matrix(section)
    section["dynamic"] = {"-:.*mlp.*": {}}
    with pytest.raises(CheckpointError, match=r"leaves model.layers.0.mlp.up_proj out"):
        stored.matrix(section)


def test_a_nested_config_is_found() -> None:
    section = FACTS["awq"]["quantization_config"]
    assert quantisation_of(ROOT, {"text_config": {"quantization_config": section}}) is not None
    assert quantisation_of(ROOT, {"text_config": {}}) is None


# ---- refusals ----

Change = Callable[[dict[str, tuple[str, NDArray[np.generic]]], dict[str, Any]], None]


def part(arrays: dict[str, Any], name: str, code: str, array: NDArray[np.generic]) -> None:
    arrays[f"{MODULE}.{name}"] = code, array


def put(name: str, code: str, array: Any) -> Change:
    return lambda arrays, _: part(arrays, name, code, np.asarray(array))


def drop(name: str) -> Change:
    return lambda arrays, _: arrays.pop(f"{MODULE}.{name}") and None


def say(**changes: Any) -> Change:
    return lambda _, section: section.update(changes)


ORDER = np.arange(96, dtype=np.int32) // 32
REFUSED: dict[str, tuple[str, Change, str]] = {
    "desc_act": ("gptq int4", say(desc_act=True), "desc_act true (columns in the order"),
    "order of columns": ("gptq int4", put("g_idx", "I32", ORDER[::-1].copy()),
                         "up_proj.g_idx has columns in the order of activations"),
    "3 bits": ("gptq int4", say(bits=3), "has bits 3; 4 or 8 bits are read"),
    "2 bits": ("gptq int4", say(bits=2), "has bits 2; 4 or 8 bits are read"),
    "marlin": ("gptq int4", say(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    "marlin, by tensors": ("gptq int4", put("B", "I32", [[1]]), "(Marlin's own order)"),
    "rotation": ("gptq int4", say(rotation="hadamard"), "has rotation 'hadamard'"),
    "zero points": ("gptq int4", put("qzeros", "I32", np.zeros((3, 4), np.int32)),
                    "qzeros is not half the range throughout"),
    "two readings": ("gptq int4 with zero points",
                     put("qzeros", "I32", np.full((2, 4), -1, np.int32)), "qzeros holds 15"),
    "size": ("gptq int4", say(group_size=24), "a scale per 24 of 96 inputs"),
    "odd size": ("gptq int4 with zero points",
                 lambda a, s: (s.update(group_size=8), part(a, "scales", "F16", np.ones(
                     (16, 32), np.float16)), part(a, "qzeros", "I32", np.zeros(
                         (16, 4), np.int32)))[0], "groups of 8 columns; multiples of 16"),
    "no size": ("gptq int4", say(group_size=-7), "has group_size -7, expected a count"),
    "gemv": ("awq", say(version="gemv"), "version 'gemv'; gemm is read"),
    "awq without zeros": ("awq", drop("qzeros"), "has no qzeros beside it"),
    "a product too wide": ("awq", put("scales", "F32", np.full((2, 40), 1 / 3, np.float32)),
                           "scales times its zero points needs more bits"),
    "lost": ("gptq int4", drop("scales"), "has no model.layers.0.mlp.up_proj.scales beside it"),
    "bitsandbytes": ("int8, a scale per row", put("SCB", "F32", np.ones(20, np.float32)),
                     "SCB is of a format that is not read (bitsandbytes)"),
    "twice": ("int8, a scale per row", put("weight.nested_absmax", "F32", np.ones(2, np.float32)),
              "quantised twice"),
    "bitsandbytes, by config": ("awq", lambda _, s: (s.clear(), s.update(
        quant_method="bitsandbytes", load_in_4bit=True))[0], "bitsandbytes of 4 bits, which is"),
    "mxfp4": ("awq", say(quant_method="mxfp4"), "is MXFP4 of 4 bits, which is not read"),
    "mxfp4, by tensors": ("nvfp4", drop("weight_global_scale"), "(MXFP4?)"),
    "sparse": ("packed int4, groups of 32", say(format="sparse-24-bitmask"),
               "format 'sparse-24-bitmask'"),
    "sparse too": ("packed int4, groups of 32", say(sparsity_config={"format": "sparse-bitmask"}),
                   "sparsity 'sparse-bitmask'"),
    "marlin-24": ("packed int4, groups of 32", say(format="marlin-24"), "format 'marlin-24'"),
    "rotated": ("packed int4, groups of 32", say(transform_config={"config_groups": {"u": {}}}),
                "weights are rotated"),
    "pre_quant_scale": ("nvfp4", put("pre_quant_scale", "F32", np.ones(96, np.float32)),
                        "AWQ of ModelOpt"),
    "rounded plain": ("float8, a scale per row", put("weight", "BF16", np.ones(
        (20, 300), ml_dtypes.bfloat16)), "weights that are to be rounded are not read"),
    "float8 e5m2": ("float8, one scale", put("weight", "F8_E5M2", np.ones((20, 100), np.uint8)),
                    "is F8_E5M2, which is not read"),
    "a zero point": (
        "int8, a scale per row",
        put("weight_zero_point", "I8", np.ones((20, 1), np.int8)),
        "is not zero, though weights are symmetric",
    ),
    "no scale": ("float8, official", drop("weight_scale_inv"), "has no weight_scale beside it"),
    "grid": ("float8, official", put("weight_scale_inv", "F32", np.ones((2, 2), np.float32)),
             "is [2, 2], expected [2, 1] (a scale per 128 x 128 of 256 x 128)"),
    "another method": ("float8, official", say(quant_method="awq", bits=4), "says awq with"),
    "left out": ("float8, official", say(modules_to_not_convert=["mlp"]),
                 "quantization_config in config.json leaves model.layers.0.mlp.up_proj out"),
    "shape": ("packed int4, groups of 32", put("weight_shape", "I64", np.array([20, 95])),
              "says [20, 95], and the packed words hold [20, 96]"),
    "pattern": ("packed int4, groups of 32", say(ignore=["re:(a+)+$"]), "too complicated"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_what_where_and_the_way_out(case: str) -> None:
    base, change, words = REFUSED[case]
    arrays, section = dict(FIXTURES[base]), stored_case(base)[1]
    change(arrays, section)
    stored = Stored(arrays)
    with pytest.raises(CheckpointError) as raised:
        matrix = stored.matrix(section)
        assert matrix is not None
        matrix.read(0, 4, stored.reader)
    text = str(raised.value)
    assert words in text and text.startswith("model")
    assert "; take another" in text or "; fetch the file" in text
    assert len(text) < 600 and len(text.splitlines()) == 1


def test_without_a_config_nothing_is_guessed() -> None:
    stored, _ = stored_case("nvfp4")
    with pytest.raises(CheckpointError, match="has no quantization_config, which says how"):
        stored.matrix(None)


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.text(max_size=5) | st.just(10**4000),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=2),
    max_leaves=5,
)
SECTIONS = [f["quantization_config"] for f in FACTS.values()]
KEYS = sorted({k for s in SECTIONS for k in s} | {"kv_cache_scheme", "sparsity_config"})


def places(section: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield section
    for value in section.values():
        if isinstance(value, dict):
            yield from places(value)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(FACTS)), st.data())
def test_any_config_and_any_sizes_are_read_or_refused(case: str, data: st.DataObject) -> None:
    """Red when a value of a wrong type or size raises anything but a CheckpointError."""
    stored, section = stored_case(case)
    place = data.draw(st.sampled_from(list(places(section))))
    place[data.draw(st.sampled_from(sorted(place) + KEYS))] = data.draw(junk)
    name = data.draw(st.sampled_from(sorted(stored.tensors)))
    if data.draw(st.booleans()):
        sizes = tuple(data.draw(st.lists(st.integers(0, 40), max_size=3)))
        stored.tensors[name] = replace(stored.tensors[name], shape=sizes)
    try:
        matrix = stored_matrix(stored.tensors, NAME, parsed(section))
        if matrix is not None and name in {n for n, t in stored.tensors.items() if
                                           math.prod(t.shape) == stored.raw[n].size}:  # fmt: skip
            rows = matrix.read(0, min(3, matrix.shape[0]), stored.reader)
            assert isinstance(rows, Planes)
    except CheckpointError as error:
        assert len(str(error)) < 2000
