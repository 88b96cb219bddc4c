"""Capsules of policies in files: they go on elsewhere; what no loop left is refused."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import CapsuleError
from flashrt.engine.actions import ActionEngine
from flashrt.engine.admission import what_is_wrong
from flashrt.ops.cursor import PolicyWord
from flashrt.robot.recording import record, replay
from flashrt.weights.random_policy import write_random_policy

SEEN = np.random.default_rng(4).normal(size=(60, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_policy(tmp_path_factory.mktemp("policy") / "tiny", "tiny", seed=3)


@pytest.fixture
def engine(folder: Path) -> Iterator[ActionEngine]:
    made = flashrt.load_policy(folder, device="cpu", lanes=2)
    yield made
    made.capsules.check_integrity()
    made.close()


def going_on(loop: flashrt.ControlLoop) -> list[bytes]:
    return [loop.tick(seen).tobytes() for seen in SEEN[20:50]]


def test_a_capsule_goes_on_in_another_process(
    engine: ActionEngine, folder: Path, tmp_path: Path
) -> None:
    loop = flashrt.ControlLoop(engine, overlap=3, seed=1 << 40)
    for seen in SEEN[:18]:  # a plan is half made
        loop.tick(seen)
    capsule = loop.snapshot("half a plan")
    capsule.save(tmp_path / "c")
    with record(loop, tmp_path / "r"):
        expected = going_on(loop)
    other = flashrt.load_policy(folder, device="cpu", lanes=1)
    loaded = other.load_capsule(tmp_path / "c")
    assert (loaded.name, loaded.digest) == ("half a plan", capsule.digest)
    with flashrt.ControlLoop(other, overlap=3) as again:
        again.restore(loaded)
        assert (again.position, again.seed) == (18, 1 << 40)
        assert going_on(again) == expected and again.digest() == loop.digest()
    assert replay(other, tmp_path / "r", [loaded]).mismatch is None
    other.close()


def forged(engine: ActionEngine, path: Path, name: str, word: int, value: bytes) -> Path:
    """A whole capsule file of a state that was tampered with."""
    loop = flashrt.ControlLoop(engine)
    for seen in SEEN[:11]:
        loop.tick(seen)
    loop.slack()
    lane = loop.lane
    slot = engine.arena.lane(lane.index).fixed.slot(name)
    raw = np.frombuffer(value, np.uint8)
    engine.backend.write(engine.arena.memory.address + slot.offset + 4 * word, raw)
    capsule = engine.snapshot(lane)
    capsule.save(path)
    capsule.drop()
    loop.close()
    return path


@pytest.mark.parametrize(
    ("name", "word", "value", "said"),
    [
        ("cursor", PolicyWord.TICK, -1, "tick -1"),
        ("cursor", PolicyWord.TICK, 1 << 30, "tick 1073741824"),
        ("cursor", PolicyWord.OBSERVED, 12, "an observation of tick 12"),
        ("cursor", PolicyWord.OBSERVED, -2, "an observation of tick -2"),
        ("cursor", PolicyWord.CHUNK, 12, "a chunk from tick 12 at tick 11"),
        ("cursor", PolicyWord.STOP, 1 << 29, r"actions for ticks \[\d+, 536870912\)"),
        ("cursor", PolicyWord.PLAN_STEPS_LEFT, 4, "4 steps left"),
        ("cursor", PolicyWord.HELD, 12, "12 ticks held"),
        ("memory", 3, float("nan"), "memory is not finite"),
        ("queue", 5, float("inf"), "queue is not finite"),
        ("previous", 0, float("nan"), "previous is not finite"),
    ],
)
def test_what_no_loop_left_is_refused(
    engine: ActionEngine, tmp_path: Path, name: str, word: int, value: Any, said: str
) -> None:
    before = engine.stats()["pool_used_bytes"]
    path = forged(
        engine, tmp_path / "c", name, word, struct.pack("i" if type(value) is int else "f", value)
    )
    with pytest.raises(CapsuleError, match=said):
        engine.load_capsule(path)
    assert engine.stats()["pool_used_bytes"] == before


def test_what_is_wrong_with_a_plan_in_the_making(engine: ActionEngine) -> None:
    loop = flashrt.ControlLoop(engine, overlap=3)
    for seen in SEEN[:10]:
        loop.tick(seen)
        loop.slack()
        cursor = engine.cursor(loop.lane)
        assert what_is_wrong(cursor, engine.config) is None
        if cursor.plan_steps_left:
            for change in ({"plan_tick": -1}, {"plan_stop": 99}):
                assert what_is_wrong(dataclasses.replace(cursor, **change), engine.config)


def test_a_damaged_or_foreign_file_is_refused(engine: ActionEngine, tmp_path: Path) -> None:
    loop = flashrt.ControlLoop(engine)
    loop.snapshot().save(tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    for at in range(0, len(whole), 97):
        raw = bytearray(whole)
        raw[at] ^= 4
        (tmp_path / "bad").write_bytes(raw)
        with pytest.raises(CapsuleError):
            engine.load_capsule(tmp_path / "bad")
    other = write_random_policy(tmp_path / "other", "tiny", seed=4)
    foreign = flashrt.load_policy(other, device="cpu")
    with pytest.raises(CapsuleError, match="fingerprint"):
        foreign.load_capsule(tmp_path / "c")
    foreign.close()
