"""SmolVLA: what is wrong with a policy's files is named, and what is read from them is right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import flashrt
from flashrt.base.errors import CheckpointError
from flashrt.hub.names import hub_name
from flashrt.models.smolvla.config import parse_config
from flashrt.models.vla import reading
from flashrt.models.vla.guidance import Guidance, Schedule
from flashrt.text.tokenizer import Tokenizer
from tests.smolvla_policies import (
    SETS,
    TASKS,
    observation_of,
    smolvla_config,
    write_random_smolvla,
)

Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_smolvla(tmp_path / "policy", *SETS["tiny"])


def change(file: Path, edit: Callable[[Json], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        flashrt.load_policy(folder, device="cpu")
    return str(caught.value)


def test_every_problem_of_a_config_is_named() -> None:
    for fields, said in (
        ({"chunk_size": 0}, "chunk_size is 0, expected an integer from 1"),
        ({"n_action_steps": 11}, "n_action_steps 11 exceeds chunk_size 10"),
        ({"n_obs_steps": 2}, "n_obs_steps is 2; supported: 1"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha is True; supported: False"),
        ({"add_image_special_tokens": True}, "add_image_special_tokens is True"),
        ({"attention_mode": "both"}, "attention_mode is 'both'; supported: cross_attn, self_attn"),
        ({"resize_imgs_with_padding": None}, r"resize_imgs_with_padding is None; supported: \[n"),
        ({"num_expert_layers": 3}, "num_vlm_layers 4 is no multiple of num_expert_layers 3"),
        ({"min_period": 0}, "min_period is 0, expected a positive number"),
        ({"max_state_dim": 2}, "a vector of 3 exceeds max_state_dim 2"),
        ({"rtc_config": {"enabled": True, "execution_horizon": 0}}, "execution_horizon 0"),
        ({"rtc_config": 3}, "rtc_config is 3, expected null or fields"),
        ({"vlm_model_name": ""}, "vlm_model_name is '', expected a name or a folder"),
        ({"output_features": {}}, "output_features is {}"),
        ({"input_features": {"observation.state": {"type": "STATE", "shape": [3]}}}, "an image"),
        ({"num_expert_layers": 2}, "layer 2 of the expert gets inputs of another size"),
    ):
        whole = smolvla_config({"top": (64, 64)}, state=3, action=3, **fields)
        with pytest.raises(CheckpointError, match=said):
            parse_config(whole)


def test_what_a_config_leaves_out_is_lerobots() -> None:
    features = smolvla_config({"top": (480, 640), "empty_camera_0": (480, 640)}, 6, 6)
    names = ("input_features", "output_features")
    c = parse_config({name: features[name] for name in names})
    assert (c.chunk_size, c.n_action_steps, c.max_state_dim, c.side) == (50, 50, 32, 512)
    assert (c.num_steps, c.num_vlm_layers, c.num_expert_layers) == (10, 16, 16)
    assert [camera.name for camera in c.cameras] == ["observation.images.top"]
    assert c.observation_dim == 6 + 480 * 640 * 3 + 2 + 48
    assert c.guidance is None and c.lags


def test_the_vlms_files_are_found_or_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the policy's folder, where its config says, or among what was fetched."""
    seen, cache = observation_of(SETS["tiny"][0], 1), tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))

    def chunk() -> bytes:
        with flashrt.load_policy(folder, device="cpu") as engine:
            engine.observe(engine.lanes[0], seen)
            engine.plan(engine.lanes[0])
            return engine.chunk(engine.lanes[0]).tobytes()

    first = chunk()
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / "vlm", elsewhere)
    change(folder / "config.json", lambda c: c.update(vlm_model_name=str(elsewhere)))
    assert chunk() == first
    change(folder / "config.json", lambda c: c.update(vlm_model_name="someone/small-vlm"))
    said = refused(folder)
    assert "no config.json of that is here; put config.json and tokenizer.json" in said
    assert "flashrt pull someone/small-vlm" in said
    model = hub_name("someone/small-vlm")
    assert model is not None
    fetched = cache / "models--someone--small-vlm"
    (fetched / "refs").mkdir(parents=True)
    (fetched / "refs" / "main").write_text("0" * 40)
    shutil.copytree(elsewhere, fetched / "snapshots" / ("0" * 40))
    assert chunk() == first
    (fetched / "snapshots" / ("0" * 40) / "tokenizer.json").unlink()
    assert "no tokenizer.json of 'someone/small-vlm'; put" in refused(folder)


def test_files_that_do_not_fit_are_refused(folder: Path) -> None:
    vlm, before = folder / "vlm" / "config.json", folder / "policy_preprocessor.json"
    for file, edit, said in (
        (vlm, lambda c: c["text_config"].update(num_key_value_heads=3), "do not divide among"),
        (vlm, lambda c: c["text_config"].pop("num_key_value_heads"), "num_key_value_heads is None"),
        (vlm, lambda c: c["vision_config"].update(image_size=32), "the policy resizes images to"),
        (vlm, lambda c: c["vision_config"].update(hidden_act="gelu"), "hidden_act of vision_conf"),
        (vlm, lambda c: c.update(scale_factor=2), "an image becomes 4 rows; 5 are needed"),
        (before, lambda c: c["steps"].append({"registry_name": "crop"}), "step 'crop' is not"),
        (before, lambda c: c["steps"].pop(3), "has no step tokenizer_processor"),
        (before, lambda c: c["steps"][3]["config"].update(task_key="goal"), "task_key is 'goal'"),
        (before, lambda c: c["steps"][3]["config"].update(truncation=False), "truncation is False"),
        (before, lambda c: c["steps"][3]["config"].update(max_length=0), "max_length is 0"),
        (before, lambda c: c["steps"][5]["config"]["norm_map"].update(STATE="LOG"), "'LOG'"),
    ):  # fmt: skip
        whole = file.read_text()
        change(file, edit)
        assert said in refused(folder), said
        file.write_text(whole)
    weights = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    lost = "model.vlm_with_expert.lm_expert.layers.1.self_attn.k_proj.weight"
    for wrong, said in (
        ({n: v for n, v in tensors.items() if n != lost}, f"missing {lost}"),
        (tensors | {"model.state_proj.weight": np.ones((32, 5), np.float32)}, "state_proj.weight"),
        (tensors | {"model.other.weight": np.ones(3, np.float32)}, "unused model.other.weight"),
    ):
        safetensors.numpy.save_file(wrong, weights)
        assert said in refused(folder), said


