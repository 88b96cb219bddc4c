"""Replacing a file: whole or not at all. The only place where flashrt gives a finished file a name.

IS: write beside it under a temporary name, fsync, rename, fsync the folder. IS NOT: formats,
folders that are published whole (a rename of the folder), logs that grow line by line, or errors:
OSError goes to the caller, who knows what the file was for.

The promise. Whoever opens the name sees the old content or the new, never a part, also when the
writer is killed; with `is_durable`, also after a loss of power, and once `replacing` has returned,
the new. When it raises, the temporary file is gone and the old content stands (or the new, where
nothing but the last fsync of the folder failed).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

_LONGEST_SUFFIX = 16  # a longer one is no suffix that a writer goes by


@contextlib.contextmanager
def replacing(
    path: Path, *, is_durable: bool, temporary_in: Path | None = None, mode: int | None = None
) -> Iterator[Path]:
    """Gives a fresh path with the same suffix; what is written there gets the name `path`.

    The file's mode is `mode`, or that of any new file. A link is replaced, not followed; a device
    or a pipe is refused. `temporary_in`: a folder of the same filesystem that the caller owns, for
    the temporary file (default: the folder of `path`, under a hidden name). Raises OSError.
    """
    suffix = path.suffix if len(path.suffix) <= _LONGEST_SUFFIX else ""
    name = f"{os.getpid()}-{secrets.token_hex(8)}{suffix}"
    if temporary_in is None:
        if _is_stream(path):
            raise OSError(errno.EINVAL, "not a file, so it cannot be replaced", str(path))
        temporary = path.with_name(f".{name}")
    else:
        temporary = temporary_in / name
    try:
        temporary.touch(exist_ok=False)
        if mode is None:
            mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # a writer such as safetensors makes a file of its own, for its owner
        if is_durable:
            _sync(temporary, os.O_RDWR)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if is_durable:
        sync_folder(path.parent)


def replace_file(path: Path, data: bytes | memoryview | str, *, is_durable: bool) -> None:
    """A file of these bytes, or of this text as UTF-8; see `replacing`. Raises OSError.

    What cannot be replaced, such as /dev/stdout, is written to.
    """
    raw = data.encode() if isinstance(data, str) else data
    if _is_stream(path):
        path.write_bytes(raw)
        return
    with replacing(path, is_durable=is_durable) as temporary:
        temporary.write_bytes(raw)


def sync_folder(folder: Path) -> None:
    """Names that were made or replaced in a folder outlive a loss of power. Raises OSError."""
    _sync(folder, os.O_RDONLY)


def _sync(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_stream(path: Path) -> bool:
    """Whether the name stands for something that is neither a file nor a folder, or for what this
    process has open, as /dev/stdout does even where a shell sends that to a file.
    """
    try:
        if path.is_symlink() and path.readlink().parts[:2] == ("/", "proc"):
            return True
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
