"""A store under damage, forks, umasks and stopped processes: what was reported saved is there."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashrt
from flashrt.base.errors import StoreError, StoreWarning
from flashrt.capsule.extent import Tier
from flashrt.robot.loop import ControlLoop
from flashrt.store import upkeep
from flashrt.store.directory import Directory
from flashrt.store.opening import open_session
from flashrt.store.store import Store
from tests.processes import forked

GOLDEN = Path(__file__).parents[1] / "golden"
DAMAGE = {
    "flip": lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
    "cut": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"x",
    "empty": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def capsule(session: flashrt.Session) -> flashrt.Capsule:
    session.prefill(range(100))
    return session.snapshot("c")


@pytest.fixture(scope="module")
def other() -> flashrt.Engine:
    return flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=640)


@pytest.fixture
def elsewhere(other: flashrt.Engine) -> Iterator[flashrt.Session]:
    with other.session() as session:
        yield session
    for capsule in list(other.capsules.capsules):
        capsule.drop()
    other.capsules.check_integrity()


def files_of(store: Store) -> dict[str, Path]:
    """The files that a capsule needs, by what they are."""
    made = store.manifest(store.resolve("c"))
    objects = {
        "fixed": made.fixed,
        "rows": made.segments[0].rows,
        "tokens": made.segments[0].tokens,
    }
    root = Path(store.folder.url)
    return {
        "manifest": root / store.resolve("c").name,
        "format": root / "format",
        **{k: root / "objects" / r.digest[:2] / r.digest[2:] for k, r in objects.items()},
    }


@pytest.mark.parametrize("is_fresh", [False, True], ids=["same process", "another"])
@pytest.mark.parametrize("what", ["fixed", "rows", "tokens", "manifest", "format"])
@pytest.mark.parametrize("how", [*DAMAGE, "gone", "folder of links"])
def test_a_save_over_damage_can_be_loaded(
    store: Store,
    capsule: flashrt.Capsule,
    other: flashrt.Engine,
    elsewhere: flashrt.Session,
    what: str,
    how: str,
    is_fresh: bool,
) -> None:
    """Red while a file of the right size was taken for the right one: 9 of 24 such saves reported
    success, and the load failed.
    """
    store.save(capsule)
    path = files_of(store)[what]
    if how in DAMAGE:
        path.write_bytes(DAMAGE[how](path.read_bytes()))
    else:
        path.unlink()
        if how != "gone":
            path.symlink_to("/dev/zero")
    if what == "format" and how not in ("cut", "empty", "gone"):
        with pytest.raises(StoreError, match="format"):  # of a version to come, perhaps
            store.save(capsule)
        return
    saver = Store(store.folder.url) if is_fresh else store
    saver.save(capsule)
    assert upkeep.verify(saver).problems == []
    elsewhere.restore(Store(store.folder.url).load(other, "c"))
    assert elsewhere.digest() == capsule.digest


def test_memory_is_kept_until_the_bytes_read_back(
    engine: flashrt.Engine,
    store: Store,
    session: flashrt.Session,
    capsule: flashrt.Capsule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Red while offload gave the good bytes away for a file that does not verify."""
    digest, write = capsule.digest, store.folder.write

    def badly(name: str, data: np.ndarray) -> None:
        bad = data.copy()
        bad[len(bad) // 2] ^= 1
        write(name, bad if name.startswith("objects/") else data)

    with monkeypatch.context() as patch:
        patch.setattr(store.folder, "write", badly)
        with pytest.raises(StoreError, match="damaged"):
            store.offload(capsule)
        longer = [*range(100), 7, 8]
        opened = open_session(store, engine, longer, session=session, boundaries=[102])
        assert not opened.published and "damaged" in " ".join(opened.problems)
        assert engine.capsules.capsules == {capsule}
        session.rollback(100)
    assert (capsule.tier, session.digest()) == (Tier.DEVICE, digest)
    store.offload(capsule)
    assert capsule.tier == Tier.DISK
    session.rollback(0)
    session.restore(capsule)
    assert session.digest() == digest


def test_the_disk_tier_reads_back(
    capsule: flashrt.Capsule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red while a spill that the disk had garbled took the place of the bytes in memory."""
    digest, write = capsule.digest, Directory.write
    with monkeypatch.context() as patch:
        patch.setattr(Directory, "write", lambda f, name, data: write(f, name, data ^ np.uint8(1)))
        with pytest.raises(flashrt.CapsuleError, match="damaged"):
            capsule.to("disk")
    assert (capsule.tier, capsule.digest) == ("device", digest)
    capsule.to("disk")
    capsule.to("device")
    assert capsule.digest == digest


def test_a_control_loops_capsule_comes_back(tmp_path: Path) -> None:
    """Red while the save was reported, and every load of it an AttributeError."""
    store = Store(tmp_path / "store")
    engine = flashrt.load_policy("two-doors", device="cpu")
    with ControlLoop(engine, 20.0, seed=4) as loop:
        for tick in range(5):
            loop.tick(np.full(engine.config.observation_dim, tick / 9, np.float32))
        store.save(loop.snapshot("door"))
        digest = loop.digest()
        following = loop.tick(np.zeros(engine.config.observation_dim, np.float32))
    again = flashrt.load_policy("two-doors", device="cpu")
    with ControlLoop(again, 20.0, seed=9) as loop:
        loop.restore(Store(store.folder.url).load(again, "door"))
        assert loop.digest() == digest
        action = loop.tick(np.zeros(engine.config.observation_dim, np.float32))
        assert action.tobytes() == following.tobytes()
    tokens = flashrt.load(GOLDEN / "tiny", device="cpu", max_positions=64)
    with pytest.raises(flashrt.CapsuleError, match="fingerprint"):
        store.load(tokens, "door")


# -- forks ----------------------------------------------------------------------------------------


def test_a_forked_process_leaves_its_parents_bytes_alone(
    session: flashrt.Session, capsule: flashrt.Capsule
) -> None:
    """Red while a child that dropped or moved its copy removed the parent's files."""
    digest = capsule.digest
    capsule.to("disk")

    def drop() -> None:
        capsule.drop()

    def move() -> None:
        capsule.to("host")
        assert capsule.digest == digest
        capsule.to("disk")  # into a folder of its own
        capsule.to("host")

    assert [forked(work) for work in (drop, move, drop)] == [0, 0, 0]
    context = multiprocessing.get_context("fork")
    child = context.Process(target=move)
    child.start()
    child.join()
    assert child.exitcode == 0
    session.rollback(0)
    session.restore(capsule)
    assert session.digest() == digest


# -- modes, links and locks -----------------------------------------------------------------------


def modes_in(root: Path) -> set[tuple[bool, int]]:
    return {(p.is_dir(), stat.S_IMODE(p.stat().st_mode)) for p in (root, *root.rglob("*"))}


def test_one_rule_for_modes(
    capsule: flashrt.Capsule, session: flashrt.Session, tmp_path: Path
) -> None:
    """Red while objects with prompts in them were readable for all at umask 022."""
    private, shared = Store(tmp_path / "private"), Store(tmp_path / "shared", is_shared=True)
    before = os.umask(0o027)
    try:
        private.save(capsule)
        shared.save(capsule)
        os.umask(0o077)
        session.prefill([1])
        later = session.snapshot("later")
        private.save(later)
        Store(tmp_path / "shared").save(later)  # as the store was made, whatever the umask
    finally:
        os.umask(before)
    assert modes_in(tmp_path / "private") == {(True, 0o700), (False, 0o600)}
    assert modes_in(tmp_path / "shared") == {(True, 0o750), (False, 0o640)}


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a device"])
def test_save_replaces_nothing_but_files(
    capsule: flashrt.Capsule, tmp_path: Path, kind: str
) -> None:
    """Red while a save as root took the place of a device node."""
    path = tmp_path / "c"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    before = path.lstat()
    with pytest.raises(flashrt.CapsuleError):
        capsule.save(path)
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert list(tmp_path.iterdir()) == [path]


def test_a_filesystem_without_locks_is_named(
    store: Store, capsule: flashrt.Capsule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red while the OSError of flock came out as it is."""

    def no_locks(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StoreError, match="needs a filesystem with locks"):
        store.save(capsule)


@pytest.mark.slow
def test_a_sweep_behind_a_stopped_writer_says_so(store: Store, capsule: flashrt.Capsule) -> None:
    """Red while gc waited in silence for a process that somebody had stopped."""
    store.save(capsule)
    code = (
        "import fcntl, sys, time; h = open(sys.argv[1]); fcntl.flock(h, fcntl.LOCK_SH); "
        "print('held', flush=True); time.sleep(60)"
    )
    lock = str(Path(store.folder.url, "lock"))
    with subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        sweep = subprocess.Popen(
            [sys.executable, "-m", "flashrt", "store", "gc", store.folder.url],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert sweep.stderr is not None
        said = sweep.stderr.readline()
        assert f"waiting for process {writer.pid}" in said and "stopped" in said
        assert time.monotonic() - began > 1
        writer.kill()
        assert sweep.wait(10) == 0


def test_the_wait_is_a_warning(
    store: Store, capsule: flashrt.Capsule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red while a save behind a sweep said nothing, either."""
    store.save(capsule)
    lock = os.open(Path(store.folder.url, "lock"), os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    warn = warnings.warn

    def heard(*args: Any, **kwargs: Any) -> None:
        os.close(lock)  # now, and at no moment before, the sweep is over
        warn(*args, **kwargs)

    monkeypatch.setattr(warnings, "warn", heard)
    with pytest.warns(StoreWarning, match=f"waiting for process {os.getpid()} .*sweeps"):
        store.save(capsule)
