"""The kernel cache: what lies there is run, so it is ours, whole, and what its name says.

IS: planted, damaged, cut and swapped files; folders of others; killed builders; machines without a
compiler. IS NOT: keys of NVRTC, see tests/unit/test_nvrtc_cache.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from flashrt.backends import cache as kernel_cache
from flashrt.backends import shared_object
from flashrt.backends.cache import KernelCache
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu.device import CpuDevice
from flashrt.backends.cuda.compiler_api import Unit
from flashrt.backends.simt.build import ShimCompiler
from flashrt.base.errors import BackendError, CacheWarning, CompileError, FlagError
from flashrt.base.flags import Flags, read
from flashrt.commands import doctor
from flashrt.ops import OPS

ROOT = Path(__file__).parents[2]
OTHER_UID = 12345
PLANTED = """
#include <stdio.h>
__attribute__((constructor)) static void planted(void) { fclose(fopen("%s", "w")); }
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache of CPU kernels of one file with one function."""
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "one.c").write_text('#include "ops.h"\nint one(void) { return 1; }\n')
    monkeypatch.setattr(toolchain, "KERNELS", kernels)
    monkeypatch.setattr(toolchain, "CFLAGS", (*toolchain.CFLAGS, "-include", "stdint.h"))
    return tmp_path / "cache"


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a path another user's."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, OTHER_UID, -1)
        else:  # who may not do that becomes another user itself
            monkeypatch.setattr(os, "geteuid", lambda: OTHER_UID)

    return give


def plant(tmp_path: Path, at: Path) -> Path:
    """A library that leaves a file where it is loaded; its file."""
    trace, source = tmp_path / "it ran", tmp_path / "planted.c"
    source.write_text(PLANTED % trace)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", at], check=True)
    return trace


def run(binary: kernel_cache.Binary) -> int:
    return int(shared_object.load(binary.path, binary.content).one())


def test_what_is_made_is_private_and_found_again(folder: Path) -> None:
    """Red with the umask's modes: what others may write is code that they may write."""
    before = os.umask(0)
    try:
        made = toolchain.library(OPS, folder / "deep")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (folder, folder / "deep", made.path)]
    assert modes == [0o700, 0o700, 0o600]
    assert list((folder / "deep").iterdir()) == [made.path], "nothing else is left"
    again = toolchain.library(OPS, folder / "deep")
    assert (made.was_cached, again.was_cached, again.content) == (False, True, made.content)
    assert run(again) == 1


