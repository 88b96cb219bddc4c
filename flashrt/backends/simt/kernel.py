"""One kernel built by the SIMT shim: found in its library, checked against limits, run.

IS: the calling convention of the shim's entries, `int simt_<kernel>(grid_block[6], shared_bytes,
seed, params, workspace, error, error_chars)`. IS NOT: the shim, nor the queue before it.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashrt.backends.cuda.driver_api import DEFAULT_SHARED_BYTES, ArgumentBlock, LaunchConfig
from flashrt.base.errors import BackendError
from flashrt.base.system import at_fork

MAX_SHARED_BYTES = 163 << 10  # of a block on sm_80, which the device says it is
MAX_BLOCK_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
_ERROR_CHARS = 1024
_MASK = (1 << 64) - 1
# A library keeps its threads and static shared memory in static variables, all libraries have their
# stacks in one workspace, and all devices of the process share them: one launch at a time. A fork
# waits for it too.
_RUNNING = threading.Lock()
_WORKSPACE = (ctypes.c_void_p * 4)()  # fiber.h allocates what it points to; 10 MB
at_fork(_RUNNING.release, before=_RUNNING.acquire, parent=_RUNNING.release)


@dataclass(slots=True)
class Kernel:
    """An entry of a shim library."""

    name: str
    entry: Callable[..., int]
    library: Path
    shared_limit_bytes: int = DEFAULT_SHARED_BYTES

    def check(self, config: LaunchConfig) -> None:
        """Raise BackendError for a geometry that some supported GPU would refuse."""
        n_threads = config.block[0] * config.block[1] * config.block[2]
        if not 1 <= n_threads <= MAX_BLOCK_THREADS or config.block[2] > 64:
            raise BackendError(f"kernel {self.name}: block {config.block} is out of range")
        if any(not 1 <= n <= most for n, most in zip(config.grid, MAX_GRID, strict=True)):
            raise BackendError(f"kernel {self.name}: grid {config.grid} is out of range")
        if config.shared_bytes > self.shared_limit_bytes:
            raise BackendError(
                f"kernel {self.name}: {config.shared_bytes} bytes of dynamic shared memory, "
                f"{self.shared_limit_bytes} are allowed: call allow_shared first"
            )

    def run(self, config: LaunchConfig, block: ArgumentBlock, seed: int) -> None:
        """Run all blocks; seed 0 in order. Raises BackendError with what the shim found wrong."""
        geometry = (ctypes.c_uint * 6)(*config.grid, *config.block)
        error = ctypes.create_string_buffer(_ERROR_CHARS)
        with _RUNNING:
            status = self.entry(
                ctypes.addressof(geometry), config.shared_bytes, seed, block.params,
                ctypes.addressof(_WORKSPACE), error, _ERROR_CHARS,
            )  # fmt: skip
        if status:
            text = _with_source_line(self.library, error.value.decode(errors="replace"))
            raise BackendError(f"kernel {self.name}: {text} (schedule seed {seed})")


def find(path: Path, library: ctypes.CDLL, name: str) -> Kernel:
    """A kernel of a loaded library. Raises BackendError where it has none of that name."""
    try:
        entry = library[f"simt_{name}"]
    except AttributeError as error:
        raise BackendError(
            f"cuModuleGetFunction ({name}): CUDA_ERROR_NOT_FOUND, {path} holds no such kernel"
        ) from error
    entry.argtypes = (
        ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_char_p, ctypes.c_int,
    )  # fmt: skip
    entry.restype = ctypes.c_int
    return Kernel(name, entry, path)


def mix(seed: int) -> int:
    """splitmix64 to a seed of the shim: 63 bits, never 0."""
    z = (seed * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) & (_MASK >> 1) or 1


def _with_source_line(library: Path, text: str) -> str:
    """Code addresses, as the race detector gives them, to file and line if addr2line is there."""
    found = re.search(r"at \+(0x[0-9a-f]+)", text)
    if not found:
        return text
    try:
        lines = subprocess.run(
            ["addr2line", "-e", str(library), found[1]], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return text
    return text.replace(found[0], f"at {lines}")
