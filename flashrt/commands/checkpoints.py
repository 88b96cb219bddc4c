"""Where a command's model comes from: a checkpoint directory, or a seeded random one in the cache.

IS: names that users give, the choice between directories, and `load` with progress bars. IS NOT:
the format (weights.checkpoint) or the random values (weights.random_checkpoint).
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from flashrt.base.errors import CheckpointError, CheckpointWarning
from flashrt.base.flags import flags
from flashrt.base.messages import listed
from flashrt.commands.console import complain, progress_bars
from flashrt.core.backend import Progress
from flashrt.hub.packaged import PACKAGED
from flashrt.hub.resolve import resolve
from flashrt.load import KvDType, Precision, Weights, load
from flashrt.session.engine import SessionEngine
from flashrt.weights import random_checkpoint
from flashrt.weights.bundled_policies import bundled_policies

SEED = 0
_WORD = re.compile(r"[\w-]+")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Arguments of `flashrt.load` that the command line offers."""

    device: str = "auto"
    precision: Precision = "bfloat16"
    max_positions: int = 4096
    lanes: int = 1
    kv_dtype: KvDType = "bfloat16"
    pool_bytes: int | None = None
    draft: bool | None = None
    weights: Weights | None = None
    prefill_rows: int | None = None
    images: bool | None = False


def path_of(name: str) -> Path:
    """What a user names: see `hub.resolve`, or a robot policy that comes along. What exists on disk
    is meant before any name. Raises CheckpointError for a word that is neither.
    """
    policies = bundled_policies()
    if not _WORD.fullmatch(name) or os.path.lexists(name) or name in PACKAGED:
        return resolve(name)
    if name not in policies:
        raise CheckpointError(
            f"{name}: no such file or directory, and no name that is known; there are "
            f"{listed(PACKAGED)} after `flashrt pull`, and the robot policies {listed(policies)}"
        )
    return policies[name]


def cached_random_checkpoint(
    shape: str, progress: Progress | None = None, has_draft_head: bool = False
) -> tuple[Path, bool]:
    """A seeded random checkpoint of a named shape; and whether it was written just now.

    It lives in the cache folder under a name that changes with the code that draws its values.
    """
    source = Path(random_checkpoint.__file__).read_bytes()
    version = hashlib.sha256(source).hexdigest()[:8]
    name = f"random-{shape}{'-draft' * has_draft_head}-seed{SEED}-{version}"
    path = flags().cache_dir / "checkpoints" / name
    if path.is_dir():
        return path, False
    try:
        random_checkpoint.write_random_checkpoint(
            path, shape, seed=SEED, has_draft_head=has_draft_head, progress=progress
        )
    except CheckpointError:
        if not path.is_dir():  # else another process was first, with the same bytes
            raise
    return path, True


def open_engine(checkpoint: Path, options: EngineOptions) -> SessionEngine:
    """`flashrt.load` with progress bars; what it warns of is a note on stderr."""
    with progress_bars() as progress, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        progress("engine (compiles its kernels on first use)", 0, 0)
        engine = load(
            checkpoint,
            device=options.device,
            precision=options.precision,
            max_positions=options.max_positions,
            lanes=options.lanes,
            kv_dtype=options.kv_dtype,
            pool_bytes=options.pool_bytes,
            draft=options.draft,
            weights=options.weights,
            prefill_rows=options.prefill_rows,
            images=options.images,
            progress=progress,
        )
    for warning in caught:
        complain(f"note: {warning.message}")
    return engine