def test_a_planted_library_is_not_run(
    folder: Path, tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    """Red without a look at the owner: it ran, as root too."""
    path = toolchain.library(OPS, folder).path
    trace = plant(tmp_path, path)
    path.write_bytes(path.read_bytes() + kernel_cache._seal(path.name, path.read_bytes()))
    give_away(path)
    with pytest.warns(CacheWarning, match="belongs to another user"):
        binary = toolchain.library(OPS, folder)
    assert not binary.was_cached and run(binary) == 1
    assert not trace.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_what_took_its_place_is_ours(folder: Path) -> None:
    path = toolchain.library(OPS, folder).path
    os.chown(path, OTHER_UID, -1)
    with pytest.warns(CacheWarning):
        toolchain.library(OPS, folder)
    assert path.stat().st_uid == os.geteuid()
    assert toolchain.library(OPS, folder).was_cached


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_run(folder: Path, mode: int) -> None:
    path = toolchain.library(OPS, folder).path
    path.chmod(mode)
    with pytest.warns(CacheWarning, match="written by others"):
        assert not toolchain.library(OPS, folder).was_cached
    assert toolchain.library(OPS, folder).was_cached, "it was replaced"


def test_the_folder_of_another_user_is_not_used(
    folder: Path, give_away: Callable[[Path], None]
) -> None:
    """Its owner may swap the files in it. Red where only files are looked at."""
    first = toolchain.library(OPS, folder)
    give_away(folder)
    with pytest.warns(CacheWarning, match=r"cache is not used: it belongs to another user"):
        binary = toolchain.library(OPS, folder)
    assert not binary.was_cached and folder not in binary.path.parents
    assert stat.S_IMODE(binary.path.parent.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == [first.path]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CacheWarning)
        assert toolchain.library(OPS, folder).was_cached, "for as long as the process lives"


def test_a_folder_of_ours_is_closed_to_others(folder: Path) -> None:
    toolchain.library(OPS, folder)
    folder.chmod(0o777)
    assert toolchain.library(OPS, folder).was_cached
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_folder_that_is_meant_for_all_is_left_alone(tmp_path: Path) -> None:
    """As /tmp is. Red where its mode is changed, or files in it are trusted."""
    folder = tmp_path / "for all"
    folder.mkdir()
    folder.chmod(0o1777)
    with pytest.warns(CacheWarning, match="mode 1777"):
        assert KernelCache(folder).folder != folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777


def damages(content: bytes) -> list[bytes]:
    rng = random.Random(5)
    flipped = []
    for _ in range(12):
        at = rng.randrange(len(content))
        flipped.append(
            content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        )
    cuts = [content[:n] for n in (0, 1, 100, len(content) // 2, len(content) - 1)]
    return [*flipped, *cuts, content + b"\n"]


def test_a_damaged_entry_is_none(tmp_path: Path) -> None:
    """Red before: of 12 flipped bits 4 gave other results under the same fingerprint, and a cut
    library killed the process by SIGBUS.
    """
    cache, content = KernelCache(tmp_path), random.Random(1).randbytes(4096)
    cache.write("entry.so", content)
    path = cache.path("entry.so")
    whole = path.read_bytes()
    for damaged in damages(whole):
        path.write_bytes(damaged)
        assert cache.read("entry.so") is None
    path.write_bytes(whole)
    assert cache.read("entry.so") == content
    path.rename(tmp_path / "other.so")
    assert cache.read("other.so") is None, "an entry of another name is another kernel's"


def test_a_cut_library_is_built_again(folder: Path) -> None:
    path = toolchain.library(OPS, folder).path
    path.write_bytes(path.read_bytes()[:3000])
    again = toolchain.library(OPS, folder)
    assert not again.was_cached and run(again) == 1
    assert toolchain.library(OPS, folder).was_cached


def test_a_damaged_simt_kernel_is_built_again(tmp_path: Path) -> None:
    unit = Unit("k.cu", 'extern "C" __global__ void k(int *p) { *p = 7; }')
    compiler = ShimCompiler(tmp_path)
    first = compiler.compile(unit)
    first.path.write_bytes(first.path.read_bytes()[:3000])
    assert not compiler.is_cached(unit)
    assert not compiler.compile(unit).was_cached
    assert compiler.compile(unit).was_cached


def test_a_pipe_in_the_way_is_not_waited_for(tmp_path: Path) -> None:
    """Red with a plain open: it waits for a writer for ever."""
    os.mkfifo(tmp_path / "entry.so")
    assert KernelCache(tmp_path).read("entry.so") is None
    with pytest.raises(CompileError, match="FLASHRT_CACHE_DIR"):
        KernelCache(tmp_path).write("entry.so", b"x")


def test_what_was_checked_is_what_runs(folder: Path) -> None:
    """Red where the loader opens the file by its name: it may be another one by then."""
    binary = toolchain.library(OPS, folder)
    binary.path.write_bytes(b"no library")
    assert run(binary) == 1
    os.truncate(binary.path, 0)
    assert run(binary) == 1


def test_libraries_are_told_apart_and_loaded_once(tmp_path: Path) -> None:
    """Red where the loader goes by names: numbers of handles come again."""
    contents = []
    for n in range(5):
        (tmp_path / "n.c").write_text(f"static int c; int n(void) {{ return {10 * n} + c++; }}")
        subprocess.run(["cc", "-shared", "-fPIC", "n.c", "-o", "n.so"], cwd=tmp_path, check=True)
        contents.append((tmp_path / "n.so").read_bytes())
    path = tmp_path / "n.so"
    assert [shared_object.load(path, c).n() for c in contents] == [0, 10, 20, 30, 40]
    again = shared_object.load(path, contents[1]).n()
    assert again == 11, "a pool of threads is in static variables: two loads are not two pools"


def test_content_that_is_no_library_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = kernel_cache.Binary(tmp_path / "no.so", b"no library", "", was_cached=True)
    monkeypatch.setattr(toolchain, "library", lambda *_, **__: binary)
    with pytest.raises(BackendError, match=r"cannot load .*no\.so"):
        CpuDevice().build(OPS)


BUILDER = """
import sys, time
from pathlib import Path
from flashrt.backends.cache import KernelCache
with KernelCache(Path(sys.argv[1])).building() as work:
    (work / "half of a kernel.o").write_text("")
    print(work, flush=True)
    time.sleep(60)
"""


def test_folders_of_killed_builders_are_removed_and_no_others(tmp_path: Path) -> None:
    """Red before: each killed build left its folder for good."""
    command = [sys.executable, "-c", BUILDER, str(tmp_path)]
    builders = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "12"
    ]
    works = [Path(b.stdout.readline().strip()) for b in builders if b.stdout is not None]
    (tmp_path / "tmp_of_ours").mkdir()
    try:
        builders[0].send_signal(signal.SIGKILL)
        builders[0].wait()
        assert works[0].exists()
        with KernelCache(tmp_path).building() as work:
            left = set(tmp_path.iterdir())
            assert left == {works[1], work, tmp_path / "tmp_of_ours"}, "one builder lives"
    finally:
        for builder in builders:
            builder.kill()
            builder.communicate()
    earlier = tmp_path / "tmpabcd1234"  # of a version without locks
    earlier.mkdir()
    (earlier / "stub.cpp").write_text("")
    os.utime(earlier, (0, 0))
    with KernelCache(tmp_path).building():
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"tmp_of_ours"}


def test_doctor_tells_of_a_cache_that_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of a compiler that is missing only where it is missed."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu").chmod(0o1777)
    monkeypatch.setattr(doctor, "flags", lambda: Flags(cache_dir=tmp_path))
    monkeypatch.setattr(toolchain, "compiler", lambda: (_ for _ in ()).throw(CompileError("none")))
    monkeypatch.setattr(doctor, "_kernels", lambda: ("cpu device", "from the cache", True))
    assert doctor.doctor(as_json=True) == 1
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert "cpu may be written by others" in found["cache folder"]["finding"]
    assert found["C compiler"]["is_fine"] is None
    monkeypatch.setattr(doctor, "_kernels", lambda: ("cpu device", "no kernels", False))
    doctor.doctor(as_json=True)
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["C compiler"]["is_fine"] is False


