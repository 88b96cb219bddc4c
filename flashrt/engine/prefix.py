"""What plans stand on: from an observation to the rows of a lane, and no more of them than needed.

IS: comparing what a lane's rows are of with what is observed, and the replays that make the rest.
IS NOT: the rows' meaning (models/prefix), or plans (actions).

Words name the content of rows, so a lane's journal says what its rows are of, whoever made them:
rows that a capsule brought back count as those that were just made. All rows of the block see each
other: one image that is new, or another task, makes all of it anew. The state's row is apart. What
the tower makes of an image stays in the lane's memory, but is no state: a camera whose image is as
it was costs nothing but its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flashrt.capsule.lineage import Lane
from flashrt.core.copylist import Copy, CopyList
from flashrt.core.planner import Slot
from flashrt.engine.numbers import LEVELS
from flashrt.engine.packed import Packed, Pixels
from flashrt.models.prefix import (
    LOOK,
    READ,
    READ_STATE,
    SPANS,
    PrefixModel,
    Span,
    Words,
    hash_words,
)
from flashrt.ops.cursor import CURSOR_WORDS, CursorWord

Write = Callable[[Lane, str, NDArray[np.generic], int], None]  # lane, region, array, first word
Run = Callable[[str, Lane, int], None]  # phase, lane, rows
Move = Callable[[CopyList], None]  # within the arena
Read = Callable[[Lane, str], NDArray[np.generic]]


class Prefixes:
    """Rows of the lanes of a policy. The engine's doors to a device are given."""

    def __init__(
        self,
        model: PrefixModel,
        slots: Callable[[Lane, str], Slot],
        *,
        write: Write,
        read: Read,
        run: Run,
        move: Move,
    ) -> None:
        self.model = model
        self._slots = slots
        self._write, self._read, self._run, self._move = write, read, run, move
        # By lane: of each camera, whose image the tower has seen last.
        self._made: dict[int, list[bytes | None]] = {}

    def forget(self, lane: Lane) -> None:
        """Something else wrote to the lane's memory."""
        self._made.pop(lane.index, None)

    def bring(self, lane: Lane, seen: Packed) -> None:
        """The lane's rows are of this observation. What is there already is not made again."""
        keys = [None if image is None else _key(image) for image in seen.images]
        block, state = self._words_of(seen, keys)
        whole = np.concatenate([block, state])
        if self._shared(lane, whole) < len(block):
            self._make_block(lane, seen, keys, block)
        is_there = self._shared(lane, whole) == len(whole) and self._is_state(lane, seen)
        if len(state) and not is_there:
            self._make_state(lane, seen, block, state)
        lane.stand(len(whole))
        lane.joint = len(block)

    def place_suffix(self, lane: Lane) -> None:
        """Rows of a chunk are about to be written, behind those of the observation."""
        lane.overwrite()
        self._span(lane, Span.SUFFIX, lane.position, self.model.config.chunk_size)

    # -- inside -----------------------------------------------------------------------------------

    def _words_of(self, seen: Packed, keys: list[bytes | None]) -> tuple[Words, Words]:
        """Of the block's rows, and of those that follow it."""
        n, parts = self.model.rows_per_camera, []
        for camera, key in enumerate(keys):
            if key is not None:
                parts.append(hash_words(bytes([camera]) + key, n))
        parts.append(np.array(seen.tokens, np.int32))
        state = hash_words(seen.state.tobytes(), self.model.state_rows)
        return np.concatenate(parts), state

    def _shared(self, lane: Lane, words: Words) -> int:
        """How many of these rows are in the lane, from the first on."""
        here = max(lane.position, lane.intact) if lane.is_trusted else 0
        n = min(here, len(words))
        differ = np.flatnonzero(lane.journal[:n] != words[:n])
        return int(differ[0]) if len(differ) else n

    def _is_state(self, lane: Lane, seen: Packed) -> bool:
        """A word of one row may be that of two states: what it is of lies beside."""
        if not self.model.state_rows:
            return True  # its numbers are among the words
        return self._read(lane, "state").tobytes() == seen.state.tobytes()

    def _make_block(self, lane: Lane, seen: Packed, keys: list[bytes | None], words: Words) -> None:
        lane.stand(0)
        lane.overwrite()
        model, moves, at = self.model, [], 0
        n = model.rows_per_camera
        made = self._made.setdefault(lane.index, [None] * len(keys))
        source, target = self._slots(lane, "made"), self._slots(lane, "seen")
        row_nbytes = source.storage.nbytes // source.region.shape[0]
        for camera, (image, key) in enumerate(zip(seen.images, keys, strict=True)):
            if image is None:
                continue
            if made[camera] != key:
                made[camera] = None
                levels = LEVELS[image] if image.dtype == np.uint8 else image
                self._write(lane, f"images.{camera}", np.ascontiguousarray(levels), 0)
                self._run(LOOK, lane, camera + 1)
                made[camera] = key
            first = source.offset + camera * n * row_nbytes
            moves.append(Copy(first, target.offset + at * row_nbytes, n * row_nbytes))
            at += n
        self._move(CopyList(moves))
        self._write(lane, "words", words, 0)
        self._span(lane, Span.BLOCK, 0, len(words))
        self._run(READ, lane, model.most_block_rows)
        lane.commit(words)

    def _make_state(self, lane: Lane, seen: Packed, block: Words, words: Words) -> None:
        lane.stand(len(block))
        lane.overwrite()
        self._write(lane, "state", seen.state, 0)
        self._write(lane, "words", words, 0)
        self._span(lane, Span.STATE, len(block), len(words))
        self._run(READ_STATE, lane, 1)
        lane.commit(words)

    def _span(self, lane: Lane, span: Span, position: int, rows: int) -> None:
        words = np.zeros(CURSOR_WORDS, np.int32)
        words[CursorWord.POSITION], words[CursorWord.ROWS] = position, rows
        self._write(lane, SPANS, words, span * CURSOR_WORDS)


def _key(image: Pixels) -> bytes:
    """Of an image's content."""
    content = hashlib.blake2b(digest_size=32)
    content.update(f"{image.dtype}".encode())
    content.update(np.ascontiguousarray(image).data)
    return content.digest()
