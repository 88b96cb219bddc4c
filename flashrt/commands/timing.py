"""A clock and a byte counter around one act; prefills with a progress bar.

IS: what demo and bench measure with. IS NOT: what they measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.core.backend import Progress
from flashrt.session.engine import SessionEngine
from flashrt.session.session import Session

Tokens = NDArray[np.int32]
T = TypeVar("T")
_PIECE = 1024  # tokens between two looks at the progress bar


def timed(engine: SessionEngine, act: Callable[[], T]) -> tuple[T, float, int]:
    """What it returned, seconds, bytes that copies moved."""
    before = engine.stats()["copied_bytes"]
    started = time.perf_counter()
    result = act()
    engine.backend.sync()
    return result, time.perf_counter() - started, engine.stats()["copied_bytes"] - before


def prefill(
    engine: SessionEngine, session: Session, tokens: Tokens, progress: Progress, what: str
) -> float:
    """In pieces, for the progress bar: the bits do not depend on them. Returns seconds."""
    seconds = 0.0
    for start in range(0, len(tokens), _PIECE):
        begun = time.perf_counter()
        session.prefill(tokens[start : start + _PIECE])
        engine.backend.sync()
        seconds += time.perf_counter() - begun
        progress(what, min(start + _PIECE, len(tokens)), len(tokens))
    return seconds


def synthetic_tokens(random: np.random.Generator, vocab_size: int, count: int) -> Tokens:
    """Random ids: the work does not depend on their meaning."""
    return random.integers(0, vocab_size, count, dtype=np.int32)
