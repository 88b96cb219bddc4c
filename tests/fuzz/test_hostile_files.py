"""Damaged and forged capsule files and stores: refused with a FlashrtError; nothing else happens.

A quick, seeded subset by default; `--fuzz N` runs N of each, from another part of the sequence for
another `--fuzz-seed`.
"""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import flashrt
from flashrt.base import files
from flashrt.base.tensor_file import read_table
from flashrt.robot.loop import ControlLoop
from flashrt.robot.recording import record
from flashrt.robot.recording_file import read_recording as read_robot_recording
from flashrt.session.recording import SessionRecorder, replay
from flashrt.store import upkeep
from flashrt.store.store import Store

from .mutations import (
    CAPSULE_FILE,
    DAMAGE,
    FORGERY,
    SESSION_RECORDING,
    claim_a_length,
    extend,
    flip_header,
    header_stop,
    truncate,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SLACK_BYTES = 64 << 20  # growth of the process that is taken for noise


@pytest.fixture(scope="module")
def engine() -> flashrt.Engine:
    return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=400, lanes=2)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.config.getoption("--fuzz-seed"))


@pytest.fixture
def count(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz"))


class Witness:
    """A live session that must not notice anything."""

    def __init__(self, engine: flashrt.Engine) -> None:
        self.engine = engine
        self.session = engine.session()
        self.session.prefill([5] * 50)
        self.capsule = self.session.snapshot()
        self.before = self.seen()

    def seen(self) -> tuple[object, ...]:
        stats = self.engine.stats()
        return self.session.digest(), stats["pool_used_bytes"], stats["capsules"]

    def check(self) -> None:
        assert self.seen() == self.before

    def close(self) -> None:
        self.check()
        self.engine.capsules.check_integrity()
        self.engine.arena.check_guards()
        self.session.close()
        self.capsule.drop()


def saved(engine: flashrt.Engine, path: Path) -> bytes:
    with engine.session() as session:
        session.prefill(range(33))
        session.snapshot().save(path)
    for capsule in list(engine.capsules.capsules):
        capsule.drop()
    return path.read_bytes()


def peak_nbytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_mutated_capsule_files_are_refused(
    engine: flashrt.Engine, tmp_path: Path, rng: np.random.Generator, count: int
) -> None:
    path = tmp_path / "c"
    whole = saved(engine, path)
    witness, peak = Witness(engine), peak_nbytes()
    for i in range(count):
        mutate = CAPSULE_FILE[i % len(CAPSULE_FILE)]
        mutated = mutate(rng, whole)
        if mutated == whole:
            continue
        path.write_bytes(mutated)
        with pytest.raises(flashrt.FlashrtError):
            engine.load_capsule(path)
            pytest.fail(f"accepted number {i}, {mutate}")
        witness.check()
    assert peak_nbytes() - peak < SLACK_BYTES
    witness.close()


def test_every_header_byte_and_every_kilobyte(engine: flashrt.Engine, tmp_path: Path) -> None:
    path = tmp_path / "c"
    whole = saved(engine, path)
    witness = Witness(engine)
    variants = [whole[:n] for n in range(0, len(whole), 1024)]
    for at in range(header_stop(whole)):
        raw = bytearray(whole)
        raw[at] ^= 1 << (at % 8)
        variants.append(bytes(raw))
    for variant in variants:
        path.write_bytes(variant)
        with pytest.raises(flashrt.FlashrtError):
            engine.load_capsule(path)
    witness.close()


def test_mutated_stores_are_refused(
    engine: flashrt.Engine, tmp_path: Path, rng: np.random.Generator, count: int
) -> None:
    store = Store(tmp_path / "store")
    with engine.session() as session:
        session.prefill(range(33))
        store.save(session.snapshot("a"))
        session.prefill(range(33))
        store.save(session.snapshot("a"))
    for capsule in list(engine.capsules.capsules):
        capsule.drop()
    place = store.resolve("a")
    names = [place.name, *(f"objects/{r.digest[:2]}/{r.digest[2:]}" for r in _refs(store))]
    wholes = {name: store.folder.read_text(name, 1 << 30) for name in names}
    witness, peak = Witness(engine), peak_nbytes()
    with engine.session() as target:
        for i in range(count):
            name, mutate = names[i % len(names)], DAMAGE[i // len(names) % len(DAMAGE)]
            mutated = mutate(rng, wholes[name])
            if mutated == wholes[name]:
                continue
            path = Path(store.folder.url, name)
            path.write_bytes(mutated)
            engine.poison_lane(target.lane)
            with pytest.raises(flashrt.FlashrtError):
                target.restore(store.load(engine, place))
                pytest.fail(f"accepted number {i}, {name}, {mutate}")
            for capsule in engine.capsules.capsules - {witness.capsule}:
                capsule.drop()
            witness.check()
            path.write_bytes(wholes[name])
    assert peak_nbytes() - peak < SLACK_BYTES
    assert upkeep.verify(store).problems == []
    witness.close()


def test_mutated_recordings_of_sessions(
    engine: flashrt.Engine, tmp_path: Path, rng: np.random.Generator, count: int
) -> None:
    """Refused, or run to a difference that is named. Red while 159 of 1,295 ended in a TypeError,
    an OverflowError or the like.
    """
    path = tmp_path / "r"
    with engine.session() as session:
        session.prefill(range(9))
        start = session.snapshot()
        with SessionRecorder(engine, session, path) as recorder:
            recorder.prefill([3, 1, 4])
            list(
                recorder.generate(
                    6, temperature=0.9, top_k=4, seed=7, stop=[1], logit_bias={5: 1.0}
                )
            )
            recorder.rollback(12)
            list(recorder.generate(4, repetition_penalty=1.5, draft=0))
    whole = path.read_bytes()
    refused = differed = 0
    for i in range(count):
        mutate = SESSION_RECORDING[i % len(SESSION_RECORDING)]
        path.write_bytes(mutate(rng, whole))
        try:
            differed += replay(engine, start, path).mismatch is not None
        except flashrt.FlashrtError:
            refused += 1
    assert refused > count // 2 and differed > 0
    path.write_bytes(whole)
    assert replay(engine, start, path).mismatch is None
    start.drop()


def test_mutated_recordings_of_loops(tmp_path: Path, rng: np.random.Generator, count: int) -> None:
    """Refused with a RecordingError, all of them."""
    path = tmp_path / "r"
    policy = flashrt.load_policy("two-doors", device="cpu")
    with ControlLoop(policy, 20.0, seed=1) as loop, record(loop, path):
        for _ in range(6):
            loop.tick(np.zeros(policy.config.observation_dim, np.float32))
    whole = path.read_bytes()
    read_robot_recording(path)
    mutations = (*DAMAGE, flip_header, claim_a_length, *FORGERY[:7])
    for i in range(count):
        mutated = mutations[i % len(mutations)](rng, whole)
        if mutated != whole:
            path.write_bytes(mutated)
            with pytest.raises(flashrt.FlashrtError):
                read_robot_recording(path)
                pytest.fail(f"accepted number {i}, {mutations[i % len(mutations)]}")


def test_headers_that_the_library_refuses_are_refused(
    tmp_path: Path, rng: np.random.Generator, count: int
) -> None:
    """Our reader of headers in place of the safetensors library's, which maps files: what that one
    refuses is refused, what it accepts has the same shapes.
    """
    path = tmp_path / "model.safetensors"
    arrays = {
        "a": np.ones((2, 3), np.float32),
        "b": np.ones(5, np.uint8),
        "c": np.ones(0, np.int64),
    }
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    whole = path.read_bytes()
    accepted = 0
    for i in range(count):
        mutations = (flip_header, truncate, extend, claim_a_length, *FORGERY[:7])
        path.write_bytes(mutated := mutations[i % len(mutations)](rng, whole))
        try:
            with files.opened(path) as (handle, nbytes):
                found = read_table(handle, nbytes, 1 << 20).tensors
        except (OSError, ValueError):
            continue
        accepted += 1
        theirs = dict(safetensors.deserialize(mutated))
        assert {n: list(t.shape) for n, t in found.items()} == {
            n: t["shape"] for n, t in theirs.items()
        }
    assert accepted < count


def test_names_in_a_store_cannot_lead_out(engine: flashrt.Engine, tmp_path: Path) -> None:
    """Refs and files that somebody else put there."""
    store = Store(tmp_path / "store")
    with engine.session() as session:
        session.prefill(range(20))
        place = store.save(session.snapshot("a")).place
    secret = tmp_path / "secret"
    shutil.copytree(tmp_path / "store", secret)
    shutil.copy(tmp_path / "store" / place.name, tmp_path / "outside.json")
    refs = tmp_path / "store" / "refs"
    for i, text in enumerate(
        ["../../secret/format", f"../../secret/{place.name}", "/etc/passwd", "", "\0", "x" * 10**6]
    ):
        (refs / f"bad{i}").write_text(text)
    (refs / "binary").write_bytes(b"\xff\xfe\0")
    assert set(store.refs()) == {"a"}
    (refs / "link").symlink_to(secret / "refs" / "a")
    assert set(store.refs()) == {"a"}
    folder = (tmp_path / "store" / place.name).parent
    (folder / "0000000020-x.json").write_text("{}")
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("x")
    assert store.places() == [place]
    found = upkeep.verify(store)
    assert (found.problems, found.strays) == ([], 7 + 1 + 2)
    assert upkeep.sweep(store).names == 0 and len(list(refs.iterdir())) == 9
    for capsule in list(engine.capsules.capsules):
        capsule.drop()


def _refs(store: Store) -> list[object]:
    return list(store.manifest(store.resolve("a")).objects)
