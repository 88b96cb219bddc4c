"""SmolVLA: what its files have beside what every family's have, see test_policy_families.

The VLM's own files, a newline behind a task, and real-time chunking's weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import flashrt
from flashrt.base.errors import CheckpointError
from flashrt.hub.names import hub_name
from flashrt.models.smolvla.config import parse_config
from flashrt.models.vla.guidance import Guidance, Schedule
from tests.policy_families import FAMILIES, SMOLVLA, change, refused, step_of
from tests.smolvla_policies import smolvla_config

FAMILY = FAMILIES[SMOLVLA]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return FAMILY.write(tmp_path / "policy")


def test_every_problem_of_a_config_is_named() -> None:
    for fields, said in (
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha is True; supported: False"),
        ({"add_image_special_tokens": True}, "add_image_special_tokens is True"),
        ({"attention_mode": "both"}, "attention_mode is 'both'; supported: cross_attn, self_attn"),
        ({"resize_imgs_with_padding": None}, r"resize_imgs_with_padding is None; supported: \[n"),
        ({"num_expert_layers": 3}, "num_vlm_layers 4 is no multiple of num_expert_layers 3"),
        ({"vlm_model_name": ""}, "vlm_model_name is '', expected a name or a folder"),
        ({"num_expert_layers": 2}, "layer 2 of the expert gets inputs of another size"),
    ):
        whole = smolvla_config({"top": (64, 64)}, state=3, action=3, **fields)
        with pytest.raises(CheckpointError, match=said):
            parse_config(whole)


def test_the_vlms_files_are_found_or_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the policy's folder, where its config says, or among what was fetched."""
    seen, cache = FAMILY.observation(1), tmp_path / "cache"
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


def test_a_vlm_that_does_not_fit_is_refused(folder: Path) -> None:
    file = folder / "vlm" / "config.json"
    whole = file.read_text()
    for edit, said in (
        (lambda c: c["text_config"].update(num_key_value_heads=3), "do not divide among"),
        (lambda c: c["text_config"].pop("num_key_value_heads"), "num_key_value_heads is None"),
        (lambda c: c["vision_config"].update(image_size=32), "the policy resizes images to"),
        (lambda c: c["vision_config"].update(hidden_act="gelu"), "hidden_act of vision_conf"),
        (lambda c: c.update(scale_factor=2), "an image becomes 4 rows; 5 are needed"),
    ):
        change(file, edit)
        assert said in refused(folder), said
        file.write_text(whole)


def test_layers_of_the_vlm_that_are_not_used_stay_where_they_are(folder: Path) -> None:
    """Fault: a file of the whole VLM is refused, or its layers take memory."""
    weights, found = folder / "model.safetensors", []
    tensors = safetensors.numpy.load_file(weights)
    more = "model.vlm_with_expert.vlm.model.text_model.layers.2.mlp.up_proj.weight"
    for stored in (tensors, tensors | {more: np.ones((3, 3), np.float32)}):
        safetensors.numpy.save_file(stored, weights)
        with flashrt.load_policy(folder, device="cpu") as engine:
            found.append((engine.fingerprint, engine.stats()["weights_bytes"]))
    assert found[0] == found[1]


def test_a_task_ends_its_line(folder: Path) -> None:
    """Where the preprocessor has that step. Fault: a newline that the policy was not trained with,
    or one too many.
    """
    before = folder / "policy_preprocessor.json"

    def tokens(task: str) -> tuple[int, ...]:
        with flashrt.load_policy(folder, device="cpu") as engine:
            packed: Any = engine.pack(FAMILY.observation(1) | {"task": task})
            return tuple(packed.tokens)

    def length(content: dict[str, Any]) -> None:
        step_of(content, "tokenizer_processor")["config"].update(max_length=40)

    def lines(content: dict[str, Any]) -> None:
        content["steps"].remove(step_of(content, "smolvla_new_line_processor"))

    change(before, length)
    whole = tokens("push it left")
    assert tokens("push it left\n") == whole
    change(before, lines)
    assert tokens("push it left") == whole[:-1] and len(whole) > 9


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
