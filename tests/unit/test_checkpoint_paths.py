"""What people give in place of a checkpoint: each error names what it is and what to do.

Red when a path is only looked for: every case here then says "no such file" or lists tensor names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import flashrt
from flashrt.base.errors import CheckpointError
from flashrt.weights.bundled import bundled_checkpoint
from flashrt.weights.bundled_policies import bundled_policies
from flashrt.weights.checkpoint import open_checkpoint

TINY = Path(__file__).parents[1] / "golden" / "tiny"


def refusal(path: object) -> str:
    """What `flashrt.load` says; no line of it is long, and there are few."""
    with pytest.raises(CheckpointError) as caught:
        flashrt.load(path, device="cpu")  # type: ignore[arg-type]
    text = str(caught.value)
    assert len(text) < 2000 and len(text.splitlines()) < 30
    return text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("expected*"))


def emptied(folder: Path, *keep: str) -> Path:
    """A folder with only these files left."""
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
    return folder


def lora(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3.5-4B"}')
    return folder


def cache_root(folder: Path) -> Path:
    root = folder.parent / "models--Qwen--Qwen3.5-4B"
    for name in ("aaa", "bbb"):
        shutil.copytree(folder, root / "snapshots" / name)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbb")
    return root


def unfinished(folder: Path) -> Path:
    place = folder / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    (place / "x.incomplete").touch()
    return emptied_of_weights(folder)


def emptied_of_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def dangling(folder: Path) -> Path:
    (emptied_of_weights(folder) / "model.safetensors").symlink_to(folder / "gone")
    return folder


def pickled(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def shards_without_index(folder: Path) -> Path:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    return folder


def missing_shards(folder: Path) -> Path:
    placed = {f"t{i}": f"model-{i:05}-of-00020.safetensors" for i in range(20)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (folder / "x.incomplete").touch()
    return emptied_of_weights(folder)


def only_gguf(folder: Path) -> Path:
    emptied(folder)
    (folder / "model-Q4_K_M.gguf").touch()
    return folder


def lfs_pointer(folder: Path) -> Path:
    (folder / "model.safetensors").write_text("version https://git-lfs\noid sha256:0\nsize 9\n")
    return folder


def mlx(folder: Path) -> Path:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "mlx"})
    return folder


def file_in(name: str) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        (folder / name).touch()
        return folder / name

    return made


CASES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "nothing there": (lambda f: f / "nowhere", ("no such directory", "config.json")),
    "config.json": (file_in("config.json"), ("is a file of a model; give its directory",)),
    "a weight file": (file_in("model.safetensors"), ("give its directory",)),
    "a GGUF file": (file_in("m.gguf"), ("does not begin as a GGUF file", "fetch it again")),
    "a pickle": (file_in("pytorch_model.bin"), ("PyTorch", "save_pretrained")),
    "empty": (emptied, ("is empty",)),
    "a parent": (lambda f: f.parent, ("give one of model in it",)),
    "no config": (lambda f: emptied(f, "model.safetensors"), ("has no config.json",)),
    "no weights": (emptied_of_weights, ("fetch the model's weights too",)),
    "LoRA": (lora, ("LoRA adapter of 'Qwen/Qwen3.5-4B'", "merge")),
    "hub cache": (cache_root, ("cache folder", "give a snapshot", "snapshots/bbb")),
    "unfinished": (unfinished, (".incomplete", "run it again")),
    "dangling link": (dangling, ("a link to a file that is gone",)),
    "pickles": (pickled, ("pytorch_model.bin are PyTorch files", "save_pretrained")),
    "no index": (shards_without_index, ("without model.safetensors.index.json",)),
    "lost shards": (missing_shards, ("shards missing", "and 12 more", ".incomplete")),
    "GGUF folder": (only_gguf, ("model-Q4_K_M.gguf", "give the path of the file")),
    "git-lfs pointer": (lfs_pointer, ("pointer of git-lfs", "git lfs pull")),
    "MLX": (mlx, ("written by MLX",)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_given_is_named_and_so_is_the_way_out(case: str, model: Path) -> None:
    made, words = CASES[case]
    text = refusal(made(model))
    assert all(word in text for word in words), text


def test_a_hub_name_is_told_how_to_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = refusal("Qwen/Qwen3.5-4B")
    assert "`flashrt pull Qwen/Qwen3.5-4B`" in text


def test_home_is_expanded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert open_checkpoint("~/model").path == model
    assert "no such directory" in refusal("~/elsewhere")


@pytest.mark.parametrize("path", [None, 5, "", b"x", "a\0b", "x" * 5000])
def test_what_is_no_path_is_refused(path: object) -> None:
    refusal(path)


def test_a_policy_and_a_language_model_are_told_apart(tmp_path: Path) -> None:
    assert "flashrt.load_policy" in refusal(bundled_policies()["two-doors"])
    for path, words in {
        bundled_checkpoint(): "language models load with flashrt.load",
        "two-dors": "no bundled policy; there are",
        tmp_path: "is empty",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            flashrt.load_policy(path, device="cpu")
    (tmp_path / "config.json").write_text('{"type": "diffusion", "chunk_size": 100}')
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="policy of type 'diffusion', as LeRobot"):
        flashrt.load_policy(tmp_path, device="cpu")


# ---- quantised ----


def tensors_named(*names: str) -> dict[str, np.ndarray]:
    return {name: np.zeros((2, 2), np.uint8) for name in names}


REFUSED: dict[str, tuple[dict[str, object], dict[str, np.ndarray]]] = {
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        tensors_named("model.a.weight.absmax"),
    ),
    "mlx": (
        {"quantization": {"group_size": 64, "bits": 4}},
        tensors_named("model.a.scales", "model.a.biases"),
    ),
    "mxfp4": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        tensors_named("model.a.weight_blocks", "model.a.weight_scales"),
    ),
}


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_formats_that_are_not_read_are_named(case: str, is_nested: bool, model: Path) -> None:
    """Red when hundreds of tensor names are all that is said."""
    section, tensors = REFUSED[case]
    config = json.loads((model / "config.json").read_text())
    made = {"model_type": "qwen3_5", "text_config": config | section} if is_nested else section
    (model / "config.json").write_text(json.dumps(config | made))
    safetensors.numpy.save_file(tensors, model / "model.safetensors")
    text = refusal(model)
    assert case in text.lower() and "which is not read" in text and "made from" in text
    assert len(text.splitlines()) == 1


def test_a_config_that_only_claims_to_be_quantised(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config))
    assert "quantised (fp8), but they are stored as plain numbers" in refusal(model)
