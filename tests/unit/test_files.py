"""Files: read whole or refused; replaced whole or not at all, and in base.files alone."""

from __future__ import annotations

import ast
import errno
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.base.files import PRIVATE, opened, read_exactly, read_file, replace_file, replacing
from flashrt.capsule import file
from flashrt.robot.recording_file import read_recording as read_robot_recording
from flashrt.session.recording import SessionRecorder, read_recording
from flashrt.store.directory import Directory
from flashrt.store.objects import put
from flashrt.weights.checkpoint import read_json
from tests.processes import forked

PACKAGE = Path(__file__).parents[2] / "flashrt"
OWN_FOLDERS = {  # where a file is written into a folder that is published, or thrown away, whole
    "backends/cuda/sass.py",
    "backends/cpu/compile.py",
    "backends/simt/build.py",
    "backends/simt/driver.py",  # Graphviz, for whoever asks the double for it
    "weights/formats/write.py",
    "weights/random_checkpoint.py",
    "weights/random_policy.py",
}


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_what_was_there(
    tmp_path: Path, error: type[BaseException]
) -> None:
    """Red with a clean-up for OSError alone, as four of the seven earlier writers had."""
    path = tmp_path / "c.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path, is_durable=True) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".txt")
        raise error("in the middle")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_durable_file_is_on_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red without the fsync of the folder, as recordings were written, or of the file, as kernels
    were cached: after a loss of power a name without its content, or none.
    """
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def note_name(path: Path, target: Path) -> Path:
        done.append("name")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_name)
    replace_file(tmp_path / "durable", b"x", is_durable=True)
    assert done == ["file", "name", "folder"]
    replace_file(tmp_path / "not", "y", is_durable=False)
    assert done[3:] == ["name"]


def test_a_link_is_replaced_and_a_device_is_written_to(tmp_path: Path) -> None:
    """Red where a rename takes the place of a device: then /dev/null, or a pipe, is a file."""
    (tmp_path / "elsewhere").write_text("not ours")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    replace_file(tmp_path / "link", "new", is_durable=False)
    assert (tmp_path / "elsewhere").read_text() == "not ours"
    assert (tmp_path / "link").read_text() == "new"
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    replace_file(pipe, "through", is_durable=True)
    reader.join()
    assert got == ["through"] and pipe.is_fifo()
    with pytest.raises(OSError, match="not a file"), replacing(pipe, is_durable=True):
        pass
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # a file, where a test's output goes to one
    replace_file(tmp_path / "stdout", "", is_durable=False)
    assert (tmp_path / "stdout").is_symlink()


def test_states_are_private_and_reports_are_not(
    session: flashrt.Session, engine: flashrt.Engine, tmp_path: Path
) -> None:
    """Red while capsules had the mode that the umask gives: others could read prompts. A name may
    be as long as the filesystem allows.
    """
    session.prefill([1, 2])
    path = tmp_path / ("c" * 255)
    path.touch(0o644)
    session.snapshot().save(path)
    SessionRecorder(engine, session, tmp_path / "r").close()
    (tmp_path / "new").touch()
    replace_file(tmp_path / "report.json", "{}", is_durable=False)
    modes = {p.name[:3]: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == {"ccc": PRIVATE, "r": PRIVATE, "rep": modes["new"], "new": modes["new"]}


def test_what_a_killed_writer_left_goes_with_the_next_save(tmp_path: Path) -> None:
    """Red while nobody removed them: 100 kills left 59 files. A living writer's file stays, and so
    does what only looks like ours.
    """

    def half_written() -> None:
        with replacing(tmp_path / "c.capsule", is_durable=True) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    def hidden() -> list[str]:
        return sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".flashrt-"))

    (tmp_path / ".flashrt-1-notes.capsule").write_text("mine")
    with replacing(tmp_path / "other", is_durable=False) as living:
        assert forked(half_written) == -signal.SIGKILL
        assert len(hidden()) == 3
        assert forked(lambda: replace_file(tmp_path / "third", "x", is_durable=False)) == 0
        assert hidden() == sorted([living.name, ".flashrt-1-notes.capsule"])
    assert (tmp_path / "other").exists()


def test_a_folder_that_does_not_sync_is_told_as_it_is(
    session: flashrt.Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red while the message said that nothing was left: the new file has its name."""
    session.prefill([1])
    fsync = os.fsync

    def bad_folder(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", bad_folder)
    with pytest.raises(flashrt.CapsuleError, match="the new file is there, but a loss of power"):
        session.snapshot().save(tmp_path / "c")
    assert file.read_header(tmp_path / "c").position == 1


def test_every_new_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red while only the last one's name was: of capsules/FINGERPRINT, the first could be lost."""
    synced = set[str]()
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    folder = Directory(tmp_path / "above" / "store")
    folder.write("capsules/f/m.json", np.zeros(1, np.uint8))
    above = [
        tmp_path,
        tmp_path / "above",
        *(tmp_path / "above/store" / n for n in ("", "capsules")),
    ]
    assert {str(p) for p in above} <= synced


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "sparse": lambda path: (path.touch(), os.truncate(path, 3 << 30)),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_what_is_no_file_is_refused_at_once(
    engine: flashrt.Engine, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red while readers hung on a pipe, or read 3 GB of a file that is a hole."""
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = Path("x")
    SPECIAL[what](path)
    began = time.process_time()  # other processes' work is not counted
    readers = (engine.load_capsule, read_recording, read_robot_recording, read_json)
    for read in readers:
        with pytest.raises(flashrt.FlashrtError):
            read(path)
    assert time.process_time() - began < 1


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Red with a mapping: SIGBUS ends the process, as on a sector that cannot be read."""
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    with opened(path) as (handle, nbytes):
        os.truncate(path, 1000)
        with pytest.raises(OSError, match="ends at byte 1,000"):
            read_exactly(handle, nbytes)
    with pytest.raises(OSError, match="at most 999 are expected"):
        read_file(path, 999)


def test_no_reader_keeps_a_mapping(session: flashrt.Session, tmp_path: Path) -> None:
    """Red with a mapping: the process that touches what it read, of a file cut since, is killed."""
    session.prefill(range(300))
    session.snapshot().save(tmp_path / "c")

    def touch() -> None:
        tensors = file.read_tensors(file.read_header(tmp_path / "c"))
        os.truncate(tmp_path / "c", 0)
        assert sum(int(t.sum()) for t in tensors.values()) > 0
        stored, _ = put(Directory(tmp_path / "store"), tensors["rows/journal"].reshape(-1))
        data = stored.read()
        for path in (tmp_path / "store").rglob("objects/*/*"):
            os.truncate(path, 0)
        assert int(data.sum()) > 0

    assert forked(touch) == 0


def test_no_module_replaces_a_file_by_itself() -> None:
    """Red with a temporary file, or a write to a final name, anywhere but in base.files."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in {
                "write_text", "write_bytes", "mkstemp", "NamedTemporaryFile", "fsync",
            }:  # fmt: skip
                found.add(name)
    inside_replacing = {"store/directory.py", "backends/cache.py"}
    assert found == {"base/files.py", *OWN_FOLDERS, *inside_replacing}
