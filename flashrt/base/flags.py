"""Flags: every FLASHRT_* environment variable, typed, read once; an unknown one is refused.

IS: the only place that reads FLASHRT_* of the environment. IS NOT: options of an engine; those are
arguments of `load`. It exists so that a misspelt variable is an error, and not a setting that does
nothing.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from flashrt.base.errors import FlagError

PREFIX = "FLASHRT_"


@dataclass(frozen=True, slots=True)
class Flags:
    """Field `x` is variable FLASHRT_X."""

    threads: int = 0  # CPU threads; 0 = the cores this process may run on, at most 16
    cache_dir: Path = Path()  # compiled kernels; default: the user's cache folder
    debug: int = 0  # 1 device, plan and arena; 2 a line per launch; 3 copies; see base.tracing
    poison: bool = False  # fill scratch with 0xFF (NaN) at each commit boundary
    api_key: str = field(default="", repr=False)  # `flashrt serve` asks for it
    cc: str = ""  # C compiler; default $CC, then cc, gcc, clang, zig


def read(environ: Mapping[str, str]) -> Flags:
    """Flags from an environment. Raises FlagError for unknown names and unreadable values."""
    known = {PREFIX + f.name.upper(): f.name for f in fields(Flags)}
    if unknown := sorted(n for n in environ if n.startswith(PREFIX) and n not in known):
        raise FlagError(f"unknown variables {unknown}; flashrt reads {sorted(known)}")
    text = {key: environ[name] for name, key in known.items() if environ.get(name)}
    return Flags(
        threads=_integer("threads", text.get("threads", "0"), 0, 256),
        cache_dir=_cache_dir(text.get("cache_dir", ""), environ.get("XDG_CACHE_HOME", "")),
        debug=_integer("debug", text.get("debug", "0"), 0, 100),
        poison=bool(_integer("poison", text.get("poison", "0"), 0, 1)),
        api_key=text.get("api_key", ""),
        cc=text.get("cc", environ.get("CC", "")),
    )


@functools.cache
def flags() -> Flags:
    """The flags of this process, read at first use."""
    return read(os.environ)


def hides_gpus() -> bool:
    """Whether CUDA_VISIBLE_DEVICES keeps all GPUs from this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def thread_count() -> int:
    """Threads of the CPU pool: FLASHRT_THREADS, or the cores this process may run on, at most
    16.
    """
    if flags().threads:
        return flags().threads
    if hasattr(os, "sched_getaffinity"):  # Linux: respects taskset and containers' cpusets
        return min(16, len(os.sched_getaffinity(0)))
    return min(16, os.cpu_count() or 1)


def _cache_dir(chosen: str, base: str) -> Path:
    """The folder chosen, else `flashrt` in the user's cache folder. Users without a home exist, in
    containers for instance.
    """
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return ((Path(base) if base else Path.home() / ".cache") / "flashrt").absolute()
    except RuntimeError as error:
        raise FlagError(
            f"there is no folder for compiled kernels: {error}; set {PREFIX}CACHE_DIR to a folder "
            "that this user can write"
        ) from error


def _integer(name: str, text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        wanted = f"an integer in [{low}, {high}]"
        raise FlagError(f"{PREFIX}{name.upper()}={text!r} is not {wanted}; unset it or correct it")
    return value
