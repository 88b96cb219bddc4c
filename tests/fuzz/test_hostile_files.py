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

import flashrt
from flashrt.store import upkeep
from flashrt.store.store import Store

from .mutations import CAPSULE_FILE, DAMAGE, header_stop

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
