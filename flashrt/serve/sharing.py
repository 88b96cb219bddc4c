"""A store that several servers serve from: who wrote a session last, and in which version.

IS: the stamp in a session's file, and what a server needs to know of itself to set it. IS NOT: the
files (sessions), or who serves which session (fleet).

Every write of a session's file has its writer and a number that grows. A server that finds another
stamp than its own, or than the one it took the session over with, knows that the session went on
elsewhere: it reads it anew before it serves it, and writes nothing over it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Stamp = tuple[str, int]  # writer, version


@dataclass(frozen=True, slots=True)
class Sharing:
    """tokenizer: digest of the one that the sessions' tokens are of. writer: this server."""

    tokenizer: str
    writer: str = field(default_factory=lambda: secrets.token_hex(8))


def stamp_of(document: Mapping[str, Any]) -> Stamp:
    """Of a session's document; of one that a server on its own wrote: no writer, version 0.

    Raises ValueError or TypeError for one that is damaged.
    """
    return str(document.get("writer", "")), int(document.get("version", 0))
