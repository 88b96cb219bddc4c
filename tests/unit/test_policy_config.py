"""Policy checkpoints: configs, tensors and statistics that do not fit are refused, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

import flashrt
from flashrt.backends.cpu.device import CpuDevice
from flashrt.base.errors import BackendError, CheckpointError, LaneBusy, PlanError
from flashrt.load import PRECISIONS, load_policy
from flashrt.models.flow_policy.config import parse_config
from flashrt.models.flow_policy.model import FlowPolicy, time_features
from flashrt.weights.bundled_policies import bundled_policies, policy_path
from flashrt.weights.random_policy import SHAPES, policy_config, write_random_policy

Tensors = dict[str, NDArray[np.generic]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_random_policy(tmp_path / "policy", "tiny")


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a checkpoint."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_round_trips(shape: str) -> None:
    config = parse_config(policy_config(shape))
    policy = FlowPolicy(config)
    assert config.flow_size == config.chunk_size * (config.action_dim + 1)
    assert len(policy.phases) == 5 + config.num_inference_steps
    for phase, rows in policy.phases:
        assert policy.record(phase, rows).launches
    with pytest.raises(PlanError, match="no phase"):
        policy.record("plan_step", config.num_inference_steps + 1)


def test_sizes_are_capped() -> None:
    """Red when sizes alone make a policy of 65,535 tapes, or tensors beyond 2^31 values."""
    config = policy_config("tiny")
    most = {"chunk_size": 1 << 10, "action_dim": 1 << 10, "head_dim": 1 << 10}
    assert parse_config(config | most).flow_size * (1 << 10) < 1 << 31
    for name in ("num_inference_steps", "chunk_size", "head_blocks"):
        with pytest.raises(CheckpointError, match=f"{name} is 65535, expected an integer from 1"):
            parse_config(config | {name: 65535})


def test_every_problem_is_named() -> None:
    config = policy_config("tiny") | {
        "observation_dim": 0, "memory_dim": "64", "memory": "lstm", "time_features": 16,
        "n_action_steps": 9, "fps": -1.0, "image_size": 96,
    }  # fmt: skip
    del config["head_blocks"]
    with pytest.raises(CheckpointError) as caught:
        parse_config(config)
    for name in (
        "observation_dim is 0", "memory_dim is '64'", "memory is 'lstm'", "time_features is 16",
        "n_action_steps 9 exceeds chunk_size 8", "fps is -1.0", "head_blocks is None",
        "image_size: observations are vectors; run an image encoder of your own",
    ):  # fmt: skip
        assert name in str(caught.value)


def test_the_card_keeps_what_it_does_not_know() -> None:
    config = parse_config(policy_config("tiny") | {"env": "two_doors", "card": {"return": 1.0}})
    assert config.card == {"env": "two_doors", "card": {"return": 1.0}}


def test_time_features_are_sines_then_cosines() -> None:
    assert np.allclose(time_features(0.0), [0, 0, 0, 0, 1, 1, 1, 1])
    assert np.allclose(time_features(1 / 8), [np.sqrt(0.5), 1, 0, 0, np.sqrt(0.5), 0, -1, 1])


def test_a_language_model_is_told_where_to_go(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "qwen3_5_text"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"load with flashrt\.load$"):
        load_policy(checkpoint, device="cpu")


def test_tensors_that_do_not_fit_are_refused(checkpoint: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["head.time.weight"]
        tensors["extra"] = np.zeros(3, np.float32)
        tensors["memory.bias_ih"] = np.zeros(5, np.float32)

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError) as caught:
        load_policy(checkpoint, device="cpu")
    for name in ("missing head.time.weight [32, 8]", "unused extra", "memory.bias_ih is [5]"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("stats.observation.std", 0.0, "positive"),
        ("stats.action.scale", -1.0, "positive"),
        ("stats.observation.mean", np.nan, "finite"),
        ("stats.action.offset", np.inf, "finite"),
    ],
)
def test_statistics_are_checked(checkpoint: Path, name: str, value: float, wanted: str) -> None:
    rewrite(checkpoint, lambda tensors: tensors[name].__setitem__(0, value))
    with pytest.raises(CheckpointError, match=rf"{name} is .*; {wanted} numbers are needed"):
        load_policy(checkpoint, device="cpu")


def test_overflowing_weights_are_seen(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda t: t["head.output.bias"].__setitem__(slice(None), np.nan))
    engine = load_policy(checkpoint, device="cpu")
    lane = engine.take_lane(engine)
    engine.observe(lane, np.zeros(engine.config.observation_dim))
    engine.plan(lane)
    with pytest.raises(CheckpointError, match="overflow"):
        engine.act(lane)


def test_a_policy_is_loaded_in_the_precision_that_is_asked_for(checkpoint: Path) -> None:
    """Fault: the precision is dropped on the way, or a word for none is taken."""
    said = {}
    for precision in PRECISIONS:
        engine = load_policy(checkpoint, device="cpu", precision=precision)
        assert isinstance(engine.backend, CpuDevice)
        said[precision] = engine.backend.description
        engine.close()
    assert "int8 and bfloat16 activations" in said["fast"]
    assert "int16 activations" in said["bfloat16"] and "activations" not in said["high"]
    with pytest.raises(BackendError, match="precision 'int4'"):
        load_policy(checkpoint, device="cpu", precision="int4")  # type: ignore[arg-type]


def test_lanes_are_lent_and_taken_back(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="lanes=0"):
        load_policy(checkpoint, device="cpu", lanes=0)
    engine = load_policy(checkpoint, device="cpu", lanes=2)
    first, second = engine.take_lane(engine), engine.take_lane(engine)
    assert first is not second
    with pytest.raises(LaneBusy, match="all 2 lanes"):
        engine.take_lane(engine)
    engine.observe(first, np.ones(engine.config.observation_dim))
    engine.release(first)
    taken = engine.take_lane(engine)
    assert taken is first
    engine.reset(taken)  # a lane is lent as its last user left it
    assert engine.cursor(taken).observed == -1


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    a, b, c = (
        write_random_policy(tmp_path / name, "tiny", seed=seed) / "model.safetensors"
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert a.read_bytes() == b.read_bytes() != c.read_bytes()
    with pytest.raises(CheckpointError, match="already exists"):
        write_random_policy(tmp_path / "a", "tiny")
    with pytest.raises(CheckpointError, match="unknown shape"):
        write_random_policy(tmp_path / "d", "huge")


def test_a_path_comes_before_a_bundled_name(checkpoint: Path) -> None:
    assert policy_path(checkpoint) == checkpoint
    assert policy_path("folder/no such policy") == Path("folder/no such policy")
    with pytest.raises(CheckpointError, match="no bundled policy; there are mountain-car"):
        policy_path("no such policy")
    for name, folder in bundled_policies().items():
        assert policy_path(name) == folder
    assert flashrt.load_policy is load_policy
