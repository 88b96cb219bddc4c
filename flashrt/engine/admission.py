"""Admission: whether bytes that were read are a state that kernels can be let loose on.

IS: the checks that checksums cannot make, for who forged or mistook a whole file: the cursor that
kernels index with, and token ids. IS NOT: formats (core.blob, manifest). Called by: load, store.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError
from flashrt.core.backend import Bytes

POSITION_WORD, TOKEN_WORD = 0, 2  # of the cursor; see ops.table


def check_state(
    where: str, cursor: Bytes, tokens: NDArray[np.int32], position: int, vocab_size: int
) -> None:
    """Raises CapsuleError unless the cursor stands at `position` and all tokens exist."""
    words = np.ascontiguousarray(cursor).view(np.int32)
    if int(words[POSITION_WORD]) != position:
        raise CapsuleError(
            f"{where}: its cursor is at {int(words[POSITION_WORD])}, its position is {position}"
        )
    if len(tokens) != position:
        raise CapsuleError(f"{where}: {len(tokens)} tokens for position {position}")
    seen = np.append(tokens, max(int(words[TOKEN_WORD]), 0))
    if seen.min() < 0 or seen.max() >= vocab_size:
        raise CapsuleError(f"{where}: a token is not in [0, {vocab_size})")
