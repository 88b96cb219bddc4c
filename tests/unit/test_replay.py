"""Deterministic replay: recorded sessions run again to the same bits; a difference is named."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.commands import replay as command
from flashrt.session.recording import SessionRecorder, read_recording, replay
from flashrt.store.store import Store


@pytest.fixture
def recorded(
    engine: flashrt.Engine, session: flashrt.Session, tmp_path: Path
) -> tuple[flashrt.Capsule, Path]:
    """A session with an interrupt, a stop token and a rollback, from a capsule on."""
    session.prefill(range(40))
    capsule = session.snapshot("start")
    path = tmp_path / "a.recording"
    with SessionRecorder(engine, session, path) as told:
        told.prefill([3, 1, 4])
        stream = told.generate(20, temperature=0.9, top_k=40, seed=11, logit_bias={7: 1.5})
        heard = [next(stream) for _ in range(6)]
        stream.close()  # the user speaks
        told.prefill([9, 9])
        told.rollback(44)
        free = list(told.generate(8))
        told.rollback(44)
        assert list(told.generate(8, stop=[free[5]])) == free[: free.index(free[5])]
        assert len(heard) == 6
    return capsule, path


def test_the_same_bits(engine: flashrt.Engine, recorded: tuple[flashrt.Capsule, Path]) -> None:
    capsule, path = recorded
    head, calls, is_cut_short = read_recording(path)
    assert (head.position, head.digest, is_cut_short) == (40, capsule.digest, False)
    ends = [s.fields["end"] for s in calls if s.do == "generate"]
    assert ends == ["interrupt", "limit", "stop"]
    report = replay(engine, capsule, path)
    assert (report.steps, report.boundaries, report.mismatch) == (7, 8, None)


def test_numpy_numbers_are_recorded(
    engine: flashrt.Engine, session: flashrt.Session, tmp_path: Path
) -> None:
    """Red when a seed from numpy's generator is not JSON: the reply was made, its line was lost."""
    session.prefill(range(20))
    start = session.snapshot()
    with SessionRecorder(engine, session, tmp_path / "r") as told:
        reply = told.generate(
            np.int64(4), temperature=np.float32(0.9), seed=np.uint64(1 << 63), top_k=np.int32(9)
        )
        assert len(list(reply)) == 4 and reply.reason == "length"
        with pytest.raises(flashrt.SessionError, match="seed=None is not an integer"):
            told.generate(4, seed=None)
    report = replay(engine, start, tmp_path / "r")
    assert (report.steps, report.mismatch) == (1, None)


@pytest.mark.parametrize(
    ("line", "change", "said"),
    [
        (2, {"tokens": [3, 1, 5]}, r"line 2 \(prefill\): digest"),
        (3, {"tokens": [1, 2, 3]}, r"line 3 \(generate\): token 0 is"),
        (5, {"to": 43}, r"line 5 \(rollback\): position 43, recorded 44"),
        (3, {"options": {"seed": 3, "temperature": 2.0}}, r"line 3 \(generate\): token \d"),
        (6, {"max_tokens": 9}, r"line 6 \(generate\): went on with token"),
        (8, {"digest": "0" * 32}, r"line 8 \(generate\): digest"),
    ],
)
def test_a_difference_is_named(
    engine: flashrt.Engine,
    recorded: tuple[flashrt.Capsule, Path],
    line: int,
    change: dict[str, object],
    said: str,
) -> None:
    capsule, path = recorded
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps({**json.loads(lines[line - 1]), **change})
    path.write_text("\n".join(lines) + "\n")
    report = replay(engine, capsule, path)
    assert report.steps == line - 2
    assert report.mismatch is not None
    assert re.search(said, report.mismatch), report.mismatch


def test_a_recording_that_a_crash_cut_short(
    engine: flashrt.Engine, recorded: tuple[flashrt.Capsule, Path]
) -> None:
    capsule, path = recorded
    path.write_text(path.read_text()[:-20])
    report = replay(engine, capsule, path)
    assert (report.steps, report.mismatch, report.is_cut_short) == (6, None, True)


def test_what_cannot_be_replayed_is_refused(
    engine: flashrt.Engine, session: flashrt.Session, recorded: tuple[flashrt.Capsule, Path]
) -> None:
    capsule, path = recorded
    whole = path.read_text()
    head, rest = whole.split("\n", 1)
    with pytest.raises(flashrt.SessionError, match="starts at position 40"):
        replay(engine, None, path)
    with pytest.raises(flashrt.SessionError, match="File exists"):
        SessionRecorder(engine, session, path)
    for text in (
        "", "x\n", "{}\n", "[]\n", head.replace("journal-1", "journal-2") + "\n",
        whole + '{"do": "dance", "position": 1, "digest": ""}\n', whole + "[]\n",
        whole + '{"do": "prefill", "position": 1, "digest": ""}\n',
        whole.replace('"seed": 11', '"sead": 11'),
        whole + '{"do": "prefill", "tokens": 5, "position": 1, "digest": ""}\n',
        head.replace('"device"', '"devices"') + "\n" + rest, "[" * 100_000 + "\n",
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(flashrt.SessionError, match="recording"):
            replay(engine, capsule, path)
    path.write_text(whole.replace(engine.fingerprint, "0" * 32))
    with pytest.raises(flashrt.SessionError, match=engine.fingerprint):
        replay(engine, capsule, path)


def test_the_command(
    recorded: tuple[flashrt.Capsule, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsule, path = recorded
    capsule.save(tmp_path / "c.capsule")
    Store(tmp_path / "store").save(capsule)
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())

    def run(*words: str) -> tuple[int, str]:
        options = parser.parse_args(["replay", *words])
        return options.command(options), capsys.readouterr().out

    status, out = run(str(tmp_path / "c.capsule"), str(path))
    assert (status, "the same bits: 7 calls" in out) == (0, True)
    status, out = run("start", str(path), "--store", str(tmp_path / "store"), "--json")
    assert (status, json.loads(out)["mismatch"]) == (0, None)
    path.write_text(path.read_text().replace("[3, 1, 4]", "[3, 1, 5]"))
    status, out = run(str(tmp_path / "c.capsule"), str(path))
    assert (status, "line 2 (prefill): digest" in out) == (1, True)
