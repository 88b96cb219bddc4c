"""Replacing a file: whole or not at all, and nowhere else than in base.files."""

from __future__ import annotations

import ast
import os
import stat
import threading
from pathlib import Path

import pytest

import flashrt
from flashrt.base.files import replace_file, replacing

PACKAGE = Path(__file__).parents[2] / "flashrt"
OWN_FOLDERS = {  # where a file is written into a folder that is published, or thrown away, whole
    "backends/cpu/compile.py",
    "backends/simt/build.py",
    "backends/simt/driver.py",  # Graphviz, for whoever asks the double for it
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


def test_files_have_the_mode_of_new_files_and_any_name(
    session: flashrt.Session, tmp_path: Path
) -> None:
    """Red with mkstemp: mode 600 whatever the umask says, and no name of more than 245 bytes."""
    session.prefill([1, 2])
    path = tmp_path / ("c" * 255)
    session.snapshot().save(path)
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2


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
    inside_replacing = {"store/folder.py", "backends/cache.py"}
    assert found == {"base/files.py", *OWN_FOLDERS, *inside_replacing}
