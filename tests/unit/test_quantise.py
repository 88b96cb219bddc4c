"""Our quantiser and the checkpoints it writes: little is lost, and all is written or nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashrt.base.errors import CheckpointError
from flashrt.base.tensor_file import read_table
from flashrt.commands.quantize import quantize
from flashrt.core.groups import Groups, Scales
from flashrt.core.region import DType
from flashrt.weights.formats import write
from flashrt.weights.formats.dequantise import dequantise
from flashrt.weights.formats.detect import stored_matrix
from flashrt.weights.formats.quantisation import quantisation_of
from flashrt.weights.formats.quantise import TARGETS, Loss, quantise
from flashrt.weights.formats.stored import Tensor
from flashrt.weights.formats.write import is_chosen, quantise_checkpoint
from flashrt.weights.random_checkpoint import write_random_checkpoint

Floats = NDArray[np.float32]
UP = "model.language_model.layers.0.mlp.up_proj"


def back(rows: Floats, weights: str, **more: Any) -> Floats:
    target = TARGETS[weights]
    return dequantise(target.dtype, target.groups, quantise(rows, target, **more))


# ---- the quantiser ----


@pytest.mark.parametrize(("weights", "most"), [("int4", 0.0825), ("int8", 0.0052)])
def test_normal_weights_lose_what_is_claimed(weights: str, most: float) -> None:
    """Red when the search is left out (8.4 %, 0.53 %), or only positive scales are tried (9.5)."""
    rows = np.random.default_rng(3).standard_normal((64, 512)).astype(np.float32)
    loss = Loss()
    got = back(rows, weights, loss=loss)
    truth = np.sqrt(np.square(got - rows, dtype=np.float64).sum() / np.square(rows).sum())
    assert abs(loss.relative - truth) < 1e-6
    assert truth < most


def test_a_search_over_all_scales_finds_little_more() -> None:
    """Red when the scale is the largest magnitude alone: then some groups lose a third more."""
    rows = np.random.default_rng(4).standard_t(5, (12, 32)).astype(np.float32)
    for row in rows:
        extreme = row[np.abs(row).argmax()]
        scales = np.outer(np.linspace(0.5, 1.3, 4000), [extreme / -8, extreme / 8]).ravel()
        codes = np.clip(np.rint(row / scales[:, None]), -8, 7)
        best = np.square(row - codes * scales[:, None]).sum(axis=1).min()
        assert np.square(back(row[None], "int4") - row).sum() <= 1.12 * best


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 9), st.integers(1, 100), st.sampled_from(sorted(TARGETS)),
       st.sampled_from([1e-30, 1e-7, 1.0, 1e4, 1e9]), st.booleans())  # fmt: skip
def test_any_rows_one_by_one_or_together(
    n: int, columns: int, weights: str, size: float, has_zeros: bool
) -> None:
    """Red when a group is cut short, all zeros, or too large or small for float16, and is not met:
    by a code out of range, NaN, or an error above that of zeros."""
    rng = np.random.default_rng(n * 1000 + columns)
    rows = (rng.standard_normal((n, columns)) * size).astype(np.float32)
    if has_zeros:
        rows[:, : columns // 2] = 0
    target = TARGETS[weights]
    whole = quantise(rows, target)
    for i in range(n):
        one = quantise(rows[i : i + 1], target)
        assert (one.codes == whole.codes[i]).all()
        assert (one.scales[0].view(np.uint16) == whole.scales[0][i].view(np.uint16)).all()
    got = dequantise(target.dtype, target.groups, whole)
    assert np.isfinite(got).all()
    assert (np.square(got - rows, dtype=np.float64).sum() <=
            np.square(rows, dtype=np.float64).sum() * (1 + 1e-6))  # fmt: skip
    empty = columns // 2 // 32 * 32 if has_zeros else 0  # columns of groups of zeros
    assert (whole.codes[:, :empty] == (8 if weights == "int4" else 0)).all()
    scales = whole.scales[0].astype(np.float32)
    assert (scales.astype(ml_dtypes.bfloat16).astype(np.float32) == scales).all()
    if target.dtype is DType.U4:
        assert whole.codes.dtype == np.uint8 and int(whole.codes.max()) <= 15


def test_importance_decides_which_columns_are_kept() -> None:
    """Red when the importance of columns is not looked at."""
    rows = np.random.default_rng(5).standard_normal((200, 32)).astype(np.float32)
    importance = np.where(np.arange(32) < 4, np.float32(100), np.float32(0.01))
    plain, weighed = (
        np.square(back(rows, "int4", importance=i) - rows)[:, :4].sum() for i in (None, importance)
    )
    assert weighed < 0.8 * plain


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantise(np.full((1, 32), value, np.float32), TARGETS["int4"])


# ---- checkpoints ----


def table_of(path: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        handle = os.open(file, os.O_RDONLY)
        try:
            found = read_table(handle, file.stat().st_size, 1 << 20).tensors
        finally:
            os.close(handle)
        for name, t in found.items():
            canonical = name.replace("model.language_model.", "model.")
            tensors[canonical] = Tensor(name, t.dtype, t.shape, file, t.offset, t.nbytes)
    return tensors


def reader(tensor: Tensor, first: int, out: memoryview) -> None:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset + first)
        out[:] = file.read(len(out))


def bytes_of(tensor: Tensor) -> bytes:
    out = bytearray(tensor.nbytes)
    reader(tensor, 0, memoryview(out))
    return bytes(out)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    made = write_random_checkpoint(tmp_path / "src", "tiny", has_draft_head=True)
    (made / "tokenizer.json").write_text('{"a": 1}')
    (made / "chat_template.jinja").write_text("{{ messages }}")
    (made / "LICENSE").write_text("words")
    (made / "pytorch_model.bin").write_bytes(b"not wanted")
    return made


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_written_checkpoint_holds_the_planes_and_all_else_unchanged(
    weights: str, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when a nibble, a scale or a row lies elsewhere than compressed-tensors has it (the reader
    is checked against that library), or when a tensor that is not quantised is lost or changed."""
    monkeypatch.setattr(write, "CHUNK_NBYTES", 4000)
    calls: list[tuple[str, int, int]] = []
    losses = quantise_checkpoint(src, tmp_path / "dst", weights, lambda *c: calls.append(c))
    before, after = table_of(src), table_of(tmp_path / "dst")
    config = json.loads((tmp_path / "dst/config.json").read_text())
    quantisation = quantisation_of(tmp_path / "dst", config)
    target, quantised = TARGETS[weights], 0
    for name, tensor in before.items():
        matrix = stored_matrix(after, name, quantisation)
        if matrix is None:
            assert bytes_of(after[name]) == bytes_of(tensor) and after[name].dtype == tensor.dtype
            continue
        quantised += 1
        assert (matrix.dtype, matrix.groups) == (target.dtype, Groups(32, Scales.F16))
        raw = np.frombuffer(bytes_of(tensor), ml_dtypes.bfloat16).reshape(tensor.shape)
        expected = quantise(raw.astype(np.float32), target)
        got = matrix.read(0, matrix.shape[0], reader)
        assert (got.codes == expected.codes).all()
        assert (got.scales[0] == expected.scales[0]).all()
    assert quantised == len(losses) > 0
    assert all(0 < loss < 0.15 for _, loss in losses)
    assert {n for n, _ in losses} <= {t.stored_name for t in before.values()}
    assert calls[-1][1] == calls[-1][2] == sum(t.nbytes for t in before.values())
    others = {p.name for p in (tmp_path / "dst").iterdir()}
    assert others == {"config.json", "generation_config.json", "tokenizer.json",
                      "chat_template.jinja", "LICENSE", "model.safetensors"}  # fmt: skip
    assert config == {**json.loads((src / "config.json").read_text()),
                      "quantization_config": config["quantization_config"]}  # fmt: skip
    safetensors.numpy.load_file(tmp_path / "dst/model.safetensors")  # a file by the library's rules


