"""Several processes, each with its own documents, one model.

IS: one exchange per step. IS NOT: a launcher: torchrun starts the processes.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor


def share_gradients(parameters: list[Tensor], counts: Tensor, world: int) -> None:
    """Mean gradients and summed counts over all processes; every process gets the same."""
    flat = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        + [counts.to(parameters[0])]
    )
    torch.distributed.all_reduce(flat)
    at = 0
    for p in parameters:
        p.grad = flat[at : at + p.numel()].view_as(p) / world
        at += p.numel()
    counts.copy_(flat[at:])
