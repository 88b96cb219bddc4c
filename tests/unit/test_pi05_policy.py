"""pi0.5: what its files have beside what every family's have, see test_policy_families.

Sizes that the tensors alone tell, names of other writers, and the state, which is text.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import flashrt
from flashrt.base.errors import CheckpointError
from flashrt.models.pi05.config import parse_config
from flashrt.models.pi05.model import pi05_of
from flashrt.weights.checkpoint import open_checkpoint
from tests.pi05_policies import PREFIX, SETS, tensors_of, write_random_pi05
from tests.policy_families import FAMILIES, PI05, change, refused, step_of
from tests.policy_files import random_statistics

NAME = "one-camera"
FAMILY = FAMILIES[PI05]
PREPARE = "pi05_prepare_state_tokenizer_processor_step"
HEAD, TABLE = (
    f"{PREFIX}.paligemma.{name}.weight" for name in ("lm_head", "model.language_model.embed_tokens")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return FAMILY.write(tmp_path / "policy")


def test_images_are_resized_to_squares() -> None:
    wrong = FAMILY.config | {"image_resolution": [224, 200]}
    with pytest.raises(CheckpointError, match=r"image_resolution is \[224, 200\]; supported: \[n"):
        parse_config(wrong)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    whole = tensors_of(NAME)
    key = f"{PREFIX}.paligemma.model.language_model.layers.0.self_attn.k_proj.weight"
    fc1 = f"{PREFIX}.paligemma.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    for name, values, said in (
        (HEAD, None, "embed_tokens.weight is missing"),
        (key, whole[key][:15], "q_proj has 64 rows and k_proj 15"),
        (fc1, whole[fc1][:, :70], "the tower has 70 columns; heads of 72 are supported"),
        ("model.time_mlp_in.bias", None, "missing model.time_mlp_in.bias"),
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


def test_the_step_that_writes_the_state_is_read(folder: Path) -> None:
    """Fault: a policy runs that does not see its state, or reads more or fewer numbers of it."""
    file = folder / "policy_preprocessor.json"
    whole = file.read_text()
    for edit, said in (
        (lambda c: c["steps"].remove(step_of(c, PREPARE)), f"{PREPARE}:"),
        (lambda c: step_of(c, PREPARE)["config"].update(task_key="goal"), "task_key is 'goal'"),
    ):
        change(file, edit)
        assert said in refused(folder)
        file.write_text(whole)
    change(file, lambda c: step_of(c, PREPARE)["config"].update(max_state_dim=5))
    text = pi05_of(open_checkpoint(folder))[0]._text.of("", np.zeros(2, np.float32))
    assert text.endswith("128 128 128;\nAction: ")


def test_names_of_other_writers_are_read(folder: Path, tmp_path: Path) -> None:
    """Of openpi's conversion, with what LeRobot leaves out, and of one whose embeddings are stored
    by their own name. Fault: a tensor under another name, or one that is not used, is not told
    apart.
    """
    whole = tensors_of(NAME)
    renamed = {
        n.removeprefix("model.").replace("time_mlp_", "action_time_mlp_"): v
        for n, v in whole.items()
    }
    renamed["state_proj.weight"] = np.zeros((2, 3), np.float32)
    renamed[f"{PREFIX.removeprefix('model.')}.gemma_expert.model.norm.weight"] = np.ones(64)
    untied = whole | {TABLE: whole[HEAD]}
    del untied[HEAD]
    digests = set()
    for i, tensors in enumerate((whole, renamed, untied)):
        policy = write_random_pi05(NAME, tmp_path / f"{i}", tensors)
        with flashrt.load_policy(policy, device="cpu") as engine:
            engine.observe(engine.lanes[0], FAMILY.observation(1))
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
        engine.pack(FAMILY.observation(1))


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
