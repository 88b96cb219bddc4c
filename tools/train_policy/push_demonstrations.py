"""Demonstrations of `flashrt.worlds.pusht`: disturbed episodes, labelled by the undisturbed expert.

IS: episodes by the expert with noise on what it does (DART), or by a policy (DAgger); of each tick
the picture, the pusher, the instruction, and a chunk of actions: what the expert would do from
there, undisturbed, by a simulation of its own. Also the eight symmetries of the table. IS NOT the
expert (push_expert) or a learner (train_pusht).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from push_expert import DONE, act

from flashrt.worlds import pusht
from flashrt.worlds.pusht import Array

SEEN = 48  # pixels of the side of a picture as the policy's encoder gets it
TICKS = 50  # of an episode; another place follows when the T is at one
CHANGE = 0.03  # chance per tick that another place is named before that
NOISES = (0.0, 20.0, 40.0)  # px, of an episode's actions
STRAY = 0.03  # chance per tick that the pusher goes anywhere for STRAY_TICKS
STRAY_TICKS = 4
Acting = Callable[[Array, int], Array]  # state, tick of the episode -> action [2]


@dataclass(slots=True)
class Frames:
    """Of N ticks."""

    image: NDArray[np.uint8]  # [N, SEEN, SEEN, 3]
    state: NDArray[np.float32]  # [N, 4]
    place: NDArray[np.int64]  # [N], indexes pusht.NAMES
    chunk: NDArray[np.float32]  # [N, H, 2]
    block: NDArray[np.float32]  # [N, 4]: centre of the T, and where its stem points

    def __add__(self, other: Frames) -> Frames:
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Frames(*(np.concatenate(pair) for pair in both))

    def save(self, path: Path) -> None:
        """As npz, in one move."""
        new = path.with_suffix(".new.npz")
        np.savez(new, **{f.name: getattr(self, f.name) for f in fields(self)})
        new.replace(path)

    @classmethod
    def load(cls, path: Path) -> Frames:
        """What `save` wrote."""
        with np.load(path) as held:
            return cls(**{f.name: held[f.name] for f in fields(cls)})


def chunk_from(state: Array, length: int) -> Array:
    """The expert's actions from a state, undisturbed, [length, 2]."""
    actions: list[Array] = []

    def acting(at: Array) -> Array:
        actions.append(np.clip(act(at), 0.0, pusht.SIZE))
        return actions[-1]

    pusht.foresee(state, acting, length)
    return np.array(actions)


def seen(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture at the encoder's size: LeRobot halves it by bilinear weights, a mean of four."""
    side = image.shape[0] // SEEN
    parts = image.reshape(SEEN, side, SEEN, side, 3).mean((1, 3))
    return np.rint(parts).astype(np.uint8)


def demonstrate(
    rng: np.random.Generator, episodes: int, length: int, acting: Acting | None = None
) -> Frames:
    """Frames of `episodes`, with chunks of `length`; without `acting` the disturbed expert acts."""
    rows: list[tuple[object, ...]] = []
    for _ in range(episodes):
        state, noise, stray = pusht.initial_state(rng), rng.choice(NOISES), 0
        state[pusht.TICK] = 0
        for tick in range(TICKS):
            if pusht.distance(state) < DONE or rng.random() < CHANGE:
                state = state.copy()
                state[pusht.PLACE] = rng.integers(len(pusht.NAMES))
            chunk = chunk_from(state, length)
            rows.append(
                (
                    seen(pusht.picture(state)),
                    state[[pusht.X, pusht.Y, pusht.VX, pusht.VY]],
                    state[pusht.PLACE],
                    chunk,
                    [*state[[pusht.T_X, pusht.T_Y]], *_stem(state[pusht.T_ANGLE])],
                )
            )
            if stray == 0 and rng.random() < STRAY:
                stray, goal = STRAY_TICKS, rng.uniform(20.0, pusht.SIZE - 20.0, 2)
            if stray:
                stray, action = stray - 1, goal
            elif acting is not None:
                action = acting(state, tick)
            else:
                action = chunk[0] + rng.normal(0.0, 1.0, 2) * noise
            state = pusht.advance(state, action)
    kinds = (np.uint8, np.float32, np.int64, np.float32, np.float32)
    return Frames(
        *(
            np.array(column, kind)
            for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)
        )
    )


def _stem(angle: float) -> tuple[float, float]:
    return -float(np.sin(angle)), float(np.cos(angle))


def turned(frames: Frames, symmetry: int) -> Frames:
    """The same ticks seen in one of the table's eight symmetries: bit 0 flips x, bit 1 flips y, bit
    2 then exchanges x and y. The T is its own mirror image.
    """
    image, place = frames.image, frames.place
    state, chunk, block = frames.state.copy(), frames.chunk.copy(), frames.block.copy()
    side = pusht.SIZE - 1.0  # the walls are at 5 and 506
    for axis in (0, 1):
        if symmetry >> axis & 1:
            image = np.flip(image, 2 - axis)
            state[:, axis], chunk[..., axis] = side - state[:, axis], side - chunk[..., axis]
            state[:, 2 + axis] *= -1
            block[:, axis] = side - block[:, axis]
            block[:, 2 + axis] *= -1
            first = 2 * axis  # left and right, or up and down
            place = np.where(place // 2 == axis, 2 * axis + 1 - (place - first), place)
    if symmetry & 4:
        image, chunk, state = image.swapaxes(1, 2), chunk[..., ::-1], state[:, [1, 0, 3, 2]]
        block = block[:, [1, 0, 3, 2]]
        place = (place + 2) % 4
    return Frames(np.ascontiguousarray(image), state, place, np.ascontiguousarray(chunk), block)
