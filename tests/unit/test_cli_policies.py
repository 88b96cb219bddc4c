"""`flashrt plan` and `flashrt inspect` of robot policies, as a user meets them."""

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
from flashrt import cli
from flashrt.base.errors import FlashrtError
from flashrt.weights.bundled_policies import bundled_policies
from tests import act_policies, pi05_policies, policy_families, smolvla_policies

Capture = pytest.CaptureFixture[str]
Json = dict[str, Any]


# A policy of each family: what writes it into a folder, or gives its name.
POLICIES: dict[str, Callable[[Path], str | Path]] = {
    "flashrt_policy": lambda folder: "two-doors",
    "act": policy_families.FAMILIES[policy_families.ACT].write,
    "smolvla": policy_families.FAMILIES[policy_families.SMOLVLA].write,
    "pi05": policy_families.FAMILIES[policy_families.PI05].write,
    "bundled": lambda folder: "pusht",
}
FAMILIES = tuple(POLICIES)


@pytest.fixture
def smolvla(tmp_path: Path) -> Path:
    return Path(POLICIES["smolvla"](tmp_path / "policy"))


def document(capsys: Capture, *arguments: object) -> Any:
    """The JSON document that a command prints."""
    assert cli.main([str(a) for a in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: Capture, *arguments: object) -> str:
    """What stderr says of a command that refuses."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("flashrt: ") and "Traceback" not in captured.err
    return captured.err


def refused_by_load(policy: object, **options: Any) -> str:
    with pytest.raises(FlashrtError) as caught:
        flashrt.load_policy(policy, device="cpu", **options)  # type: ignore[arg-type]
    return str(caught.value)


def set_value(file: Path, name: str, value: float) -> None:
    """The first number of a tensor."""
    tensors = safetensors.numpy.load_file(file)
    tensors[name].reshape(-1)[0] = value
    safetensors.numpy.save_file(tensors, file)


# -- plan -----------------------------------------------------------------------------------------


def check_plan(planned: Json, engine: Any) -> None:
    """Sizes, regions with their offsets, and scratch of every tape are those of an engine."""
    stats, plan = engine.stats(), engine.arena.plan
    for name in ("arena_bytes", "weights_bytes", "scratch_bytes"):
        assert planned[name] == stats[name], name
    regions = [r for band in planned["bands"] for r in band["regions"]]
    assert sorted((r["name"], r["offset"]) for r in regions) == sorted(
        (s.region.name, s.offset) for s in plan.slots()
    )
    scratch = {
        (tape["phase"], tape["rows"]): [(r["name"], r["offset"]) for r in tape["scratch"]]
        for tape in planned["tapes"]
    }
    assert scratch == {
        key: [(s.region.name, s.offset) for s in slots] for key, slots in plan.tapes.items()
    }
    (pool,) = [band["bytes"] for band in planned["bands"] if band["band"] == "pool"]
    assert pool == plan.pool.nbytes


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_is_what_load_policy_allocates(family: str, tmp_path: Path, capsys: Capture) -> None:
    """Fault: a plan with the pool or the tapes of language models, or of another count of lanes."""
    policy = POLICIES[family](tmp_path / "policy")
    with flashrt.load_policy(policy, device="cpu") as engine:
        check_plan(document(capsys, "plan", policy), engine)
    planned = document(capsys, "plan", policy, "--lanes", 3, "--pool-bytes", 5000)
    with flashrt.load_policy(policy, device="cpu", lanes=3, pool_bytes=5000) as engine:
        check_plan(planned, engine)


@pytest.mark.parametrize("family", ["smolvla", "pi05"])
def test_weights_are_planned_as_they_are_loaded(
    family: str, tmp_path: Path, capsys: Capture
) -> None:
    """Fault: `--weights` is not passed on."""
    policy = POLICIES[family](tmp_path / "policy")
    plain, coded = (document(capsys, "plan", policy, *w) for w in ((), ("--weights", "int8")))
    assert coded["weights_bytes"] < plain["weights_bytes"]
    with flashrt.load_policy(policy, device="cpu", weights="int8") as engine:
        check_plan(coded, engine)


def test_what_load_policy_refuses_is_not_planned(tmp_path: Path, capsys: Capture) -> None:
    """Fault: a plan of an engine that cannot be loaded."""
    for options, way in (
        ({"weights": "int4"}, ("--weights", "int4")),
        ({"lanes": 5000}, ("--lanes", 5000)),
        ({"pool_bytes": 1 << 50}, ("--pool-bytes", 1 << 50)),
    ):
        said = refused_by_load("two-doors", **options)
        assert said in refusal(capsys, "plan", "two-doors", *way)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (("--max-positions", 4096), "--max-positions"),
        (("--kv-dtype", "bfloat16"), "--kv-dtype"),
        (("--prefill-rows", 256), "--prefill-rows"),
        (("--no-draft",), "--no-draft"),
    ],
)
def test_options_of_language_models_are_refused(
    given: tuple[object, ...], name: str, capsys: Capture
) -> None:
    """By name, if they are given with the usual value too. Fault: ignored in silence."""
    said = refusal(capsys, "plan", "pusht", "--lanes", 2, *given)
    assert f"robot policy; for language models alone are {name}: leave them out" in said


def test_the_map_of_a_policy_says_what_it_is_of(tmp_path: Path, capsys: Capture) -> None:
    """Fault: a map of tokens and logits, or the scratch of a tape that has none."""
    svg = tmp_path / "arena.svg"
    assert cli.main(["plan", "pusht", "--svg", str(svg)]) == 0
    text = capsys.readouterr().out
    for name in ("cursor", "queue", "keys", "images.0", "plan_step/10", "look/1", "saved"):
        assert name in text
    drawn = svg.read_text()
    assert "scratch of read/57:" in drawn and "observations" in drawn
    assert "token" not in drawn and "logits" not in drawn
    assert cli.main(["plan", "two-doors", "--svg", str(svg)]) == 0
    assert "scratch of plan/1:" in svg.read_text()  # not of the step with the highest number


def test_a_policy_without_weights_is_not_planned(smolvla: Path, capsys: Capture) -> None:
    """Its sizes are those of tensors. Fault: its config is taken for a language model's."""
    (smolvla / "model.safetensors").unlink()
    assert "fetch the model's weights too" in refusal(capsys, "plan", smolvla)
    assert "fetch the model's weights too" in refusal(capsys, "inspect", smolvla)


# -- inspect --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_tells_what_a_load_has(family: str, tmp_path: Path, capsys: Capture) -> None:
    """Fault: sizes, memory or a digest that are not those of the engine."""
    policy = POLICIES[family](tmp_path / "policy")
    found = document(capsys, "inspect", policy, "--verify")
    with flashrt.load_policy(policy, device="cpu", pool_bytes=0) as engine:
        c, stats, (memory,) = engine.config, engine.stats(), found["memory"]
        for name in ("weights_bytes", "fixed_bytes", "rows_bytes", "arena_bytes"):
            assert memory[name] == stats[name], name
        assert memory["positions"] == engine.max_positions
        assert memory["total_bytes"] == stats["arena_bytes"] + stats["weights_bytes"]
        assert found["verified"]["digest"] == engine.load_report.digest
        for name in ("action_dim", "chunk_size", "n_action_steps", "num_inference_steps"):
            assert found[name] == getattr(c, name)
        if engine.observation_names():
            assert tuple(found["observation"]) == engine.observation_names()
        else:
            assert found["observation"]["observation"]["shape"] == [c.observation_dim]
    assert found["kind"] == "policy"
    assert found["type"] == ("smolvla" if family == "bundled" else family)
    assert cli.main(["inspect", str(policy), "--verify"]) == 0
    text = capsys.readouterr().out
    for words in ("Memory (one lane, no room for capsules)", "verified", "tokenizer", "chunk"):
        assert words in text


def test_sizes_of_a_smolvla(smolvla: Path, capsys: Capture) -> None:
    found = document(capsys, "inspect", smolvla)
    assert found["observation"] == {
        "observation.state": {"kind": "vector", "shape": [3]},
        "observation.images.top": {"kind": "image", "shape": [16, 16, 3]},
        "observation.images.wrist": {"kind": "image", "shape": [9, 20, 3]},
        "task": {"kind": "text", "max_tokens": 12},
    }
    assert found["stacks"] == {
        "language_model": {
            "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
            "vocab_size": smolvla_policies.VOCABULARY,
        },
        "expert": {
            "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 256,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        },
        "tower": {
            "num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 32,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "rows_per_image": 16,
        },
    }  # fmt: skip
    assert found["normalization"] == {
        "observation.images.top": "IDENTITY", "observation.images.wrist": "IDENTITY",
        "observation.state": "MEAN_STD", "action": "MEAN_STD",
    }  # fmt: skip
    assert found["processor_files"] == [
        "policy_preprocessor.json",
        "policy_postprocessor.json",
        "policy_preprocessor_step_5_normalizer_processor.safetensors",
        "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    ]
    assert found["has_tokenizer"] is True
    assert found["tokenizer"] == str(smolvla / "vlm" / "tokenizer.json")
    stored = smolvla_policies.tensors_of(*smolvla_policies.SETS["tiny"][:2])
    assert found["tensors"] == len(stored)
    assert found["parameters"] == sum(int(np.prod(shape)) for shape in stored.values())
    assert found["dtypes"] == {"F32": len(stored)} and found["files"] == ["model.safetensors"]


def test_sizes_of_an_act_and_what_it_does_not_use(tmp_path: Path, capsys: Capture) -> None:
    """Fault: the encoder of actions, which is for training, counts as loaded."""
    found = document(capsys, "inspect", act_policies.write_set("pre-norm", tmp_path / "policy"))
    assert found["observation"]["observation.images.top"]["shape"] == [32, 32, 3]
    sizes = {"hidden_size": 24, "intermediate_size": 30, "num_attention_heads": 2}
    assert found["stacks"] == {
        "backbone": {"type": "resnet18"},
        "encoder": {"num_hidden_layers": 2, **sizes},
        "decoder": {"num_hidden_layers": 2, **sizes},
    }
    assert (found["has_tokenizer"], found["tokenizer"]) == (None, "none needed")
    (note,) = found["notes"]
    assert note.startswith("1 tensors") and "model.encoder_latent_input_proj.weight" in note
    (note,) = document(capsys, "inspect", POLICIES["act"](tmp_path / "other"))["notes"]
    assert "model.vae_encoder" in note and "more" in note


def test_sizes_of_a_pi05(tmp_path: Path, capsys: Capture) -> None:
    found = document(capsys, "inspect", POLICIES["pi05"](tmp_path / "policy"))
    stored = pi05_policies.tensors_of("one-camera")
    prefix = pi05_policies.PREFIX
    for stack, at in (
        ("language_model", f"{prefix}.paligemma.model.language_model"),
        ("expert", f"{prefix}.gemma_expert.model"),
    ):
        rows, columns = stored[f"{at}.layers.0.mlp.gate_proj.weight"].shape
        layers = sum(name.startswith(at) and "gate_proj" in name for name in stored)
        sizes = found["stacks"][stack]
        assert (sizes["intermediate_size"], sizes["hidden_size"]) == (rows, columns)
        assert sizes["num_hidden_layers"] == layers
    assert found["stacks"]["tower"]["patch_size"] == 14
    assert found["normalization"]["observation.state"] == "QUANTILES"
    assert found["has_tokenizer"] is True


def test_verify_finds_what_is_no_number(smolvla: Path, tmp_path: Path, capsys: Capture) -> None:
    """In weights as they are stored, in what is computed of them, and in statistics."""
    weights = smolvla / "model.safetensors"
    statistics = smolvla / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    text = "model.vlm_with_expert.vlm.model.text_model"
    for file, name, said in (
        (weights, f"{text}.embed_tokens.weight", "infinity in embed from"),
        (weights, "model.action_in_proj.bias", "infinity in times from"),
        (statistics, "action.mean", "infinity in stats.action.offset from"),
    ):
        whole = file.read_bytes()
        set_value(file, name, np.nan)
        document(capsys, "inspect", smolvla)
        assert said in refusal(capsys, "inspect", smolvla, "--verify")
        file.write_bytes(whole)
    before = smolvla / "policy_preprocessor_step_5_normalizer_processor.safetensors"
    set_value(before, "observation.state.std", -1.0)
    said = refused_by_load(smolvla)
    assert "positive numbers are needed" in said
    assert said in refusal(capsys, "inspect", smolvla, "--verify")


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_tensors_that_do_not_fit_are_named_as_by_a_load(
    command: str, smolvla: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Fault: what does not load is described as fine."""
    weights = smolvla / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    lost = "model.vlm_with_expert.lm_expert.layers.1.self_attn.k_proj.weight"
    for wrong in (
        {n: v for n, v in tensors.items() if n != lost},
        tensors | {"model.state_proj.weight": np.ones((32, 5), np.float32)},
        tensors | {"model.other.weight": np.ones(3, np.float32)},
    ):
        safetensors.numpy.save_file(wrong, weights)
        assert refused_by_load(smolvla) in refusal(capsys, command, smolvla)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"type": "diffusion"}')
    safetensors.numpy.save_file(tensors, tmp_path / "other/model.safetensors")
    assert "a policy of type 'diffusion'" in refusal(capsys, command, tmp_path / "other")
    (smolvla / "policy_preprocessor.json").unlink()
    assert "policy_preprocessor.json" in refusal(capsys, command, smolvla)


@pytest.mark.parametrize(
    ("family", "file"), [("smolvla", "vlm/tokenizer.json"), ("pi05", "tokenizer.json")]
)
def test_a_tokenizer_that_is_missing_is_said(
    family: str, file: str, tmp_path: Path, capsys: Capture
) -> None:
    """Sizes are told without it, as it may be fetched later; verified is what loads. Fault: a plan
    that waits for a tokenizer, or a policy that does not load and is said to be whole.
    """
    policy = Path(POLICIES[family](tmp_path / "policy"))
    whole = document(capsys, "plan", policy)
    (policy / file).unlink()
    said = refused_by_load(policy)
    assert "flashrt pull" in said
    assert document(capsys, "plan", policy) == whole
    found = document(capsys, "inspect", policy)
    assert (found["has_tokenizer"], found["tokenizer"]) == (False, said)
    assert cli.main(["inspect", str(policy)]) == 0
    assert "not usable" in capsys.readouterr().out
    assert said in refusal(capsys, "inspect", policy, "--verify")
    (policy / file).write_text("{")
    said = refused_by_load(policy)
    assert "not a usable tokenizer" in said
    assert said in refusal(capsys, "inspect", policy, "--verify")


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_bundled_policies_go_by_name(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """What lies there is meant first. Fault: a name that hides the user's own folder."""
    monkeypatch.chdir(tmp_path)
    for name, folder in bundled_policies().items():
        by_path = document(capsys, command, folder)
        assert document(capsys, command, name) == by_path
    shutil.copytree(bundled_policies()["pendulum"], "pusht")
    field = "path" if command == "inspect" else "model"
    assert document(capsys, command, "pusht")[field] == {"path": "pusht", "model": "policy"}[field]
    said = refusal(capsys, command, "puhst")
    assert "no such file or directory" in said and "pendulum" in said and "smollm2" in said


def test_what_was_pulled_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """In both commands, and in `load_policy`. Fault: a name that one takes and another does not."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "flashrt pull someone/reach" in refused_by_load("someone/reach")
    fetched = tmp_path / "models--someone--reach"
    (fetched / "refs").mkdir(parents=True)
    (fetched / "refs" / "main").write_text("0" * 40)
    snapshot = POLICIES["smolvla"](fetched / "snapshots" / ("0" * 40))
    assert document(capsys, "inspect", "someone/reach")["path"] == str(snapshot)
    with flashrt.load_policy("someone/reach", device="cpu") as engine:
        check_plan(document(capsys, "plan", "someone/reach"), engine)
