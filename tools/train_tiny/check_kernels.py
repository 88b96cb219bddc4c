"""Compare the fused kernels with torch, gradients too: python check_kernels.py

IS: a test of fused.c, run by hand after a change. IS NOT: part of the suite, which has no torch.
"""

from __future__ import annotations

import fused
import torch
from model import Model, config
from torch import Tensor

LIMIT = 2e-4  # of the difference, relative to the largest gradient of a tensor


def gradients(model: Model, ids: Tensor, resets: Tensor) -> dict[str, Tensor]:
    """Hidden states and gradients of a loss that every layer reaches."""
    model.zero_grad()
    hidden = model(ids, resets)
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"hidden": hidden.detach()}


def main() -> None:
    """Exit with an error if they differ."""
    torch.manual_seed(0)
    model, ids = Model(config("LFL")), torch.randint(700, (3, 75))
    resets = torch.rand(ids.shape) < 0.05
    if fused.library() is None:
        raise SystemExit("no compiler: nothing to compare")
    with_kernels = gradients(model, ids, resets)
    sizes, fused.SIZES = fused.SIZES, set()
    with_torch = gradients(model, ids, resets)
    fused.SIZES = sizes
    worst = {
        name: float((with_kernels[name] - expected).abs().max() / expected.abs().max())
        for name, expected in with_torch.items()
    }
    name = max(worst, key=lambda n: worst[n])
    print(f"{len(worst)} tensors; largest relative difference {worst[name]:.1e} in {name}")
    if worst[name] > LIMIT:
        raise SystemExit("the kernels differ from torch")


if __name__ == "__main__":
    main()
