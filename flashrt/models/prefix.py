"""Rows that a plan stands on: what a policy reads of an observation before it moves.

IS: the protocol of a policy of images and an instruction, the regions that its lanes have for it,
and the words that name their rows. IS NOT: what is done with them (engine/prefix), or a family.

A lane of such a policy has committed rows, as a lane of tokens has: first a block of the images'
rows and the instruction's, which all see each other, then, where a family has it, the state's row,
which sees them. Its position is the number of rows. The rows of a chunk in the making lie behind
them, are never committed, and are written anew by each Euler step.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from flashrt.core.region import DType, Region, Role
from flashrt.models.actions import ActionModel
from flashrt.models.features import Camera
from flashrt.models.sight import FIRST_WORD
from flashrt.ops.cursor import CURSOR_WORDS
from flashrt.text.tokenizer import Tokenizer

LOOK, READ, READ_STATE = "look", "read", "read_state"  # LOOK has a tape per camera, from 1 on
SPANS: Final = "spans"
TASK: Final = "task"  # the part of an observation that is a text
Words = NDArray[np.int32]
Rows = NDArray[np.float32]


class Span(enum.IntEnum):
    """Cursors of a lane, in its region `spans`: of launches over which rows."""

    BLOCK = 0
    STATE = 1
    SUFFIX = 2


@runtime_checkable
class PrefixModel(ActionModel, Protocol):
    """A model of actions whose plans stand on rows: regions `images.<i>`, `made` [cameras * tokens,
    hidden] of the tower's rows of all cameras, `seen` [block, hidden] of those that a block has,
    `words` [block], `spans`, and where the family has it, `state`.
    """

    @property
    def cameras(self) -> Sequence[Camera]: ...
    @property
    def rows_per_camera(self) -> int: ...
    @property
    def state_rows(self) -> int:
        """Rows of the state: 1, or 0 where a family has it in the task."""
        ...

    @property
    def vocab_size(self) -> int: ...
    @property
    def most_block_rows(self) -> int:
        """Rows of images and instruction that a lane has room for."""
        ...

    @property
    def most_prefix_rows(self) -> int:
        """The same, the state's row included."""
        ...

    def guided(self, left_over: Rows | None, delay: int, horizon: int | None) -> Mapping[str, Rows]:
        """Regions of a lane, and what is in them, of a chunk that rows [n, action_dim] of the one
        before guide, or none; `delay` and `horizon`: see vla.guidance. Empty where a family, or its
        config, knows of no guidance.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """Of instructions: its file is read once, at the first call or by `task_tokens`. Raises
        CheckpointError for a file that is not there, which names the way out, or is damaged.
        """
        ...

    def task_tokens(self, task: str, state: Rows) -> list[int]:
        """Of an instruction, with a state [state_dim] where a family writes that into the text.
        Raises TokenError; CheckpointError, see `tokenizer`.
        """
        ...


def prefix_regions(
    cameras: Sequence[Camera], tokens: int, block: int, hidden: int
) -> tuple[Region, ...]:
    """IO regions of a lane for them; `tokens`: rows of a camera, `block`: of a whole block."""
    images = (
        Region(f"images.{i}", (c.height, c.width, 3), DType.F32, Role.IO)
        for i, c in enumerate(cameras)
    )
    return (
        *images,
        Region("made", (len(cameras) * tokens, hidden), DType.F32, Role.IO),
        Region("seen", (block, hidden), DType.F32, Role.IO),
        Region("words", (block,), DType.I32, Role.IO),
        Region(SPANS, (len(Span), CURSOR_WORDS), DType.I32, Role.IO),
    )


def hash_words(content: bytes, n_rows: int) -> Words:
    """Words of rows with such a content, whose hash it is: other ones for each row, and none that a
    vocabulary has. int32 [n_rows].
    """
    words = np.frombuffer(hashlib.shake_128(content).digest(4 * n_rows), np.uint32)
    return (words % FIRST_WORD + FIRST_WORD).astype(np.int32)
