"""The checkpoint in the package: a tiny trained Qwen3.5 hybrid, for demos, examples and tests.

IS: its path. IS NOT: a download. What it can do, and how it was made: README.md in its folder.
"""

from __future__ import annotations

from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.weights.folder import CONFIG_FILE, WEIGHTS_FILE

_FOLDER = Path(__file__).parent / "bundled" / "tiny-agent"


def bundled_checkpoint() -> Path:
    """The directory of the bundled checkpoint, for `flashrt.load`.

    Raises CheckpointError if the installation lacks it.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (_FOLDER / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{_FOLDER}: {', '.join(missing)} missing; this installation came without the bundled "
            "model: install a released wheel, or make it as tools/train_tiny/README.md tells"
        )
    return _FOLDER
