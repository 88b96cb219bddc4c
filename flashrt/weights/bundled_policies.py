"""The robot policies in the package, by name.

IS: where they are. IS NOT: a download. What each can do, and how it was made: README.md in its
folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from flashrt.base.errors import CheckpointError
from flashrt.base.messages import listed, printable

_FOLDER, _PREFIX = Path(__file__).parent / "bundled", "policy-"


def bundled_policies() -> dict[str, Path]:
    """Directories of the bundled policies by name."""
    return {p.name.removeprefix(_PREFIX): p for p in sorted(_FOLDER.glob(f"{_PREFIX}*"))}


def policy_path(checkpoint: str | os.PathLike[str]) -> Path:
    """The path of a policy that is given as such, or as the name of a bundled one.

    Raises CheckpointError for a single word that is neither.
    """
    text = os.fspath(checkpoint) if isinstance(checkpoint, str | os.PathLike) else ""
    path, bundled = Path(text), bundled_policies()
    is_word = text and path.name == text and not os.path.lexists(text) and text != "~"
    if is_word and text not in bundled:
        raise CheckpointError(
            f"{printable(text)}: no such directory, and no bundled policy; there are "
            f"{listed(bundled)}"
        )
    return bundled[text] if is_word else path