NO_COMPILER = """
from flashrt.backends.cpu import compile as toolchain
from flashrt.backends.cpu.device import CpuDevice
from flashrt.base.errors import CompileError
from flashrt.ops import OPS
import importlib.util
importlib.util.find_spec = lambda name: None  # ziglang
try:
    toolchain.compiler()
except CompileError:
    device = CpuDevice()
    try:
        device.build(OPS)
        print("built", device.counters.compilations)
    except CompileError as error:
        print(error)
"""


def test_shipped_kernels_need_no_compiler(tmp_path: Path) -> None:
    """Red before: kernels of `build.py cpu --out` were not even looked for without a compiler."""
    shipped = toolchain.library(OPS).path  # as a build on another machine leaves it
    variables = {"PATH": "/nowhere", "FLASHRT_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}

    def start() -> str:
        done = subprocess.run(
            [sys.executable, "-c", NO_COMPILER], env=variables, cwd=ROOT, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    message = start()
    assert "no C compiler: install" in message and "build.py cpu --out" in message
    (tmp_path / "cpu").mkdir()
    shutil.copy(shipped, tmp_path / "cpu")
    assert start() == "built 0"


def test_another_compiler_builds_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red where kernels of any compiler will do although there is one: FLASHRT_CC would be idle."""
    first = toolchain.library(OPS, folder)
    monkeypatch.setattr(toolchain, "_compiler_version", lambda: "another")
    second = toolchain.library(OPS, folder)
    assert not second.was_cached and second.path != first.path


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red before: RuntimeError "Could not determine home directory" in containers."""

    def no_home(path: str) -> str:
        return path  # as os.path.expanduser does for a uid that has no entry

    monkeypatch.setattr(os.path, "expanduser", no_home)
    for environment in ({}, {"FLASHRT_CACHE_DIR": "~/kernels"}):
        with pytest.raises(FlagError, match="set FLASHRT_CACHE_DIR"):
            read(environment)
    assert read({"FLASHRT_CACHE_DIR": "/kernels"}).cache_dir == Path("/kernels")
    assert read({"XDG_CACHE_HOME": "/caches"}).cache_dir == Path("/caches/flashrt")
