"""Tracing: what FLASHRT_DEBUG prints, to stderr, one ladder.

IS: levels and one line format. IS NOT: logging of applications or timing of graphs.
Called by: engine (1 device, plan and arena; 2 a line per launch), session (1 boundaries passed
over), capsule (3 copies).
"""

from __future__ import annotations

import sys

from flashrt.base.flags import flags

PLAN, LAUNCHES, COPIES = 1, 2, 3


def is_on(level: int) -> bool:
    """Whether FLASHRT_DEBUG asks for a level."""
    return flags().debug >= level


def trace(level: int, message: str) -> None:
    """A line on stderr if the level is on."""
    if is_on(level):
        print(f"flashrt: {message}", file=sys.stderr)
