"""Malformed configs and headers: only FlashrtErrors come out, at once, and nothing is allocated."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from flashrt.backends.cpu.device import CpuDevice
from flashrt.base.errors import CheckpointError, FlashrtError
from flashrt.base.tensor_file import parse_json
from flashrt.models import model_for, notes_on
from flashrt.models.flow_policy.config import parse_config as parse_policy
from flashrt.models.model import tapes_of
from flashrt.weights.checkpoint import open_checkpoint
from flashrt.weights.loader import check_sources
from flashrt.weights.random_checkpoint import shape_config
from flashrt.weights.random_policy import policy_config

TINY = Path(__file__).parents[1] / "golden" / "tiny"
CONFIG: dict[str, Any] = json.loads((TINY / "config.json").read_text())
MOE = shape_config("tiny-moe")
CHECKPOINT = open_checkpoint(TINY)
POLICY = policy_config("tiny")

numbers = st.integers(-2, 70) | st.sampled_from([2**30, 2**31, 2**63, -(2**70), 10**4000])
scalars = st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=6)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=3)
)
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "mrope_section")
ropes = st.dictionaries(st.sampled_from(ROPE_KEYS), values | st.just("yarn"), max_size=3)
OTHERS = ("quantization_config", "quantization", "rope_scaling", "output_gate_type", "num_experts")


def changed(config: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A config with some fields replaced, and some left out."""
    names = st.sampled_from([*config, *OTHERS, "text_config"])
    changes = st.dictionaries(names, values | ropes, max_size=3)
    return st.builds(
        lambda change, drop: {k: v for k, v in (config | change).items() if k not in drop},
        changes,
        st.sets(st.sampled_from(sorted(config)), max_size=1),
    )


def refused(error: FlashrtError) -> None:
    """The message is of a bounded size, and can be printed."""
    text = str(error)
    assert 0 < len(text) < 4000
    text.encode()


@settings(max_examples=200, derandomize=True, database=None)
@given(changed(CONFIG), st.none() | values | ropes, st.booleans(), st.booleans())
def test_any_config_is_run_or_refused(
    config: dict[str, Any], outer: object, is_nested: bool, has_draft_head: bool
) -> None:
    if is_nested:
        config = {"model_type": "qwen3_5", "text_config": config, "rope_scaling": outer}
    try:
        model = model_for(config, max_positions=64, has_draft_head=has_draft_head, is_tied=True)
        check_sources(model.weights, CHECKPOINT)
        notes_on(config, 64)
        tapes_of(model, 16)
    except FlashrtError as error:
        refused(error)


@settings(max_examples=60, derandomize=True, database=None)
@given(changed(MOE))
def test_any_config_with_experts_is_run_or_refused(config: dict[str, Any]) -> None:
    try:
        tapes_of(model_for(config, max_positions=64, is_tied=True), 16)
    except FlashrtError as error:
        refused(error)


@settings(max_examples=100, derandomize=True, database=None)
@given(changed(POLICY))
def test_any_policy_config_is_run_or_refused(config: dict[str, Any]) -> None:
    try:
        parse_policy(config)
    except FlashrtError as error:
        refused(error)


@settings(max_examples=150, derandomize=True, database=None)
@given(st.integers(0, 1500), st.binary(min_size=1, max_size=3))
def test_a_damaged_config_file_is_read_or_refused(at: int, damage: bytes) -> None:
    raw = bytearray((TINY / "config.json").read_bytes())
    raw[at : at + len(damage)] = damage
    try:
        config = parse_json(bytes(raw))
    except ValueError:
        return  # read_json makes it a CheckpointError
    if isinstance(config, dict):
        try:
            model_for(config, max_positions=64)
        except FlashrtError as error:
            refused(error)


# ---- files ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("expected*"))


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model_type": "qwen3_5_text", "model_type": "llama"}',
        b'{"model_type": "\xff\xfe"}',
        b'{"vocab_size": ' + b"9" * 5000 + b"}",
        b"\0" * 64,
        b'{"a": "' + b"x" * (8 << 20) + b'"}',
    ],
    ids=["lists", "objects", "twice", "utf-8", "digits", "zeros", "large"],
)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_json_that_nobody_should_write(folder: Path, name: str, text: bytes) -> None:
    """Red on RecursionError; and when the last of two equal keys wins."""
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=name) as caught:
        open_checkpoint(folder)
    refused(caught.value)


TENSOR = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    "header",
    [
        f'{{"a":{TENSOR},"a":{TENSOR}}}',
        '{"a":{"dtype":"F32","shape":[[2]],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"NONE","shape":[2],"data_offsets":[0,8]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":["0","8"]}}',
        f'{{"__metadata__":[1],"a":{TENSOR}}}',
        "[1]",
        "[" * 50_000,
        "",
        "\xff",
    ],
)
def test_headers_that_nobody_should_write(folder: Path, header: str) -> None:
    raw = header.encode("latin-1")
    path = folder / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(CheckpointError) as caught:
        check_sources((), open_checkpoint(folder))
    refused(caught.value)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\ud800", "x" * 10_000])
def test_names_of_tensors_do_not_steer_a_terminal(folder: Path, name: str) -> None:
    """Red when a name goes into a message as it is."""
    raw = json.dumps({name: json.loads(TENSOR)}).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(CheckpointError) as caught:
        flashrt.load(folder, device="cpu")
    text = str(caught.value)
    assert "\x1b" not in text and "a\nb" not in text
    refused(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 100_000, "layer_types": None},
        {"num_hidden_layers": 512, "layer_types": None},
        {"head_dim": 2**30},
        {"head_dim": 1024},
        {"vocab_size": 1},
        {"vocab_size": 3},
        {"vocab_size": 20_000_000},
        {"vocab_size": 1 << 20},
        {"intermediate_size": 1 << 18},
        {"linear_num_value_heads": 1024, "linear_value_head_dim": 1024},
    ],
    ids=str,
)
def test_sizes_are_refused_before_time_or_memory_is_spent(
    folder: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when tensors are compared with the config after the arena was made: 25 s and 3.4 GB."""

    def allocate(*_: object) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr(CpuDevice, "allocate", allocate)
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            flashrt.load(folder, device="cpu")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    refused(caught.value)
    assert time.perf_counter() - started < 5
    assert peak < 64 << 20
