"""ACT against LeRobot: chunks of random policies, as tools/act_golden.py recorded them.

One camera, three of two odd sizes, none; norms before and after; every way of normalising.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import flashrt
from flashrt.engine.actions import ActionEngine
from tests.act_policies import SETS, observation_of, write_set

FOLDER = Path(__file__).parent / "act"
# Float32 in other orders through up to 25 layers: 1e-5 was measured, of actions of size 3.
ABSOLUTE = 1e-4


def loaded(name: str, folder: Path, device: str) -> tuple[ActionEngine, dict[str, Any]]:
    recorded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return flashrt.load_policy(write_set(name, folder), device=device), recorded


@pytest.mark.parametrize("device", ["cpu", "simt"])
@pytest.mark.parametrize("name", SETS)
def test_chunks_are_lerobots(name: str, device: str, tmp_path: Path) -> None:
    """Fault: anything between the files and the actions in the environment's units."""
    engine, recorded = loaded(name, tmp_path, device)
    config, _ = SETS[name]
    lane = engine.lanes[0]
    with engine:
        pairs = zip(recorded["observations"], recorded["chunks"], strict=True)
        for seed, chunk in list(pairs)[: 1 if device == "simt" else None]:
            engine.reset(lane)
            engine.observe(lane, observation_of(config, seed))
            engine.plan(lane)
            assert np.abs(engine.chunk(lane) - np.array(chunk)).max() < ABSOLUTE
            action = engine.act(lane)
            assert np.abs(action - np.array(chunk[0])).max() < ABSOLUTE


@pytest.mark.parametrize("name", SETS)
def test_an_episode_is_lerobots(name: str, tmp_path: Path) -> None:
    """Action by action, by queue or by temporal ensemble. Fault: a chunk that is made at another
    tick, or averaged otherwise.
    """
    engine, recorded = loaded(name, tmp_path, "cpu")
    config, _ = SETS[name]
    with engine, flashrt.ControlLoop(engine, overlap=0) as loop:
        for seed, action in zip(recorded["ticks"], recorded["actions"], strict=True):
            got = loop.tick(observation_of(config, seed))
            assert np.abs(got - np.array(action)).max() < ABSOLUTE


def test_an_image_may_come_as_lerobot_has_it(tmp_path: Path) -> None:
    """Fault: other bits for float images, or for channels that come first."""
    engine, _ = loaded("two-cameras", tmp_path, "cpu")
    config, _ = SETS["two-cameras"]
    seen = observation_of(config, 1)
    whole = engine.pack(seen)
    for name in ("left", "wrist"):
        key = f"observation.images.{name}"
        pixels = (seen[key] / np.float32(255)).astype(np.float32)
        for image in (pixels, pixels.transpose(2, 0, 1), seen[key].transpose(2, 0, 1)):
            assert engine.pack({**seen, key: image}).tobytes() == whole.tobytes()
    engine.close()


def test_statistics_of_images_may_be_vectors(tmp_path: Path) -> None:
    """As LeRobot 0.6 takes them."""
    engine, recorded = loaded("pre-norm", tmp_path, "cpu")
    engine.close()
    file = tmp_path / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    tensors = safetensors.numpy.load_file(file)
    flat = {n: v.reshape(-1) if "images" in n else v for n, v in tensors.items()}
    safetensors.numpy.save_file(flat, file)
    with flashrt.load_policy(tmp_path, device="cpu") as engine:
        engine.observe(engine.lanes[0], observation_of(SETS["pre-norm"][0], 11))
        engine.plan(engine.lanes[0])
        chunk = engine.chunk(engine.lanes[0])
        assert np.abs(chunk - np.array(recorded["chunks"][0])).max() < ABSOLUTE
