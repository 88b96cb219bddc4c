"""Robot policies of every family: what is wrong with their files is named, and what is read from
them is right. A new family is a line in tests/policy_families.

What is particular to a family stands in a file of its own: test_act_policy, test_smolvla_policy,
test_pi05_policy.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import flashrt
from flashrt.base.errors import CheckpointError, ObservationError
from flashrt.models.vla import reading
from flashrt.text.tokenizer import Tokenizer
from flashrt.weights.lerobot import Mode
from tests import pi05_policies
from tests.policy_families import (
    ACT,
    ACT_SEEING,
    FAMILIES,
    PI05,
    READING,
    SMALL,
    SMOLVLA,
    STATE,
    TASK,
    Family,
    Json,
    change,
    of,
    refused,
    step_of,
)
from tests.policy_files import features_of, statistics_file

PRE, POST = "policy_preprocessor", "policy_postprocessor"
# Of each family, a matrix of its model.
MATRICES = {
    ACT: "model.encoder.layers.0.self_attn.in_proj_weight",
    SMOLVLA: "model.vlm_with_expert.lm_expert.layers.1.self_attn.k_proj.weight",
    PI05: f"{pi05_policies.PREFIX}.gemma_expert.model.layers.1.mlp.up_proj.weight",
}


@pytest.fixture(params=SMALL)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def folder(family: Family, tmp_path: Path) -> Path:
    return family.write(tmp_path / "policy")


@contextlib.contextmanager
def changed_tensors(file: Path, changes: dict[str, Any]) -> Iterator[None]:
    """Tensors of a file are others, or none, for a while."""
    whole = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({n: v for n, v in (whole | changes).items() if v is not None}, file)
    yield
    safetensors.numpy.save_file(whole, file)


# -- config.json ----------------------------------------------------------------------------------


def shared_problems(family: Family) -> Iterator[tuple[Json, str]]:
    """Fields that are wrong in every family, and what is said of them."""
    inputs = family.config["input_features"]

    def more(name: str, kind: str, shape: object) -> Json:
        return {"input_features": {**inputs, name: {"type": kind, "shape": shape}}}

    yield {"chunk_size": 0}, "chunk_size is 0, expected an integer from 1"
    yield {"n_action_steps": 99}, "n_action_steps 99 exceeds chunk_size"
    yield {"n_obs_steps": 2}, "n_obs_steps is 2; supported: 1"
    yield {"use_peft": True}, "use_peft is True; supported: False"
    yield {"output_features": {}}, "output_features is {}"
    yield more("observation.touch", "STATE", [4]), "input_features has observation.touch of 'STATE'"
    depth = "observation.images.depth"
    yield more(depth, "VISUAL", [1, 64, 64]), f"{depth} of 'VISUAL' (1, 64, 64)"
    yield more(depth, "VISUAL", "64"), f"input_features has {depth} as"
    if family.tasks:
        (state,) = inputs[STATE]["shape"]
        guided = {"enabled": True, "execution_horizon": 6}
        yield {"max_state_dim": state - 1}, f"a vector of {state} exceeds max_state_dim {state - 1}"
        yield {"max_action_dim": 1}, "a vector of 2 exceeds max_action_dim 1"
        yield {"min_period": 0}, "min_period is 0, expected a positive number"
        yield {"max_period": "long"}, "max_period is 'long'"
        yield {"rtc_config": 3}, "rtc_config is 3, expected null or fields"
        yield {"rtc_config": guided | {"execution_horizon": 0}}, "execution_horizon 0"
        unknown = guided | {"prefix_attention_schedule": "SOME"}
        yield {"rtc_config": unknown}, "prefix_attention_schedule 'SOME'"
        without = {"input_features": {STATE: inputs[STATE]}}
        yield without, "input_features need observation.state and an image"


def test_every_problem_of_a_config_is_named(family: Family) -> None:
    """Alone and among others. Fault: a field is not looked at, or the first problem hides more."""
    found = list(shared_problems(family))
    for fields, said in found:
        with pytest.raises(CheckpointError) as caught:
            family.parse.parse_config(family.config | fields)
        assert said in str(caught.value), said
    for some in (found[i : i + 4] for i in range(0, len(found), 4)):
        wrong: Json = functools.reduce(operator.or_, (fields for fields, _ in some))
        with pytest.raises(CheckpointError) as caught:
            family.parse.parse_config(family.config | wrong)
        assert all(name in str(caught.value) for name in wrong), caught.value


ACT_USUAL = {
    "chunk_size": 100, "n_action_steps": 100, "dim_model": 512, "dim_feedforward": 3200,
    "n_encoder_layers": 4, "n_decoder_layers": 1, "backbone": "resnet18",
    "observation_dim": 14 + 2 * 480 * 640 * 3,
}  # fmt: skip
SMOLVLA_USUAL = {
    "chunk_size": 50, "n_action_steps": 50, "max_state_dim": 32, "side": 512, "num_steps": 10,
    "num_vlm_layers": 16, "num_expert_layers": 16, "guidance": None, "lags": True,
    "observation_dim": 14 + 2 * 480 * 640 * 3 + 2 + 48,
}  # fmt: skip
PI05_USUAL = {
    "chunk_size": 50, "n_action_steps": 50, "num_inference_steps": 10, "side": 224,
    "max_state_dim": 32, "max_action_dim": 32, "tokenizer_max_length": 200,
    "observation_dim": 14 + 2 * 480 * 640 * 3 + 202,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "usual"),
    [(ACT, ACT_USUAL), (SMOLVLA, SMOLVLA_USUAL), (PI05, PI05_USUAL)],
    indirect=["family"],
    ids=SMALL,
)
def test_what_a_config_leaves_out_is_lerobots(family: Family, usual: Json) -> None:
    cameras = {"top": (480, 640), "wrist": (480, 640)}
    if family.tasks:
        cameras |= {"empty_camera_0": (480, 640)}  # which nobody ever sees
    parsed = family.parse.parse_config(features_of(cameras, action=14, state=14))
    assert {name: getattr(parsed, name) for name in usual} == usual
    names = [camera.name for camera in parsed.cameras]
    assert names == ["observation.images.top", "observation.images.wrist"]


_NUMBERS = st.integers(-2, 70) | st.sampled_from([2**31, -(2**70), 10**400]) | st.floats()
_SCALARS = st.none() | st.booleans() | _NUMBERS | st.text(max_size=6)
_VALUES = st.recursive(
    _SCALARS,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=3),
)


@pytest.mark.parametrize("name", [ACT_SEEING, *READING])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_config_is_read_or_refused(name: str, data: st.DataObject) -> None:
    """Only CheckpointErrors come out, whatever a field, a feature or a shape is."""
    family = FAMILIES[name]
    config: Json = json.loads(json.dumps(family.config))
    field = data.draw(st.sampled_from([*config, *(family.parse._USUAL.keys() - config.keys())]))
    value = data.draw(_VALUES)
    if field in ("input_features", "output_features") and data.draw(st.booleans()):
        feature = data.draw(st.sampled_from(list(config[field])))
        config[field][feature][data.draw(st.sampled_from(["type", "shape"]))] = value
    else:
        config[field] = value
    with contextlib.suppress(CheckpointError):
        family.parse.parse_config(config)


def test_flashrt_load_says_where_to_go(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"flashrt\.load_policy"):
        flashrt.load(folder, device="cpu")
    change(folder / "config.json", lambda c: c.update(type="diffusion"))
    assert "a policy of type 'diffusion', as LeRobot stores them" in refused(folder)


# -- processor files and tensors ------------------------------------------------------------------


def normalizer(content: Json) -> Json:
    return step_of(content, "normalizer_processor")


def tokenizer(content: Json) -> Json:
    return step_of(content, "tokenizer_processor")


Edits = tuple[tuple[Callable[[Json], Any], str], ...]
EDITS: Edits = (
    (lambda c: c["steps"].remove(normalizer(c)), "has no step normalizer_processor"),
    (lambda c: c.pop("steps"), "has no list of steps"),
    (lambda c: c["steps"].append({"registry_name": "crop"}), "step 'crop' is not supported"),
    (lambda c: c["steps"].append({"class": "os.system"}), "step 'os.system' is not supported"),
    (lambda c: c["steps"][0]["config"].update(rename_map={"a": "b"}), "without a rename_map"),
    (lambda c: normalizer(c)["config"]["norm_map"].update(STATE="LOG"), "'STATE' is normalised by"),
    (lambda c: normalizer(c)["config"].update(eps="small"), "eps is 'small'"),
    (lambda c: normalizer(c).update(state_file="../secret"), "state_file is '../secret'"),
    (lambda c: normalizer(c).update(state_file="gone.safetensors"), "gone.safetensors"),
)
READING_EDITS: Edits = (
    (lambda c: c["steps"].remove(tokenizer(c)), "has no step tokenizer_processor"),
    (lambda c: tokenizer(c)["config"].update(task_key="goal"), "task_key is 'goal'"),
    (lambda c: tokenizer(c)["config"].update(truncation=False), "truncation is False"),
    (lambda c: tokenizer(c)["config"].update(padding_side="left"), "padding_side is 'left'"),
    (lambda c: tokenizer(c)["config"].update(max_length=0), "max_length is 0"),
    (lambda c: tokenizer(c)["config"].update(tokenizer_name=3), "tokenizer_name is 3"),
)


def test_processor_files_are_checked(family: Family, folder: Path) -> None:
    """Fault: numbers or texts become others than LeRobot's, or a file elsewhere is read."""
    file = folder / f"{PRE}.json"
    whole = file.read_text()
    for edit, said in (*EDITS, *(READING_EDITS if family.tasks else ())):
        change(file, edit)
        assert said in refused(folder), said
        file.write_text(whole)
    flashrt.load_policy(folder, device="cpu").close()
    (folder / f"{POST}.json").unlink()
    assert f"{POST}.json: no such file" in refused(folder)


