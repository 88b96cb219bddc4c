"""A path -> an open checkpoint, whatever it is stored as.

IS: the choice between a directory of the Hugging Face kind and a GGUF file. IS NOT: either of them
(checkpoint, gguf), or names of models (hub).
"""

from __future__ import annotations

import os
from pathlib import Path

from flashrt.weights.checkpoint import Checkpoint, open_checkpoint
from flashrt.weights.folder import CONFIG_FILE, has_weights
from flashrt.weights.gguf.checkpoint import open_gguf
from flashrt.weights.gguf.file import is_gguf


def open_weights(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint: its headers are read, no weights yet. Raises CheckpointError."""
    is_path = isinstance(path, str | Path)
    return open_gguf(path) if is_path and is_gguf(path) else open_checkpoint(path)


def has_config_alone(path: Path) -> bool:
    """Whether a directory has a config.json and no weights: enough for a plan."""
    return (path / CONFIG_FILE).is_file() and not has_weights(path)
