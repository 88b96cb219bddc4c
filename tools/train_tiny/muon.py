"""Muon in float32: momentum, orthogonalised by Newton-Schulz iterations.

IS: for matrices alone. IS NOT: torch.optim.Muon, which computes in bfloat16, slow on a CPU without
bfloat16 units. Formulas: Jordan et al., "Muon", 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # quintic that drives singular values to about 1
UPDATE_SIZE = 0.2  # root mean square of an update, as that of AdamW
EPS = 1e-7


def orthogonalised(x: Tensor, iterations: int) -> Tensor:
    """x [n, rows, cols], rows <= cols -> about U V^T of its singular value decomposition."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + EPS)
    for _ in range(iterations):
        square = x @ x.transpose(1, 2)
        x = A * x + torch.baddbmm(square, square, square, beta=B, alpha=C) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum; matrices of one shape are orthogonalised together."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        iterations: int = 4,
    ) -> None:
        options = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations,
        }  # fmt: skip
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients that are there."""
        del closure
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("m", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(mean, group["momentum"])
                shapes.setdefault(p.shape, []).append((p, ahead))
            for (rows, cols), members in shapes.items():
                tall = rows > cols
                stacked = torch.stack([u.T if tall else u for _, u in members])
                updates = orthogonalised(stacked, group["iterations"])
                size = UPDATE_SIZE * max(rows, cols) ** 0.5
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.T if tall else update, alpha=-group["lr"] * size)
