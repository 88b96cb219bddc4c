"""The package where the system is not POSIX: no fcntl, no forks, no reads at an offset.

IS: native Windows as far as Python shows it: its absent modules and functions are taken away in a
process of its own, and msvcrt is a double over flock. IS NOT: Windows: its rules about open files,
its paths and its compilers.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WINDOWS = """
import concurrent.futures, errno, fcntl, multiprocessing, os, pkgutil, subprocess, sys, types
import logging, random, tempfile, threading, uuid, importlib, shutil, asyncio, queue
from pathlib import Path
import numpy, safetensors.numpy, tokenizers, jinja2, rich.console, fsspec, huggingface_hub

flock, exclusive = fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB
locked = []

def locking(handle, mode, nbytes):  # of msvcrt: one byte, at the handle's position, or EACCES
    assert (mode, nbytes) == (msvcrt.LK_NBLCK, 1)
    locked.append(os.lseek(handle, 0, os.SEEK_CUR))
    try:
        flock(handle, exclusive)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

msvcrt = types.ModuleType("msvcrt")
msvcrt.locking, msvcrt.LK_NBLCK = locking, 2
sys.modules["msvcrt"] = msvcrt
for name in ("fcntl", "resource", "termios", "pwd", "grp", "tty"):
    sys.modules[name] = None  # an import of it raises ImportError
for name in (
    "register_at_fork", "fork", "O_NOFOLLOW", "O_NONBLOCK", "pread", "preadv", "pwrite", "pwritev",
    "geteuid", "getuid", "fchmod", "memfd_create", "posix_fadvise", "sched_getaffinity", "uname",
):
    delattr(os, name)
"""
IMPORT_ALL = """
import flashrt
for module in pkgutil.walk_packages(flashrt.__path__, "flashrt."):
    if "cuda_src" not in module.name and not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name == "llama_cpp", error  # of the comparison, which installs it
"""
USE = """
import flashrt
from flashrt.base.files import lock_file, replace_file
from flashrt.base.locks import hold
from flashrt.store.store import Store
from flashrt.store.upkeep import sweep
from flashrt.weights.bundled import bundled_checkpoint

folder = Path(sys.argv[1])
held, other = (lock_file(folder / "lock", os.O_CREAT) for _ in range(2))
hold(held)
try:
    hold(other, may_wait=False)
except BlockingIOError:
    pass
else:
    raise AssertionError("two hold one lock")
held.close()
hold(other, is_shared=True)
assert locked == [locked[0]] * 3 and locked[0] > 1 << 30, "far from any content"
replace_file(folder / "file", "old", is_durable=True)
replace_file(folder / "file", "new", is_durable=True)
assert (folder / "file").read_text() == "new"

engine = flashrt.load(bundled_checkpoint(), device="cpu", max_positions=128, lanes=2)
session = engine.session()
session.prefill(range(40))
capsule = session.snapshot("kept")
digest, before = capsule.digest, len(locked)
store = Store(folder / "store")
store.save(capsule)
assert len(locked) > before, "a store is locked"
capsule.to("disk")
session.prefill([1, 2, 3])
session.restore(capsule)
assert session.digest() == digest
again = engine.session()
again.restore(store.load(engine, "kept"))
assert again.digest() == digest
sweep(store)
engine.close()
"""


RAY = "import ray.serve\n"  # it has wheels of its own for Windows: this system's is loaded before


def run(code: str, *arguments: str, first: str = "") -> None:
    done = subprocess.run(
        [sys.executable, "-c", first + WINDOWS + code, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_every_module_can_be_imported() -> None:
    """Red for an `import fcntl`, or a use of what Windows has not, at the top of any module."""
    run(IMPORT_ALL, first=RAY)


def test_locks_files_and_stores_work_through_msvcrt(tmp_path: Path) -> None:
    """Red where a lock is not taken, is taken on bytes that others read, or a read or a write at
    an offset needs POSIX.
    """
    run(USE, str(tmp_path))
