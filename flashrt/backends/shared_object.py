"""Shared objects: bytes that were checked become a library of the process.

IS: dlopen of a sealed copy in memory, so that what was checked is what runs: nobody can swap, cut
or damage it between the check and a page fault. A library is loaded once per path and content, and
so is what it keeps in static variables, such as a pool of threads.
IS NOT: the check; that is `cache`. It exists because dlopen maps a file, and a mapped file that is
cut kills the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import tempfile
import threading
from pathlib import Path

from flashrt.base.system import at_fork

with contextlib.suppress(ImportError):  # native Windows, which has no memfd_create either
    import fcntl

_LOADED: dict[tuple[Path, bytes], ctypes.CDLL] = {}
_LOADING = threading.Lock()
at_fork(  # a child must not wait for a thread that it does not have
    _LOADING.release, before=_LOADING.acquire, parent=_LOADING.release
)


def load(path: Path, content: bytes) -> ctypes.CDLL:
    """The library of that content; `path` is where it came from. Raises OSError."""
    key = (path, hashlib.sha256(content).digest())
    with _LOADING:
        if key not in _LOADED:
            _LOADED[key] = _open(path.name, content, len(_LOADED))
        return _LOADED[key]


def _open(name: str, content: bytes, serial: int) -> ctypes.CDLL:
    if hasattr(os, "memfd_create"):  # Linux
        try:
            return _open_in_memory(name, content, serial)
        except OSError:  # no /proc, or a policy against it; or the content is no library: see below
            pass
    with tempfile.TemporaryDirectory(prefix="flashrt-") as folder:  # for its owner alone
        copy = Path(folder) / name
        copy.touch(mode=0o700)
        with copy.open("wb") as file:
            file.write(content)
        return ctypes.CDLL(str(copy))


def _open_in_memory(name: str, content: bytes, serial: int) -> ctypes.CDLL:
    handle = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals)
        # The loader takes two libraries of one name for the same, and numbers of handles come
        # again: the path is written differently each time.
        detour = "".join("/." if bit == "1" else "//" for bit in f"{serial:b}")
        return ctypes.CDLL(f"/proc/self/fd{detour}/{handle}")
