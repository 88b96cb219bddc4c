"""Capsule files: whole, foreign, truncated, damaged; the live session never notices a refusal."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.capsule import file
from tests.fuzz.mutations import forged

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def saved(session: flashrt.Session, tmp_path: Path) -> Path:
    session.prefill(range(70))
    session.snapshot("root")
    list(session.generate(9))
    session.snapshot("branch").save(tmp_path / "c.capsule")
    return tmp_path / "c.capsule"


def test_round_trip(engine: flashrt.Engine, session: flashrt.Session, saved: Path) -> None:
    expected = session.digest(), session.tokens.tolist()
    following = list(session.generate(8))
    capsule = engine.load_capsule(saved)
    assert (capsule.digest, capsule.tokens.tolist()) == expected
    assert capsule.name == "branch"
    engine.poison_lane(session.lane)
    session.restore(capsule)
    assert session.digest() == expected[0]
    assert list(session.generate(8)) == following


def test_another_process_continues_with_the_same_bits(
    session: flashrt.Session, saved: Path
) -> None:
    code = (
        "import flashrt, sys; e = flashrt.load(sys.argv[1], device='cpu', max_positions=300); "
        "s = e.session(); s.restore(e.load_capsule(sys.argv[2])); "
        "print(list(s.generate(8)), s.digest())"
    )
    command = [sys.executable, "-c", code, str(GOLDEN / "tiny"), str(saved)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{list(session.generate(8))} {session.digest()}"


def test_every_truncation_and_flip_is_refused(
    engine: flashrt.Engine, session: flashrt.Session, saved: Path, tmp_path: Path
) -> None:
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    digest, used = session.digest(), engine.stats()["pool_used_bytes"]
    bad = tmp_path / "bad.capsule"
    rng = np.random.default_rng(1)
    flips = [*range(0, header, 7), *rng.integers(header, len(whole), 60).tolist()]
    variants = [bytearray(whole) for _ in flips]
    for variant, at in zip(variants, flips, strict=True):
        variant[at] ^= 1 << int(rng.integers(8))
    variants += [bytearray(whole[:n]) for n in (0, 7, 8, header - 1, header, len(whole) - 1)]
    variants.append(bytearray(whole + b"x"))
    for variant in variants:
        bad.write_bytes(variant)
        with pytest.raises(flashrt.FlashrtError):
            engine.load_capsule(bad)
    assert (session.digest(), engine.stats()["pool_used_bytes"]) == (digest, used)


def test_foreign_capsules_are_refused(engine: flashrt.Engine, saved: Path) -> None:
    for other in (
        flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=400, kv_dtype="float32"),
        flashrt.load(GOLDEN / "tiny-untied-odd", device="cpu", max_positions=400),
    ):
        with pytest.raises(flashrt.CapsuleError, match=engine.fingerprint) as caught:
            other.load_capsule(saved)
        assert other.fingerprint in str(caught.value)
    short = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=64)
    with pytest.raises(flashrt.CapsuleError, match="position 79 > max_positions 64"):
        short.load_capsule(saved)


def test_a_long_list_of_names_is_cut(engine: flashrt.Engine, saved: Path, tmp_path: Path) -> None:
    """Red while every name was listed: here 3,000 tensors, of a header whose checksum is good."""

    def scatter(_: np.random.Generator, header: dict[str, Any]) -> None:
        name = next(n for n, e in header.items() if n != "__metadata__" and e["shape"][0] >= 3000)
        start, stop = header.pop(name)["data_offsets"]
        for i in range(3000):
            end = stop if i == 2999 else start + 1
            header[f"fixed/{i:04}"] = {
                "dtype": "U8", "shape": [end - start], "data_offsets": [start, end],
            }  # fmt: skip
            start = end

    bad = tmp_path / "bad"
    bad.write_bytes(forged(scatter)(np.random.default_rng(0), saved.read_bytes()))
    with pytest.raises(flashrt.CapsuleError, match="do not fit the engine's plan") as caught:
        engine.load_capsule(bad)
    assert "and 2,993 more" in str(caught.value) and len(str(caught.value)) < 600


def test_header_is_read_without_an_engine(saved: Path) -> None:
    header = file.read_header(saved)
    assert (header.position, header.name) == (79, "branch")
    assert header.parent_digest is not None
    assert set(file.read_tensors(header)) == set(header.table)


def test_a_full_disk_leaves_nothing_behind(
    session: flashrt.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    session.prefill([1])
    with pytest.raises(flashrt.CapsuleError, match="No space left"):
        session.snapshot().save(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(session: flashrt.Session, tmp_path: Path) -> None:
    session.prefill([1])
    with pytest.raises(flashrt.CapsuleError, match="nothing half-written was left"):
        session.snapshot().save(tmp_path / "no" / "c")


def test_equal_states_have_equal_files(
    engine: flashrt.Engine, session: flashrt.Session, tmp_path: Path
) -> None:
    """Whatever lay in the dead rows of the last granule before; but for the sampler's words."""
    files = []
    for detour in ([], [7] * 150):
        session.rollback(0)
        session.prefill(detour)
        session.rollback(0)
        session.prefill(range(70))
        session.snapshot().save(tmp_path / "c")
        tensors = file.read_tensors(file.read_header(tmp_path / "c"))
        files.append({n: t.tobytes() for n, t in tensors.items() if n.startswith("rows/")})
    assert files[0] == files[1]


def test_guards_are_whole_after_a_restore(
    engine: flashrt.Engine, session: flashrt.Session, saved: Path
) -> None:
    for capsule in list(engine.capsules.capsules):
        capsule.drop()
    pool = engine.arena.plan.pool
    engine.backend.fill(engine.arena.memory.address + pool.offset, pool.nbytes, 0x11)
    session.restore(engine.load_capsule(saved))
    engine.arena.check_guards()