def test_which_tensors_are_chosen() -> None:
    """Red when a tensor that official FP8 checkpoints keep whole is quantised."""
    chosen = ["mlp.up_proj", "self_attn.q_proj", "linear_attn.in_proj_qkv", "linear_attn.out_proj",
              "mlp.experts.3.down_proj", "mlp.shared_expert.up_proj"]  # fmt: skip
    plain = ["linear_attn.in_proj_a", "linear_attn.in_proj_b", "mlp.gate", "mlp.shared_expert_gate"]
    for prefix in ("model.layers.3.", "model.language_model.layers.10.", "mtp.layers.0."):
        assert all(is_chosen(f"{prefix}{n}.weight", (64, 64), 32) for n in chosen)
        assert not any(is_chosen(f"{prefix}{n}.weight", (64, 64), 32) for n in plain)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "mtp.fc.weight",
                 "model.visual.blocks.0.attn.qkv.weight",
                 "vision_tower.layers.0.mlp.fc1.weight"):  # fmt: skip
        assert not is_chosen(name, (64, 64), 32)
    assert not is_chosen(f"{UP}.weight", (64, 65), 32)  # no whole groups
    assert not is_chosen("model.layers.0.linear_attn.conv1d.weight", (64, 1, 4), 32)


def test_shards_and_vision_towers(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the index misses a tensor, or what flashrt does not run is left behind."""
    tensors = safetensors.numpy.load_file(src / "model.safetensors")
    tensors["model.visual.blocks.0.attn.qkv.weight"] = np.ones((32, 32), np.float16)
    safetensors.numpy.save_file(tensors, src / "model.safetensors")
    monkeypatch.setattr(write, "SHARD_NBYTES", 20_000)
    quantise_checkpoint(src, tmp_path / "dst")
    index = json.loads((tmp_path / "dst/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    after = table_of(tmp_path / "dst")
    stored = {t.stored_name: t.path.name for t in after.values()}
    assert stored == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert "model.visual.blocks.0.attn.qkv.weight" in after
    config = json.loads((tmp_path / "dst/config.json").read_text())["quantization_config"]
    assert "model.visual.blocks.0.attn.qkv" in config["ignore"]
    assert "re:.*\\.linear_attn\\.in_proj_a$" in config["ignore"]


def test_a_failure_leaves_nothing(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when half a checkpoint stays, or one that is there is overwritten."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "sync_folder", fail)
        with pytest.raises(CheckpointError, match=r"dst: cannot be written: .*No space"):
            quantise_checkpoint(src, tmp_path / "dst")
    assert {p.name for p in tmp_path.iterdir()} == {"src"}
    (tmp_path / "dst").mkdir()
    with pytest.raises(CheckpointError, match="dst: already exists"):
        quantise_checkpoint(src, tmp_path / "dst")
    shutil.rmtree(tmp_path / "dst")
    quantise_checkpoint(src, tmp_path / "dst")
    with pytest.raises(CheckpointError, match="dst: its weights are quantised already"):
        quantise_checkpoint(tmp_path / "dst", tmp_path / "twice")
    with pytest.raises(CheckpointError, match="weights 'int3': one of int8, int4 is expected"):
        quantise_checkpoint(src, tmp_path / "other", "int3")


def test_a_weight_that_is_no_number_is_named(src: Path, tmp_path: Path) -> None:
    tensors = safetensors.numpy.load_file(src / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    name = name if name in tensors else "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.full(tensors[name].shape, np.nan, ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, src / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight: a value is infinite or NaN; fetch"
    ):
        quantise_checkpoint(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_the_command_tells_sizes_and_errors(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(src, tmp_path / "dst", "int4", False) == 0
    text = capsys.readouterr().out
    assert "matrices as int4" in text and "model.layers.N.mlp.up_proj" in text
    shutil.rmtree(tmp_path / "dst")
    assert quantize(src, tmp_path / "dst", "int8", True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] < found["source_bytes"] and found["weights"] == "int8"
    assert all(t["relative_error"] < 0.01 for t in found["tensors"])
