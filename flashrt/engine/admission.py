"""Admission: whether bytes that were read are a state that kernels can be let loose on.

IS: the checks that checksums cannot make, for who forged or mistook a whole file: the cursor that
kernels index with, token ids, numbers that must be finite. IS NOT: formats (capsule.file, the
store's manifest).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from flashrt.base.errors import CapsuleError
from flashrt.core.backend import Bytes
from flashrt.models.actions import ActionConfig
from flashrt.models.sight import FIRST_WORD
from flashrt.ops.cursor import NO_OBSERVATION, CursorWord, PolicyCursor, read_cursor

_MAX_TICK = 1 << 30


def check_state(
    where: str,
    cursor: Bytes,
    tokens: NDArray[np.int32],
    position: int,
    vocab_size: int,
    delta: Bytes | None = None,
) -> None:
    """Raises CapsuleError unless the cursor stands at `position` and all tokens exist; `delta`: of
    a model that sees, whose tokens may be words of images: see models.sight.
    """
    words = np.ascontiguousarray(cursor).view(np.int32)
    if int(words[CursorWord.POSITION]) != position:
        raise CapsuleError(
            f"{where}: its cursor is at {words[CursorWord.POSITION]}, its position is {position}"
        )
    if len(tokens) != position:
        raise CapsuleError(f"{where}: {len(tokens)} tokens for position {position}")
    seen = np.append(tokens, max(int(words[CursorWord.TOKEN]), 0))
    if delta is not None:
        moved = int(np.ascontiguousarray(delta).view(np.int32)[0])
        if not -position <= moved <= 0:
            raise CapsuleError(f"{where}: places {-moved} before position {position}")
        seen[:-1] = np.where(tokens >= FIRST_WORD, 0, tokens)
    if seen.min() < 0 or seen.max() >= vocab_size:
        raise CapsuleError(f"{where}: a token is not in [0, {vocab_size})")


def check_action_state(
    where: str, tensors: Mapping[str, Bytes], config: ActionConfig, finite: Collection[str]
) -> None:
    """Raises CapsuleError unless a control loop can have left this state, `finite` the regions that
    it leaves finite.
    """
    words = np.ascontiguousarray(tensors["fixed/cursor"]).view(np.int32)
    if wrong := what_is_wrong(read_cursor(words.tolist()), config):
        raise CapsuleError(f"{where}: no loop leaves a cursor with {wrong}")
    for name in finite:
        numbers = np.ascontiguousarray(tensors[f"fixed/{name}"]).view(np.float32)
        if not np.isfinite(numbers).all():
            raise CapsuleError(f"{where}: {name} is not finite")


def what_is_wrong(cursor: PolicyCursor, config: ActionConfig) -> str | None:
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