def test_statistics_are_checked(family: Family, folder: Path) -> None:
    """Those that observations are scaled by, and those of actions."""
    steps = json.loads((folder / f"{PRE}.json").read_text())["steps"]
    number = [step["registry_name"] for step in steps].index("normalizer_processor")
    sides = (
        (STATE, "STATE", statistics_file(PRE, number, "normalizer_processor")),
        ("action", "ACTION", statistics_file(POST, 0, "unnormalizer_processor")),
    )
    for feature, kind, file in sides:
        first, last = Mode[family.config["normalization_mapping"][kind]].statistics or ("", "")
        size = len(safetensors.numpy.load_file(folder / file)[f"{feature}.{last}"])
        less, nans = np.ones(size - 1, np.float32), np.full(size, np.nan, np.float32)
        cases = [
            (last, None, f"needs {last}, which its statistics lack"),
            (last, less, f"F32 [{size - 1}], expected BF16, F16 or F32 [{size}]"),
            (first, nans, "finite"),
        ]
        if (feature, last) == (STATE, "std"):
            cases.append((last, -np.ones(size, np.float32), "positive numbers are needed"))
        for name, values, said in cases:
            with changed_tensors(folder / file, {f"{feature}.{name}": values}):
                assert said in refused(folder), said
    flashrt.load_policy(folder, device="cpu").close()


