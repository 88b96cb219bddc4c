"""Recordings of control loops: the same bits again, or the first tick that differs; bad files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.base.errors import LaneBusy, RecordingError, SessionError
from flashrt.robot.loop import ControlLoop
from flashrt.robot.recording import ReplayReport, record, replay
from flashrt.robot.recording_file import HELD, LATE, Recording, read_recording, write_recording
from tests.numpy_policy import NumpyPolicy

SEEN = np.random.default_rng(4).normal(size=(4000, 3)).astype(np.float32)


@pytest.fixture
def engine() -> NumpyPolicy:
    return NumpyPolicy(lanes=3)


def everything(engine: NumpyPolicy, path: Path) -> ReplayReport:
    """All that can happen to a loop, in one recording."""
    with ControlLoop(engine, 20.0, overlap=2, seed=9) as loop, record(loop, path):
        for i in range(20):
            loop.tick(SEEN[i])
        loop.interrupt(keep=1)
        for i in range(20, 25):
            loop.tick(SEEN[i])
            loop.slack()
        capsule = loop.snapshot()
        loop.set_seed(3)
        for i in range(25, 45):
            loop.tick(SEEN[i])
        loop.rewind(0.4)
        loop.restore(capsule)
        loop.interrupt()
        for i in range(10):
            loop.tick(SEEN[i])
        loop.rewind_ticks(7)
        loop.reset(1 << 60)
        loop.tick(SEEN[0])
    return replay(engine, path)


def test_the_same_bits(engine: NumpyPolicy, tmp_path: Path) -> None:
    path = tmp_path / "a.recording"
    report = everything(engine, path)
    assert (report.ticks, report.first_difference, report.mismatch) == (56, None, None)
    recording = read_recording(path)
    kinds = [e.what for e in recording.events]
    assert kinds[0] == kinds[-1] == "digest"
    assert report.digests == kinds.count("digest") + kinds.count("snapshot")
    assert {"reset", "set_seed", "interrupt", "snapshot", "restore", "rewind"} < set(kinds)
    assert len(engine.free) == 3 and list(tmp_path.iterdir()) == [path]
    engine.capsules.clear()
    assert replay(NumpyPolicy(lanes=1), path).mismatch is None, "in another process, say"


def test_late_actions_come_again(engine: NumpyPolicy, tmp_path: Path) -> None:
    """With a deadline that nothing can meet: every action but the first is held."""
    path = tmp_path / "late"
    with ControlLoop(engine, deadline_ms=0.0) as loop, record(loop, path):
        sent = [loop.tick(SEEN[i]) for i in range(30)]
    assert all(np.array_equal(sent[0], action) for action in sent)
    outcomes = read_recording(path).outcomes
    assert outcomes.tolist() == [LATE] + [HELD] * 29
    assert replay(engine, path).mismatch is None


def test_it_may_begin_anywhere(engine: NumpyPolicy, tmp_path: Path) -> None:
    path = tmp_path / "a"
    loop = ControlLoop(engine, seed=2)
    for i in range(7):
        loop.tick(SEEN[i])
    start = loop.snapshot()
    with record(loop, path):
        for i in range(7, 20):
            loop.tick(SEEN[i])
        other = loop.fork(1, seeds=[5])[0]
        other.tick(SEEN[20])
        foreign = other.snapshot()
        loop.adopt(other)
        loop.tick(SEEN[21])
    other.close()
    assert replay(engine, path, [start, foreign]).mismatch is None
    with pytest.raises(RecordingError, match=f"needs the capsule with digest {foreign.digest}"):
        replay(engine, path, [start])
    with pytest.raises(RecordingError, match=f"needs the capsule with digest {start.digest}"):
        replay(engine, path)
    with record(loop, path):  # a file of that name is replaced
        loop.reset(8)
        loop.tick(SEEN[0])
    assert replay(engine, path).mismatch is None, "what came before the reset does not matter"
    loop.close()
    assert len(engine.free) == 3


def changed(path: Path, **changes: Any) -> Path:
    """A well-formed recording of something that did not happen."""
    other = path.with_suffix(".changed")
    write_recording(dataclasses.replace(read_recording(path), **changes), other)
    return other


def test_the_first_difference_is_named(engine: NumpyPolicy, tmp_path: Path) -> None:
    path = tmp_path / "a.recording"
    everything(engine, path)
    recording = read_recording(path)
    actions = recording.actions.copy()
    actions[17, 1] = np.nextafter(actions[17, 1], 1, dtype=np.float32)
    report = replay(engine, changed(path, actions=actions))
    assert (report.ticks, report.first_difference) == (17, 17)
    assert report.mismatch is not None and "tick 17: action [" in report.mismatch
    observations = recording.observations.copy()
    observations[30] += 1
    report = replay(engine, changed(path, observations=observations))
    assert report.first_difference is not None and 30 <= report.first_difference <= 34
    for what, waypoint in (("digest", 2), ("snapshot", 0)):
        at = [i for i, e in enumerate(recording.events) if e.what == what][waypoint]
        events = list(recording.events)
        events[at] = dataclasses.replace(events[at], digest="ab" * 16)
        report = replay(engine, changed(path, events=tuple(events)))
        assert report.mismatch is not None and f"({what}): digest" in report.mismatch
        assert report.first_difference == events[at].tick - 1


def test_every_damaged_byte_is_refused(engine: NumpyPolicy, tmp_path: Path) -> None:
    path, bad = tmp_path / "a.recording", tmp_path / "bad"
    everything(engine, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 3), *rng.integers(header, len(whole), 200).tolist()]
    for at in places:
        raw = bytearray(whole)
        raw[at] ^= 1 << int(rng.integers(8))
        bad.write_bytes(raw)
        with pytest.raises(RecordingError):
            read_recording(bad)
    for stop in [0, 1, 7, 8, 100, header, header + 1, len(whole) - 1]:
        bad.write_bytes(whole[:stop])
        with pytest.raises(RecordingError, match="not a whole recording"):
            replay(engine, bad)
    bad.write_bytes(whole + b"x")
    with pytest.raises(RecordingError):
        read_recording(bad)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(RecordingError):
            read_recording(missing)
    assert len(engine.free) == 3


def forged(recording: Recording) -> list[dict[str, Any]]:
    events = recording.events
    return [
        {"overlap": 99},
        {"hz": float("nan")},
        {"hz": 1e300},
        {"keep_seconds": 1e12},
        {"boundary_seconds": -1.0},
        {"seed": -1},
        {"observations": recording.observations[:-1]},
        {"observations": recording.observations * np.float32(np.nan)},
        {"observations": recording.observations[:, :2]},
        {"actions": recording.actions.astype(np.int64)},
        {"outcomes": recording.outcomes + np.uint8(7)},
        {"events": events[1:]},
        {"events": events[::-1]},
        {"events": ()},
        {"events": (events[0], dataclasses.replace(events[-1], tick=10_000))},
        {"events": (events[0], dataclasses.replace(events[0], tick=-1))},
        {"events": (events[0], dataclasses.replace(events[0], what="rewind", value=-4))},
        {"events": (events[0], dataclasses.replace(events[0], what="rewind", value=1 << 62))},
        {"events": (events[0], dataclasses.replace(events[0], what="interrupt", value=-4))},
        {"events": (events[0], dataclasses.replace(events[0], what="set_seed", value=-4))},
    ]


def test_forgeries_are_refused(engine: NumpyPolicy, tmp_path: Path) -> None:
    """Whole files with right checksums that make no sense."""
    path = tmp_path / "a.recording"
    everything(engine, path)
    for changes in forged(read_recording(path)):
        with pytest.raises(SessionError):
            replay(engine, changed(path, **changes))
        assert len(engine.free) == 3, changes


def test_what_cannot_be_replayed_or_written(engine: NumpyPolicy, tmp_path: Path) -> None:
    path = tmp_path / "a.recording"
    everything(engine, path)
    other = NumpyPolicy()
    other.fingerprint = "other"
    with pytest.raises(RecordingError, match="recorded with fingerprint numpy"):
        replay(other, path)
    loops = [ControlLoop(engine) for _ in range(3)]
    with pytest.raises(LaneBusy):
        replay(engine, path)
    with (
        pytest.raises(RecordingError, match="nothing half-written was left"),
        record(loops[0], "/none/a"),
    ):
        loops[0].tick(SEEN[0])
    with record(loops[0], path), pytest.raises(SessionError, match="recorded already"):
        record(loops[0], path).__enter__()
    with record(loops[1], path):
        loops[1].tick(SEEN[0])
        loops[1].close()
    assert len(read_recording(path).outcomes) == 1


def test_long_recordings_grow(engine: NumpyPolicy, tmp_path: Path) -> None:
    path = tmp_path / "long"
    with ControlLoop(engine) as loop, record(loop, path):
        for observation in SEEN:
            loop.tick(observation)
    assert replay(engine, path).ticks == len(SEEN)
