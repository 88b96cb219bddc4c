"""SmolVLA against LeRobot: chunks of random policies, as tools/smolvla_golden.py recorded them.

One camera, three of odd sizes; short and long tasks; heads that are not hidden / their number; an
expert with fewer layers, or one that sees itself throughout; real-time chunking.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.engine.actions import ActionEngine
from flashrt.engine.numbers import Given
from tests.smolvla_policies import (
    SETS,
    left_over_of,
    noise_of,
    observation_of,
    write_random_smolvla,
)

FOLDER = Path(__file__).parent / "smolvla"
# Float32 in other orders through up to 9 layers and 10 steps: 2e-6 was measured, of actions of size
# 4. With pairs of bfloat16, 6e-5.
ABSOLUTE = 1e-4


def loaded(
    name: str, folder: Path, device: str = "cpu", precision: Any = "bfloat16"
) -> tuple[ActionEngine, dict[str, Any]]:
    recorded: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    config, vlm, seed = SETS[name]
    policy = write_random_smolvla(folder, config, vlm, seed)
    return flashrt.load_policy(policy, device=device, precision=precision), recorded


@pytest.mark.parametrize(("name", "device"), [*((n, "cpu") for n in SETS), ("few-experts", "simt")])
def test_chunks_are_lerobots(name: str, device: str, tmp_path: Path) -> None:
    """Fault: anything between the files and the actions in the environment's units."""
    engine, recorded = loaded(name, tmp_path, device, "high")
    config, _, _ = SETS[name]
    lane = engine.lanes[0]
    with engine:
        pairs = zip(recorded["observations"], recorded["chunks"], strict=True)
        for seed, chunk in list(pairs)[: 1 if device == "simt" else None]:
            engine.reset(lane)
            engine.observe(lane, observation_of(config, seed))
            engine.plan(lane, given=Given(noise_of(config, seed)))
            assert np.abs(engine.chunk(lane) - np.array(chunk)).max() < ABSOLUTE
            assert np.abs(engine.act(lane) - np.array(chunk[0])).max() < ABSOLUTE


@pytest.mark.parametrize("name", ["guided", "tiny"])
def test_a_chunk_is_guided_as_lerobots(name: str, tmp_path: Path) -> None:
    """Fault: other weights of rows, another strength of a step, or guidance from the wrong rows."""
    engine, recorded = loaded(name, tmp_path)
    config, _, seed = SETS[name]
    lane, free = engine.lanes[0], np.array(recorded["chunks"][0])
    with engine:
        engine.observe(lane, observation_of(config, 11))
        for about in recorded["guided"]:
            left, chunk = left_over_of(config, about["rows"], seed), np.array(about["chunk"])
            given = Given(noise_of(config, 11), left, about["delay"], about["horizon"])
            engine.plan(lane, given=given)
            assert np.abs(engine.chunk(lane) - chunk).max() < ABSOLUTE
            assert np.abs(chunk - free).max() > 1000 * ABSOLUTE  # it is another chunk


@pytest.mark.parametrize("name", ["plain", "three-cameras"])
def test_tasks_become_lerobots_tokens(name: str, tmp_path: Path) -> None:
    """Fault: a newline too few or too many, or a task that is cut elsewhere."""
    engine, recorded = loaded(name, tmp_path)
    config, _, _ = SETS[name]
    with engine:
        for seed, tokens in zip(recorded["observations"], recorded["tokens"], strict=True):
            packed: Any = engine.pack(observation_of(config, seed))
            assert list(packed.tokens) == tokens