def test_names_of_a_compiled_policy_are_the_same_tensors(folder: Path) -> None:
    """And layers of the VLM beyond those that are used are left where they are."""
    weights, digests = folder / "model.safetensors", []
    tensors = safetensors.numpy.load_file(weights)
    more = "model.vlm_with_expert.vlm.model.text_model.layers.2.mlp.up_proj.weight"
    renamed = {n.replace("model.", "model._orig_mod.", 1): v for n, v in tensors.items()}
    for stored in (tensors, renamed | {more: np.ones((3, 3), np.float32)}):
        safetensors.numpy.save_file(stored, weights)
        with flashrt.load_policy(folder, device="cpu") as engine:
            digests.append(engine.fingerprint)
    assert digests[0] == digests[1]


def test_a_task_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a tokenizer that runs at every tick."""
    with flashrt.load_policy(folder, device="cpu") as engine:
        seen = observation_of(SETS["tiny"][0], 1)
        first: Any = engine.pack(seen)
        monkeypatch.setattr(engine.policy._words, "_tokenizer", object())
        again: Any = engine.pack(seen)
        assert again.tokens == first.tokens and len(first.tokens) <= 12
        with pytest.raises(AttributeError):
            engine.pack({**seen, "task": TASKS[0] + " now"})


def test_files_of_a_policy_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a policy is made twice when it is loaded, each time with a tokenizer of its own."""
    reads: list[Path] = []

    def read(path: Path) -> Tokenizer:
        reads.append(path)
        return Tokenizer(path)

    monkeypatch.setattr(reading, "Tokenizer", read)
    with flashrt.load_policy(folder, device="cpu") as engine:
        assert reads == [folder / "vlm" / "tokenizer.json"]
        engine.pack(observation_of(SETS["tiny"][0], 1))
    assert len(reads) == 1


def test_a_task_is_read_as_the_preprocessor_says(folder: Path) -> None:
    """Fault: a newline or a length that the policy was not trained with."""
    before, seen = folder / "policy_preprocessor.json", {"task": "push it left"}

    def tokens() -> tuple[int, ...]:
        with flashrt.load_policy(folder, device="cpu") as engine:
            packed: Any = engine.pack(observation_of(SETS["tiny"][0], 1) | seen)
            return tuple(packed.tokens)

    change(before, lambda c: c["steps"][3]["config"].update(max_length=40))
    whole = tokens()
    change(before, lambda c: c["steps"].pop(2))
    assert whole[:-1] == tokens() and len(whole) > 9
    change(before, lambda c: c["steps"][2]["config"].update(max_length=5))
    assert tokens() == whole[:5]


def test_an_observation_is_a_vector_too(folder: Path) -> None:
    """As recordings have it. Fault: another observation comes back, or levels become floats."""
    with flashrt.load_policy(folder, device="cpu", lanes=2) as engine:
        for at, without in ((1, None), (2, "observation.images.wrist")):
            seen: Any = observation_of(SETS["tiny"][0], at)
            seen.pop(without, None)
            packed: Any = engine.pack(seen)
            vector = np.asarray(packed, np.float32)
            assert vector.shape == (engine.config.observation_dim,) == (packed.size,)
            back: Any = engine.taken(vector)
            assert back.tokens == packed.tokens and np.array_equal(back.state, packed.state)
            for ours, theirs in zip(back.images, packed.images, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or (ours.dtype == np.uint8 and np.array_equal(ours, theirs))
            for lane, observation in zip(engine.lanes, (seen, vector), strict=True):
                engine.reset(lane)
                engine.observe(lane, observation)
                engine.plan(lane)
            assert engine.digest(engine.lanes[0]) == engine.digest(engine.lanes[1])


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (Schedule.ZEROS, [1, 1, 0, 0, 0, 0]),
        (Schedule.ONES, [1, 1, 1, 1, 1, 0]),
        (Schedule.LINEAR, [1, 1, 0.75, 0.5, 0.25, 0]),
        (Schedule.EXP, [1, 1, 0.4875509, 0.1887703, 0.0413240, 0]),
    ],
)
def test_weights_fall_by_the_schedule(schedule: Schedule, wanted: list[float]) -> None:
    """Of 6 rows, 5 of which are left over, 2 executed meanwhile. See the golden sets for LINEAR."""
    guidance = Guidance(schedule, 10.0, 8)
    assert np.allclose(guidance.weights(6, 5, 2), wanted, atol=1e-6)
    assert not guidance.weights(6, 5, 2, 0).any()
    found = [guidance.strength(time) for time in (1.0, 0.5, 0.1, 0.05)]
    assert np.allclose(found, [10, 2, 82 / 9, 10], atol=1e-5)
