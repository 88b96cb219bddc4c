"""The policy in torch, for training alone; flashrt computes it by its own kernels.

IS: encoder, GRU memory and a flow-matching head with the tensor names of the checkpoint, its
losses, and a rollout of many episodes at once for DAgger. Formulas: torch.nn.GRUCell; flow matching
in its rectified form (Lipman et al. 2023, x_t = (1 - t) noise + t action, v = action - noise) with
a committed prefix given clean (Black et al. 2025, training-time action conditioning). IS NOT
imported by flashrt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tasks import Shape
from torch import Tensor, nn
from torch.nn import functional

TIME_FREQUENCIES = (1.0, 2.0, 4.0, 8.0)
OBSERVATION_CLIP = 10.0


@dataclass(frozen=True, slots=True)
class Loss:
    """Parts of the training loss, each a scalar."""

    flow: Tensor
    privileged: Tensor

    @property
    def total(self) -> Tensor:
        """What is descended: the memory's own task counts a tenth."""
        return self.flow + 0.1 * self.privileged


class Head(nn.Module):
    """Velocity field of the flow: [B, H, A] at time [B], given a condition [B, F]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        H, A, F = shape.chunk_size, shape.action_dim, shape.head_dim
        self.chunk = (H, A)
        self.condition = nn.Linear(2 * shape.width, F)
        self.time = nn.Linear(2 * len(TIME_FREQUENCIES), F, bias=False)
        self.input = nn.Linear(H * A + H, F, bias=False)
        blocks = [
            nn.ModuleList([nn.Linear(F, F), nn.Linear(F, F)]) for _ in range(shape.head_blocks)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.output = nn.Linear(F, H * A)

    def forward(self, x: Tensor, is_committed: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """d x / d time; `is_committed` [B, H] is 1 where x is given."""
        z = self.input(torch.cat((x.flatten(1), is_committed), dim=1))
        z = functional.silu(z + self.time(time_features(time)) + condition)
        for inner, outer in self.blocks:
            z = z + outer(functional.silu(inner(z)))
        return self.output(z).view(-1, *self.chunk)


class Policy(nn.Module):
    """Encoder, memory, head; statistics of observations are buffers and part of the checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        E = M = shape.width
        self.encoder = nn.ModuleList(
            [nn.Linear(shape.observation_dim + shape.action_dim, E), nn.Linear(E, E)]
        )
        self.memory = nn.GRU(E, M, batch_first=True)
        with torch.no_grad():  # update gates start by keeping: some units remember from the outset
            self.memory.bias_ih_l0[M : 2 * M].uniform_(0.0, 3.0)
        self.head = Head(shape)
        self.probe = nn.Linear(M, shape.privileged_dim)  # training only
        self.register_buffer("mean", torch.zeros(shape.observation_dim))
        self.register_buffer("std", torch.ones(shape.observation_dim))

    def encode(self, observation: Tensor, previous: Tensor) -> Tensor:
        """Features [..., E] of observations [..., O] and previously executed actions [..., A]."""
        seen = torch.clamp(
            (observation - self.mean) / self.std, -OBSERVATION_CLIP, OBSERVATION_CLIP
        )
        e = functional.silu(self.encoder[0](torch.cat((seen, previous), dim=-1)))
        return functional.silu(self.encoder[1](e))

    def loss(
        self, e: Tensor, h: Tensor, target: Tensor, committed: Tensor, privileged: Tensor,
        generator: torch.Generator,
    ) -> Loss:  # fmt: skip
        """Flow matching on chunks [B, H, A] at ticks with features e, h [B, width]."""
        B, H = target.shape[:2]
        is_committed = (torch.arange(H) < committed[:, None]).float()
        noise = torch.randn(target.shape, generator=generator)
        time = torch.rand(B, generator=generator)
        x = torch.lerp(noise, target, torch.maximum(time[:, None], is_committed)[..., None])
        condition = self.head.condition(torch.cat((h, e), dim=1))
        error = self.head(x, is_committed, time, condition) - (target - noise)
        free = (1.0 - is_committed)[..., None]
        flow = (error.square() * free).sum() / (free.sum() * target.shape[2])
        return Loss(flow, functional.mse_loss(self.probe(h), privileged))

    @torch.no_grad()
    def plan(self, e: Tensor, h: Tensor, known: Tensor, committed: int, noise: Tensor) -> Tensor:
        """Integrate the flow by Euler steps: chunks [B, H, A], the first `committed` rows given."""
        steps = self.shape.num_inference_steps
        is_committed = (torch.arange(self.shape.chunk_size) < committed).float()
        given = is_committed[:, None]
        mask = is_committed.expand(len(e), -1)
        condition = self.head.condition(torch.cat((h, e), dim=1))
        x = torch.where(given > 0, known, noise)
        for s in range(steps):
            velocity = self.head(x, mask, torch.full((len(e),), s / steps), condition)
            x = x + velocity / steps * (1.0 - given)
        return x.clamp(-1.0, 1.0)


class Rollout:
    """The control loop over a batch of episodes: a behaviour for `demonstrate`.

    A new chunk is planned every n_action_steps ticks, `overlap` ticks before it takes over.
    `forget_at`: the tick at which the memory is set to zero (an ablation), or None.
    """

    def __init__(
        self, policy: Policy, count: int, seed: int, overlap: int = 0, forget_at: int | None = None
    ) -> None:
        shape = policy.shape
        self._policy, self._overlap, self._forget_at = policy, overlap, forget_at
        self._generator = torch.Generator().manual_seed(seed)
        self._memory = torch.zeros(1, count, shape.width)
        self._previous = torch.zeros(count, shape.action_dim)
        self._tick = self._chunk_tick = 0
        self._stop = 0
        self._chunk = torch.zeros(count, shape.chunk_size, shape.action_dim)

    @torch.no_grad()
    def __call__(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        policy, shape = self._policy, self._policy.shape
        if self._tick == self._forget_at:
            self._memory.zero_()
        e = policy.encode(torch.from_numpy(observation), self._previous)
        h, self._memory = policy.memory(e[:, None], self._memory)
        if self._tick == self._stop - self._overlap or self._tick == 0:
            committed = max(self._stop - self._tick, 0)
            first = self._tick - self._chunk_tick
            known = torch.zeros_like(self._chunk)
            known[:, :committed] = self._chunk[:, first : first + committed]
            noise = torch.randn(known.shape, generator=self._generator)
            self._chunk = policy.plan(e, h[:, 0], known, committed, noise)
            self._chunk_tick = self._tick
            self._stop = self._tick + committed + shape.n_action_steps
        self._previous = self._chunk[:, self._tick - self._chunk_tick]
        self._tick += 1
        return self._previous.numpy()


def time_features(time: Tensor) -> Tensor:
    """[B] -> [B, 8]: sines, then cosines, of 2 pi f t."""
    phase = 2 * math.pi * time[:, None] * torch.tensor(TIME_FREQUENCIES)
    return torch.cat((torch.sin(phase), torch.cos(phase)), dim=1)
