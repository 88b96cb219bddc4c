"""Tracing: what FLASHRT_DEBUG prints, to stderr, one ladder.

IS: levels (1 device, plan and arena; 2 a line per launch; 3 copies), one line format, and the
notice of a long wait. IS NOT: logging of applications or timing of graphs.
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


def announce(message: str) -> None:
    """A line on stderr before a wait that somebody may wonder at: on a terminal, or at level 1."""
    if sys.stderr.isatty() or is_on(PLAN):
        print(f"flashrt: {message}", file=sys.stderr)