def test_tensors_that_do_not_fit_are_refused(family: Family, folder: Path) -> None:
    """Fault: a policy runs without a matrix, with another's, or with one that it does not use."""
    file, matrix = folder / "model.safetensors", MATRICES[family.name]
    values = safetensors.numpy.load_file(file)[matrix]
    rows, columns = values.shape
    for changes, wanted in (
        ({matrix: None}, (f"missing {matrix} [{rows}, {columns}]",)),
        ({matrix: values[:-1]}, (f"{matrix} is", f"[{rows - 1}, {columns}], expected")),
        ({"model.extra": np.zeros(2, np.float32)}, ("unused model.extra",)),
    ):
        with changed_tensors(file, changes):
            said = refused(folder)
            assert all(part in said for part in wanted), said
    flashrt.load_policy(folder, device="cpu").close()


@of(*READING)
def test_names_of_a_compiled_policy_are_the_same_tensors(family: Family, folder: Path) -> None:
    file, found = folder / "model.safetensors", set()
    tensors = safetensors.numpy.load_file(file)
    renamed = {n.replace("model.", "model._orig_mod.", 1): v for n, v in tensors.items()}
    for stored in (tensors, renamed):
        safetensors.numpy.save_file(stored, file)
        with flashrt.load_policy(folder, device="cpu") as engine:
            engine.observe(engine.lanes[0], family.observation(1))
            engine.plan(engine.lanes[0])
            found.add((engine.fingerprint, engine.digest(engine.lanes[0])))
    assert len(found) == 1


