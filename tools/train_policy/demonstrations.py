"""Demonstrations: what an expert would do from wherever somebody else ends up.

IS: batches of episodes in which either the disturbed expert or the policy acts, and at each tick
the chunk that the expert would go on with, found by branching the state (so the labels are exact
on and off the expert's own path). IS NOT training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tasks import Array, Task

Floats = NDArray[np.float32]
# (observation [E, O]) -> normalised action [E, A]
Behaviour = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """E episodes of T ticks; actions are normalised to [-1, 1]."""

    observation: Floats  # [E, T, O]
    executed: Floats  # [E, T, A] what was done at the tick
    chunk: Floats  # [E, T, H, A] what the expert would do from the tick on
    privileged: Floats  # [E, T, P]

    def __add__(self, other: Demonstrations) -> Demonstrations:
        joined = (
            np.concatenate((getattr(self, f.name), getattr(other, f.name))) for f in fields(self)
        )
        return Demonstrations(*joined)

    def save(self, path: Path) -> None:
        """Write an .npz file; `load` reads it."""
        np.savez(path, **{f.name: getattr(self, f.name) for f in fields(self)})

    @staticmethod
    def load(path: Path) -> Demonstrations:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return Demonstrations(*(arrays[f.name] for f in fields(Demonstrations)))


def normalise(task: Task, action: Array) -> Array:
    """From the environment's units to [-1, 1]."""
    low, high = np.array(task.shape.low), np.array(task.shape.high)
    return np.clip((action - (high + low) / 2) / ((high - low) / 2), -1.0, 1.0)


def denormalise(task: Task, action: Array) -> Array:
    """From [-1, 1] to the environment's units."""
    low, high = np.array(task.shape.low), np.array(task.shape.high)
    return np.clip(action, -1.0, 1.0) * (high - low) / 2 + (high + low) / 2


def demonstrate(
    task: Task, rng: np.random.Generator, count: int, behaviour: Behaviour | None
) -> Demonstrations:
    """`count` episodes driven by `behaviour`, or by the expert with noise in its actions.

    The noise (DART: Laskey et al. 2017) is correlated over ticks and differs in strength from
    episode to episode, so that recoveries are seen; the labels stay clean. Longer than an episode
    by a chunk, so that each tick has a full one.
    """
    state = task.initial(rng, count)
    intent = task.intend(rng, state)
    noise = np.zeros((count, task.shape.action_dim))
    strength = rng.uniform(0.0, 0.5, (count, 1)) * (rng.random((count, 1)) < 0.75)
    seen, done, chunks, hidden = [], [], [], []
    for _ in range(task.shape.ticks + task.shape.chunk_size):
        state = task.disturb(rng, state)
        observation = task.observe(state)
        if behaviour is None:
            noise = 0.8 * noise + 0.6 * rng.standard_normal(noise.shape)
            action = normalise(task, task.expert(state, intent)) + strength * noise
        else:
            action = behaviour(observation).astype(np.float64)
        action = np.clip(action, -1.0, 1.0)
        chunks.append(_branch(task, rng, state))
        seen.append(observation)
        done.append(action)
        hidden.append(task.privileged(state))
        state = task.advance(state, denormalise(task, action))
    stacked = (np.stack(each, axis=1).astype(np.float32) for each in (seen, done, chunks, hidden))
    return Demonstrations(*stacked)


def _branch(task: Task, rng: np.random.Generator, state: Array) -> Array:
    """The expert's next chunk from each state, [E, H, A]; the states stay as they are."""
    intent, actions = task.intend(rng, state), []
    for _ in range(task.shape.chunk_size):
        action = task.expert(state, intent)
        actions.append(normalise(task, action))
        state = task.advance(state, action)
    return np.stack(actions, axis=1)


def labels(
    executed: Floats, chunk: Floats, tick: NDArray[np.int64], committed: NDArray[np.int64]
) -> Floats:
    """Target chunks [B, K, H, A] for ticks and prefix lengths [B, K].

    The first `committed` actions are those that were executed; then the expert takes over from
    the state they led to.
    """
    rows = np.arange(executed.shape[0])[:, None, None]
    H = chunk.shape[2]
    position = np.arange(H)
    is_prefix = position < committed[:, :, None]
    past = executed[rows, np.minimum(tick[:, :, None] + position, executed.shape[1] - 1)]
    after = np.maximum(position - committed[:, :, None], 0)
    future = chunk[rows, (tick + committed)[:, :, None], after]
    return np.where(is_prefix[..., None], past, future)
