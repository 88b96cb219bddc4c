"""Rows of images in a lane of tokens: the regions that they need, and the words that name them.

IS NOT: a tower (qwen35/tower), or the memory of what was seen (engine/sight). A row of an image has
a word in place of a token: 30 bits of a hash of its content below a bit that no vocabulary reaches,
other ones for each row, so that images differ wherever tokens are compared: in capsules, segments,
prefix indexes, stores. An image has LEAST_ROWS rows at least, 150 bits.

The place of a text row is its position + delta, a word of state; a row of an image has two more, by
its rows and columns (multimodal rope). Places after an image go on from the longer of its sides, so
delta changes when the last of its rows is there.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from flashrt.core.region import DType, Region, Role

SEEN, OFFSETS, GROWTH, DELTA = "seen", "offsets", "growth", "delta"
FIRST_WORD: Final = 1 << 30  # words from here on are no tokens
LEAST_ROWS: Final = 5


def sight_regions(hidden: int, prefill_rows: int) -> tuple[Region, ...]:
    """Regions of a lane besides those of `lane.lane_regions`."""
    return (
        Region(DELTA, (1,), DType.I32, Role.FIXED, is_digested=True),
        Region(SEEN, (prefill_rows, hidden), DType.F32, Role.IO),
        Region(OFFSETS, (prefill_rows, 3), DType.I32, Role.IO),
        Region(GROWTH, (1,), DType.I32, Role.IO),
    )


def words_of(pixels: NDArray[np.uint8], n_rows: int) -> NDArray[np.int32]:
    """The words of an image's rows: of its size and content. int32 [n_rows]."""
    content = np.array(pixels.shape, np.int64).tobytes() + np.ascontiguousarray(pixels).tobytes()
    words = np.frombuffer(hashlib.shake_128(content).digest(4 * n_rows), np.uint32)
    return (words % FIRST_WORD + FIRST_WORD).astype(np.int32)
