"""ACT: what is wrong with a policy's files is named, and what is read from them is right."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from flashrt.base.errors import CheckpointError
from flashrt.models.act.config import parse_config
from flashrt.models.act.weights import scaling_of
from flashrt.weights.checkpoint import open_checkpoint
from tests.act_policies import SETS, act_config, write_random_act

GOLDEN = Path(__file__).parents[1] / "golden" / "act"
Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config, seed = SETS["no-camera"]
    tensors = json.loads((GOLDEN / "no-camera.json").read_text())["tensors"]
    return write_random_act(tmp_path / "policy", config, tensors, seed)


def change(file: Path, edit: Callable[[Json], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        flashrt.load_policy(folder, device="cpu")
    return str(caught.value)


def test_every_problem_of_a_config_is_named() -> None:
    config = act_config(
        {"top": (64, 64)}, state=3, dim_model=30, n_heads=4, chunk_size=0, n_action_steps=9,
        feedforward_activation="gelu", vision_backbone="resnet50", temporal_ensemble_coeff=0.01,
        n_obs_steps=2, replace_final_stride_with_dilation=True, pre_norm="no",
    )  # fmt: skip
    config["input_features"] |= {
        "observation.touch": {"type": "STATE", "shape": [4]},
        "observation.images.depth": {"type": "VISUAL", "shape": [1, 64, 64]},
        "observation.images.odd": {"type": "VISUAL", "shape": "64"},
    }
    del config["output_features"]["action"]
    with pytest.raises(CheckpointError) as caught:
        parse_config(config)
    for said in (
        "chunk_size is 0, expected an integer from 1", "no multiple of n_heads 4",
        "n_action_steps is 9: with temporal_ensemble_coeff it is 1",
        "feedforward_activation is 'gelu'",
        "n_obs_steps is 2", "replace_final_stride_with_dilation is True",
        "vision_backbone is 'resnet50'; supported: resnet18, resnet34",
    ):  # fmt: skip
        assert said in str(caught.value), said
    fields = {"chunk_size": 9, "n_action_steps": 9, "dim_model": 30, "n_heads": 3}
    for name in ("feedforward_activation", "vision_backbone", "temporal_ensemble_coeff",
                 "n_obs_steps", "replace_final_stride_with_dilation"):  # fmt: skip
        del config[name]
    with pytest.raises(CheckpointError) as caught:
        parse_config(config | fields)
    for said in (
        "observation.touch", "observation.images.depth of 'VISUAL' (1, 64, 64)",
        "input_features has observation.images.odd as", "output_features is {}",
        "dim_model 30 is no multiple of 4, as images need", "pre_norm is 'no'",
    ):  # fmt: skip
        assert said in str(caught.value), said
    with pytest.raises(CheckpointError, match=r"need an image, or observation\.environment_state"):
        parse_config(act_config({}, state=3))


def test_what_a_config_leaves_out_is_lerobots() -> None:
    features = act_config({"top": (480, 640), "wrist": (480, 640)}, state=14, action=14)
    names = ("input_features", "output_features")
    c = parse_config({name: features[name] for name in names})
    assert (c.chunk_size, c.n_action_steps, c.dim_model, c.dim_feedforward) == (100, 100, 512, 3200)
    assert (c.n_encoder_layers, c.n_decoder_layers, c.backbone) == (4, 1, "resnet18")
    assert c.observation_dim == 14 + 2 * 480 * 640 * 3


def test_processor_files_are_checked(folder: Path) -> None:
    before, after = (folder / f"policy_{side}processor.json" for side in ("pre", "post"))
    whole = before.read_text()

    def step(content: Json) -> Json:
        found: Json = content["steps"][3]
        return found

    for edit, said in (
        (lambda c: c["steps"].pop(3), "has no step normalizer_processor"),
        (lambda c: c.pop("steps"), "has no list of steps"),
        (lambda c: c["steps"].append({"registry_name": "crop"}), "step 'crop' is not supported"),
        (lambda c: c["steps"].append({"class": "os.system"}), "step 'os.system' is not supported"),
        (lambda c: c["steps"][0]["config"].update(rename_map={"a": "b"}), "without a rename_map"),
        (lambda c: step(c)["config"]["norm_map"].update(STATE="LOG"), "'STATE' is normalised by"),
        (lambda c: step(c)["config"].update(eps="small"), "eps is 'small'"),
        (lambda c: step(c).update(state_file="../secret"), "state_file is '../secret'"),
        (lambda c: step(c).update(state_file="gone.safetensors"), "gone.safetensors"),
    ):
        change(before, edit)
        assert said in refused(folder), said
        before.write_text(whole)
    statistics = folder / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    tensors = safetensors.numpy.load_file(statistics)
    for name, value, said in (
        ("observation.state.std", None, "needs std, which its statistics lack"),
        ("observation.state.std", np.ones(5, np.float32), "F32 [5], expected BF16, F16 or F32 [6]"),
        ("observation.state.std", -np.ones(6, np.float32), "positive numbers are needed"),
        ("observation.state.mean", np.full(6, np.nan, np.float32), "finite numbers are needed"),
    ):
        other = {n: v for n, v in tensors.items() if n != name or value is not None}
        other |= {} if value is None else {name: value}
        safetensors.numpy.save_file(other, statistics)
        assert said in refused(folder), said
    safetensors.numpy.save_file(tensors, statistics)
    flashrt.load_policy(folder, device="cpu").close()
    after.unlink()
    assert "policy_postprocessor.json: no such file" in refused(folder)


def test_tensors_that_do_not_fit_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    attention = "model.encoder.layers.0.self_attn.in_proj_weight"
    lost = {name: value for name, value in tensors.items() if name != attention}
    for wrong, said in (
        (lost, f"missing {attention} [48, 16]"),
        (lost | {attention: tensors[attention][:40]}, f"{attention} is F32 [40, 16], expected"),
        (tensors | {"model.extra": np.zeros(2, np.float32)}, "unused model.extra"),
    ):
        safetensors.numpy.save_file(wrong, file)
        assert said in refused(folder), said


def test_features_without_statistics_stay_as_they_are(folder: Path) -> None:
    """As LeRobot has it; red where statistics are asked for that nobody computed."""
    statistics = folder / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    tensors = safetensors.numpy.load_file(statistics)
    rest = {n: v for n, v in tensors.items() if not n.startswith("observation.state.")}
    safetensors.numpy.save_file(rest, statistics)
    source = open_checkpoint(folder)
    scaling = scaling_of(source, parse_config(source.config))
    assert str(scaling.modes["observation.state"]) == "IDENTITY"
    flashrt.load_policy(folder, device="cpu").close()


def test_flashrt_load_says_where_to_go(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"flashrt\.load_policy"):
        flashrt.load(folder, device="cpu")
    config, _ = SETS["no-camera"]
    (folder / "config.json").write_text(json.dumps(config | {"type": "diffusion"}))
    assert "a policy of type 'diffusion', as LeRobot stores them" in refused(folder)


_NUMBERS = st.integers(-2, 70) | st.sampled_from([2**31, -(2**70), 10**400]) | st.floats()
_SCALARS = st.none() | st.booleans() | _NUMBERS | st.text(max_size=6)
_VALUES = st.recursive(
    _SCALARS,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_config_is_read_or_refused(data: st.DataObject) -> None:
    """Only CheckpointErrors come out, whatever a field, a feature or a shape is."""
    config = json.loads(json.dumps(SETS["plain"][0]))
    name = data.draw(st.sampled_from([*config, "temporal_ensemble_coeff"]))
    value = data.draw(_VALUES)
    if name in ("input_features", "output_features") and data.draw(st.booleans()):
        feature = data.draw(st.sampled_from(list(config[name])))
        key = data.draw(st.sampled_from(["type", "shape"]))
        config[name][feature][key] = value
    else:
        config[name] = value
    with contextlib.suppress(CheckpointError):
        parse_config(config)
