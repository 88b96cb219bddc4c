"""pi0.5: what is wrong with a policy's files is named, and what is read from them is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import flashrt
from flashrt.base.errors import CheckpointError, ObservationError
from flashrt.models.pi05.config import parse_config
from flashrt.models.pi05.model import pi05_of
from flashrt.weights.checkpoint import open_checkpoint
from tests.act_policies import random_statistics
from tests.pi05_policies import (
    PREFIX,
    SETS,
    observation_of,
    pi05_config,
    tensors_of,
    write_random_pi05,
)

NAME = "one-camera"
Json = dict[str, Any]
HEAD, TABLE = (
    f"{PREFIX}.paligemma.{name}.weight" for name in ("lm_head", "model.language_model.embed_tokens")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_random_pi05(NAME, tmp_path / "policy")


def change(file: Path, edit: Callable[[Json], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        flashrt.load_policy(folder, device="cpu")
    return str(caught.value)


def test_every_problem_of_a_config_is_named() -> None:
    config = pi05_config(
        {"top": (64, 64)}, state=9, action=4, chunk_size=0, n_action_steps=9, max_state_dim=8,
        max_action_dim=3, image_resolution=[224, 200], n_obs_steps=2, min_period="short",
        rtc_config={"enabled": True, "prefix_attention_schedule": "SOME"},
    )  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        parse_config(config)
    for said in (
        "chunk_size is 0, expected an integer from 1", "n_action_steps 9 exceeds chunk_size",
        "a vector of 9 exceeds max_state_dim 8", "a vector of 4 exceeds max_action_dim 3",
        "image_resolution is [224, 200]; supported: [n, n]", "n_obs_steps is 2",
        "min_period is 'short'", "prefix_attention_schedule 'SOME'",
    ):  # fmt: skip
        assert said in str(caught.value), said
    del config["input_features"]["observation.images.top"]
    with pytest.raises(CheckpointError, match=r"need observation\.state and an image"):
        parse_config(config)


def test_what_a_config_leaves_out_is_lerobots() -> None:
    features = pi05_config({"top": (480, 640), "empty_camera_0": (224, 224)}, state=14, action=14)
    c = parse_config({name: features[name] for name in ("input_features", "output_features")})
    assert (c.chunk_size, c.n_action_steps, c.num_inference_steps, c.side) == (50, 50, 10, 224)
    assert (c.max_state_dim, c.max_action_dim, c.tokenizer_max_length) == (32, 32, 200)
    assert [camera.name for camera in c.cameras] == ["observation.images.top"]
    assert c.observation_dim == 14 + 480 * 640 * 3 + 202


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    whole = tensors_of(NAME)
    key = f"{PREFIX}.paligemma.model.language_model.layers.0.self_attn.k_proj.weight"
    fc1 = f"{PREFIX}.paligemma.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    for name, values, said in (
        (HEAD, None, "embed_tokens.weight is missing"),
        (key, whole[key][:15], "q_proj has 64 rows and k_proj 15"),
        (fc1, whole[fc1][:, :70], "the tower has 70 columns; heads of 72 are supported"),
        ("model.time_mlp_in.bias", None, "missing model.time_mlp_in.bias"),
        ("model.more", np.zeros(3, np.float32), "unused model.more"),
    ):
        tensors = {n: v for n, v in (whole | {name: values}).items() if v is not None}
        assert said in refused(write_random_pi05(NAME, tmp_path, tensors))


def test_images_that_do_not_fit_are_named(folder: Path) -> None:
    for side, said in ((45, "is no multiple of the tower's patches of 14"), (28, "becomes 4 rows")):
        change(folder / "config.json", lambda c, side=side: c.update(image_resolution=[side, side]))
        assert said in refused(folder)
    change(folder / "config.json", lambda c: c.update(image_resolution=[42, 42]))
    camera = {"observation.images.top.mean": np.zeros((3, 1, 1), np.float32)}
    camera["observation.images.top.std"] = np.ones((3, 1, 1), np.float32)
    file = folder / "policy_preprocessor_step_2_normalizer_processor.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(file) | camera, file)
    change(
        folder / "policy_preprocessor.json",
        lambda c: c["steps"][2]["config"]["norm_map"].update(VISUAL="MEAN_STD"),
    )
    assert "observation.images.top is normalised by MEAN_STD" in refused(folder)


def test_steps_of_the_preprocessor_are_read(folder: Path) -> None:
    """Fault: a text is cut elsewhere, or a policy runs that does not see its state."""
    file = folder / "policy_preprocessor.json"
    whole = file.read_text()
    for edit, said in (
        (lambda c: c["steps"].pop(3), "pi05_prepare_state_tokenizer_processor_step:"),
        (lambda c: c["steps"].pop(4), "has no step tokenizer_processor"),
        (lambda c: c["steps"][3]["config"].update(task_key="goal"), "task_key is 'goal'"),
        (lambda c: c["steps"][4]["config"].update(truncation=False), "truncation is False"),
        (lambda c: c["steps"][4]["config"].update(tokenizer_name=3), "tokenizer_name is 3"),
    ):
        change(file, edit)
        assert said in refused(folder)
        file.write_text(whole)
    change(file, lambda c: c["steps"][4]["config"].update(max_length=7))
    change(file, lambda c: c["steps"][3]["config"].update(max_state_dim=5))
    with flashrt.load_policy(folder, device="cpu") as engine:
        packed: Any = engine.pack(observation_of(NAME, 1))
        assert len(packed.tokens) == 7
    text = pi05_of(open_checkpoint(folder))[0]._text.of("", np.zeros(2, np.float32))
    assert text.endswith("128 128 128;\nAction: ")


def test_names_of_other_writers_are_read(folder: Path, tmp_path: Path) -> None:
    """Of openpi's conversion, of a policy that was compiled, with what LeRobot leaves out too.
    Fault: a tensor under another name, or one that is not used, is not told apart.
    """
    whole = tensors_of(NAME)
    renamed = {
        n.removeprefix("model.").replace("time_mlp_", "action_time_mlp_"): v
        for n, v in whole.items()
    }
    compiled = {n.replace("model.", "model._orig_mod.", 1): v for n, v in whole.items()}
    renamed["state_proj.weight"] = np.zeros((2, 3), np.float32)
    renamed[f"{PREFIX.removeprefix('model.')}.gemma_expert.model.norm.weight"] = np.ones(64)
    compiled[TABLE] = compiled.pop(HEAD.replace("model.", "model._orig_mod.", 1))
    digests = set()
    for i, tensors in enumerate((whole, renamed, compiled)):
        policy = write_random_pi05(NAME, tmp_path / f"{i}", tensors)
        with flashrt.load_policy(policy, device="cpu") as engine:
            engine.observe(engine.lanes[0], observation_of(NAME, 1))
            engine.plan(engine.lanes[0])
            digests.add(engine.digest(engine.lanes[0]))
    assert len(digests) == 1


def test_a_tokenizer_is_needed_that_is_the_models(folder: Path) -> None:
    file = folder / "tokenizer.json"
    whole = file.read_text()
    file.unlink()
    said = refused(folder)
    assert "flashrt pull google/paligemma-3b-pt-224" in said and "tokenizer.json" in said
    file.write_text(re.sub(r'"1": \d+', '"1": 999', whole))
    with (
        flashrt.load_policy(folder, device="cpu") as engine,
        pytest.raises(CheckpointError, match="token 999 of a vocabulary of 300"),
    ):
        engine.pack(observation_of(NAME, 1))


def test_the_state_is_text(folder: Path) -> None:
    """Bins of the quantiles' range, zeros for what a policy lacks. Fault: another edge of a bin."""
    model, _ = pi05_of(open_checkpoint(folder))
    config, _, seed = SETS[NAME]
    assert config["max_state_dim"] == 3
    found = random_statistics("observation.state", (2,), seed)
    low, high = found["q01"], found["q99"]
    for share, numbers in ((0.0, "0 0"), (1.0, "255 255"), (-1.0, "-1 -1"), (0.751, "192 192")):
        text = model._text.of(" pick_it\nup ", low + np.float32(share) * (high - low))
        assert text == f"Task: pick it up, State: {numbers} 128;\nAction: "


def test_a_vector_is_an_observation_too(folder: Path) -> None:
    """As recordings have it. Fault: tokens that are no tokens reach the table."""
    with flashrt.load_policy(folder, device="cpu") as engine:
        lane, seen = engine.lanes[0], observation_of(NAME, 2)
        vector = np.asarray(engine.pack(seen), np.float32)
        digests = set()
        for observation in (seen, vector):
            engine.reset(lane)
            engine.observe(lane, observation)
            engine.plan(lane)
            digests.add(engine.digest(lane))
        assert len(digests) == 1
        vector[-59] = 300  # the first token
        with pytest.raises(ObservationError, match=r"tokens in \[0, 300\)"):
            engine.observe(lane, vector)
