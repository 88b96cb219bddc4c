"""The robot policies in the package, by name.

IS: where they are. IS NOT: a download. Called by: policy_engine, commands, examples. What each can
do, and how it was made: README.md in its folder.
"""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER, _PREFIX = Path(__file__).parent / "bundled", "policy-"


def bundled_policies() -> dict[str, Path]:
    """Directories of the bundled policies by name."""
    return {p.name.removeprefix(_PREFIX): p for p in sorted(_FOLDER.glob(f"{_PREFIX}*"))}


def policy_path(checkpoint: str | os.PathLike[str]) -> Path:
    """The directory of a policy that is given as such, or as the name of a bundled one."""
    path = Path(checkpoint)
    return path if path.exists() else bundled_policies().get(str(checkpoint), path)
