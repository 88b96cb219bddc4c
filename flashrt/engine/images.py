"""The engine of a vision tower: patches of an image -> rows for the text model.

IS: one verb, a replay. IS NOT: the text model's engine (tokens), or the memory of what was seen
(sight).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt.capsule.turn import in_turn
from flashrt.core.backend import Backend
from flashrt.core.runs import Run
from flashrt.engine.engine import Engine, PoolDefault
from flashrt.models.qwen35.patches import Patches
from flashrt.models.qwen35.tower import SEE, Tower
from flashrt.ops.cursor import CURSOR_WORDS, CursorWord
from flashrt.weights.checkpoint import Checkpoint


class ImageEngine(Engine):
    """A tower on a device of its own arena: it keeps nothing from one image to the next."""

    model: Tower

    def __init__(
        self, model: Tower, checkpoint: Checkpoint, backend: Backend, **options: Any
    ) -> None:
        """See Engine for the options."""
        none = PoolDefault(fixed=0)
        super().__init__(model, checkpoint, backend, pool_default=none, **options)

    @in_turn
    def see(self, patches: Patches) -> NDArray[np.float32]:
        """Embeddings of an image of at most the largest bucket's patches: [tokens, columns]."""
        n, lane = len(patches.values), self.arena.lane(0)
        tokens = n // self.model.config.merge**2
        for name, rows in (("cursor", n), ("token_cursor", tokens)):
            words = np.zeros(CURSOR_WORDS, np.int32)
            words[CursorWord.ROWS] = rows
            self.arena.write(lane.slot(name), words)
        for name in ("values", "places", "rows", "weights"):
            array = np.ascontiguousarray(getattr(patches, name)).view(np.uint8).reshape(-1)
            self.backend.write(self.arena.memory.address + lane.slot(name).offset, array)
        bucket = next(b for b in self.model.buckets if b >= n)
        self.replay(SEE, bucket, (Run(0, n),))
        found = np.empty((tokens, self.model.config.out), np.float32)
        address = self.arena.memory.address + lane.slot("embeddings").offset
        self.backend.read(address, found.view(np.uint8).reshape(-1))
        return found
