"""Capsules of robot policies in files: `capsule.save(path)` writes one, this reads it.

IS: the checks that a checksum cannot make, for who forged or mistook a whole file: a cursor that
kernels go by, numbers that are finite. IS NOT: the format (core.blob). Called by: users.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError
from flashrt.capsule import file as blob
from flashrt.capsule.capsule import Capsule
from flashrt.core.backend import Bytes
from flashrt.engine.actions import PolicyEngine
from flashrt.models.flow_policy.config import PolicyConfig
from flashrt.ops.cursor import NO_OBSERVATION, PolicyCursor, read_cursor

_MAX_TICK = 1 << 30


def load_capsule(engine: PolicyEngine, path: str | os.PathLike[str]) -> Capsule:
    """A capsule from a file that `Capsule.save` wrote, into the engine's pool.

    Raises CapsuleError when the file is another policy's, truncated or damaged, or holds what no
    loop can have left; PoolFull without room. Nothing is changed then.
    """

    def admit(
        header: blob.BlobHeader, tensors: Mapping[str, Bytes], tokens: NDArray[np.int32]
    ) -> None:
        words = np.ascontiguousarray(tensors["fixed/cursor"]).view(np.int32)
        if wrong := what_is_wrong(read_cursor(words.tolist()), engine.config):
            raise CapsuleError(f"{header.path}: no loop leaves a cursor with {wrong}")
        for name in ("memory", "encoded", "previous", "action", "queue"):
            numbers = np.ascontiguousarray(tensors[f"fixed/{name}"]).view(np.float32)
            if not np.isfinite(numbers).all():
                raise CapsuleError(f"{header.path}: {name} is not finite")

    return blob.load(engine.capsules, path, admit)


def what_is_wrong(cursor: PolicyCursor, config: PolicyConfig) -> str | None:
    """The first relation between words that does not hold; None when all do."""
    c, rows = cursor, config.chunk_size
    relations = {
        f"tick {c.tick}": 0 <= c.tick < _MAX_TICK,
        f"an observation of tick {c.observed}": NO_OBSERVATION <= c.observed <= c.tick,
        f"a chunk from tick {c.chunk} at tick {c.tick}": 0 <= c.chunk <= c.tick,
        f"actions for ticks [{c.chunk}, {c.stop})": 0 <= c.stop <= c.chunk + rows,
        f"{c.plan_steps_left} steps left": 0 <= c.plan_steps_left <= config.num_inference_steps,
        f"{c.held} ticks held": 0 <= c.held <= c.tick,
    }
    if c.plan_steps_left:
        relations |= {
            f"a plan from tick {c.plan_tick}": 0 <= c.plan_tick <= c.tick,
            f"a plan up to {c.plan_stop}": 0 <= c.plan_stop - c.plan_tick <= rows,
        }
    return next((said for said, holds in relations.items() if not holds), None)