# -- observations ---------------------------------------------------------------------------------


def test_an_observation_is_a_vector_too(family: Family, folder: Path) -> None:
    """As recordings have it. Fault: another observation comes back, or levels become floats."""
    with flashrt.load_policy(folder, device="cpu", lanes=2) as engine:
        for seen in (family.observation(1), family.seen(5)):  # in the second a camera is missing
            packed: Any = engine.pack(seen)
            vector = np.asarray(packed, np.float32)
            assert vector.shape == (engine.config.observation_dim,) == (packed.size,)
            forms: tuple[Any, Any] = (seen, vector)
            for lane, observation in zip(engine.lanes, forms, strict=True):
                engine.reset(lane)
                engine.observe(lane, observation)
                engine.plan(lane)
            assert engine.digest(engine.lanes[0]) == engine.digest(engine.lanes[1])
            if not family.tasks:
                continue
            back: Any = engine.taken(vector)
            assert back.tokens == packed.tokens and np.array_equal(back.state, packed.state)
            for ours, theirs in zip(back.images, packed.images, strict=True):
                assert (ours is None) == (theirs is None)
                assert ours is None or (ours.dtype == np.uint8 and np.array_equal(ours, theirs))


@of(*READING)
def test_tokens_of_a_vector_are_tokens(family: Family, folder: Path) -> None:
    """Fault: words beyond the vocabulary reach the table of embeddings."""
    with flashrt.load_policy(folder, device="cpu") as engine:
        lane, (task,) = engine.lanes[0], (p for p in engine.policy.parts if p.name == TASK)
        policy: Any = engine.policy
        vocabulary = policy.vocab_size
        vector = np.asarray(engine.pack(family.observation(2)), np.float32)
        for wrong in (vocabulary, -1, 0.5):
            vector[task.start + 2] = wrong  # after which cameras there are, and how many tokens
            with pytest.raises(ObservationError, match=rf"tokens in \[0, {vocabulary}\)"):
                engine.observe(lane, vector)
        vector[task.start + 2] = 3
        engine.observe(lane, vector)


@of(*READING)
def test_a_task_is_read_once(family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a tokenizer that runs at every tick."""
    with flashrt.load_policy(folder, device="cpu") as engine:
        seen = family.observation(1)
        first: Any = engine.pack(seen)
        policy: Any = engine.policy
        monkeypatch.setattr(policy._words, "_tokenizer", object())
        again: Any = engine.pack(seen)
        assert again.tokens == first.tokens
        with pytest.raises(AttributeError):
            engine.pack({**seen, TASK: "another"})


@of(*READING)
def test_files_of_a_policy_are_read_once(
    family: Family, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a policy is made twice when it is loaded, each time with a tokenizer of its own."""
    reads: list[Path] = []

    def read(path: Path) -> Tokenizer:
        reads.append(path)
        return Tokenizer(path)

    monkeypatch.setattr(reading, "Tokenizer", read)
    with flashrt.load_policy(folder, device="cpu") as engine:
        assert [path.name for path in reads] == ["tokenizer.json"]
        assert folder in reads[0].parents
        engine.pack(family.observation(1))
    assert len(reads) == 1


@of(*READING)
def test_a_task_is_as_long_as_the_preprocessor_says(family: Family, folder: Path) -> None:
    """Fault: a length that the policy was not trained with, of config.json for example."""

    def tokens(most: int) -> tuple[int, ...]:
        change(folder / f"{PRE}.json", lambda c: tokenizer(c)["config"].update(max_length=most))
        with flashrt.load_policy(folder, device="cpu") as engine:
            packed: Any = engine.pack(family.observation(1) | {TASK: "push it to the left"})
            return tuple(packed.tokens)

    whole = tokens(90)
    assert 9 < len(whole) < 90 and tokens(7) == whole[:7]
