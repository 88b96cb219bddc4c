"""`flashrt plan` and `flashrt inspect` of checkpoints that do not run as they are, and notes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

import flashrt
from flashrt import cli
from flashrt.base.errors import CheckpointError, CheckpointWarning
from flashrt.weights.random_checkpoint import write_random_checkpoint

TINY = Path(__file__).parents[1] / "golden" / "tiny"

Capture = pytest.CaptureFixture[str]


def refusal(capsys: Capture, *arguments: object) -> str:
    """What stderr says of a command that refuses."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("flashrt: ") and "Traceback" not in captured.err
    return captured.err


def document(capsys: Capture, *arguments: object) -> Any:
    assert cli.main([str(a) for a in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def reconfigure(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("expected*"))


@pytest.fixture
def two_draft_layers(tmp_path: Path) -> Path:
    """As a checkpoint whose draft head has a second layer."""
    folder = write_random_checkpoint(tmp_path / "two", has_draft_head=True)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    second = {
        name.replace("mtp.layers.0.", "mtp.layers.1."): tensor
        for name, tensor in tensors.items()
        if name.startswith("mtp.layers.0.")
    }
    safetensors.numpy.save_file(tensors | second, path)
    reconfigure(folder, mtp_num_hidden_layers=2)
    return folder


def test_plan_takes_a_directory_or_a_shape(model: Path, capsys: Capture) -> None:
    """Red when one of two is ignored."""
    assert "not both" in refusal(capsys, "plan", model, "--shape", "tiny")
    assert "one of them" in refusal(capsys, "plan")


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_what_does_not_load_is_not_described_as_fine(
    command: str, model: Path, capsys: Capture
) -> None:
    """Red when only config.json is looked at."""
    reconfigure(model, quantization_config=GPTQ)
    assert "quantised (gptq), but they are stored as plain numbers" in refusal(
        capsys, command, model
    )
    reconfigure(model, quantization_config=None, intermediate_size=8)
    assert "expected [8, 64]" in refusal(capsys, command, model)
    assert "give its directory" in refusal(capsys, command, model / "config.json")


def test_plan_of_a_config_without_weights(model: Path, capsys: Capture) -> None:
    whole = document(capsys, "plan", model, "--json")
    headless = document(capsys, "plan", model, "--json", "--no-draft")
    (model / "model.safetensors").unlink()
    assert document(capsys, "plan", model, "--json") == whole != headless
    reconfigure(model, mtp_num_hidden_layers=0)
    assert document(capsys, "plan", model, "--json") == headless
    (model / "model-00001-of-00002.safetensors").touch()  # weights that do not load are no plan
    assert "model.safetensors.index.json" in refusal(capsys, "plan", model)


def test_a_second_draft_layer_is_left_out_on_request(
    two_draft_layers: Path, capsys: Capture
) -> None:
    """Red when the message names a way out that the command line does not have."""
    run = ("run", two_draft_layers, "--tokens", "1,2", "--max-tokens", "2", "--device", "cpu")
    for command in (("plan", two_draft_layers), run):
        text = refusal(capsys, *command)
        assert "mtp_num_hidden_layers is 2" in text and "--no-draft" in text
        assert cli.main([str(word) for word in (*command, "--no-draft")]) == 0
        capsys.readouterr()
    found = document(capsys, "inspect", two_draft_layers, "--json")
    assert "mtp_num_hidden_layers is 2" in found["draft_head"]
    assert flashrt.load(two_draft_layers, device="cpu", max_positions=64, draft=False).lanes


def test_a_draft_head_that_is_not_there(model: Path) -> None:
    with pytest.raises(CheckpointError, match="has no draft head; load without draft") as caught:
        flashrt.load(write_random_checkpoint(model.parent / "none"), device="cpu", draft=True)
    assert len(str(caught.value).splitlines()) == 2


def test_positions_beyond_those_of_training_are_said(model: Path) -> None:
    """Red when `max_position_embeddings` is not read."""
    reconfigure(model, max_position_embeddings=128)
    with pytest.warns(CheckpointWarning, match="max_positions is 129, beyond the 128"):
        flashrt.load(model, device="cpu", max_positions=129)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashrt.load(model, device="cpu", max_positions=128)
