"""The chunked gated delta rule as batched matrix products: for devices without the fused kernel.

IS: the same function as `fused.Delta`, differentiable by torch. IS NOT: fast on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 32


class UnitLowerInverse(torch.autograd.Function):
    """(I + L)^-1 of strictly lower triangular L [..., C, C], by doubling.

    L^C = 0, so (I + L)^-1 = (I - L)(I + L^2)(I + L^4)...: log2(C) products instead of a solve.
    """

    @staticmethod
    def forward(ctx: Any, low: Tensor) -> Tensor:
        size = low.shape[-1]
        power = -low
        inverse = torch.eye(size, device=low.device, dtype=low.dtype) - low
        reach = 2
        while reach < size:
            power = power @ power
            inverse = inverse + inverse @ power
            reach *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        transposed = ctx.saved_tensors[0].transpose(-1, -2)
        return -(transposed @ grad @ transposed)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k [B, H, T, dk] (normalised), v [B, H, T, dv], g (log decay), beta [B, H, T] ->
    o [B, H, T, dv], from a state of zeros:

        S_t = exp(g_t) S_(t-1) + k_t (beta_t (v_t - exp(g_t) S_(t-1)^T k_t))^T,   o_t = S_t^T q_t
    """
    batch, heads, length, dk = q.shape
    dv, pad = v.shape[-1], -length % CHUNK
    q, k, v = (functional.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    g, beta = functional.pad(g, (0, pad)), functional.pad(beta, (0, pad))
    n = (length + pad) // CHUNK
    q, k, v = (x.reshape(batch * heads, n, CHUNK, -1) for x in (q, k, v))
    g, beta = (x.reshape(batch * heads, n, CHUNK) for x in (g, beta))
    total = g.cumsum(-1)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    between = total[..., :, None] - total[..., None, :]
    decay = between.masked_fill(~causal, float("-inf")).exp()
    transposed, from_start = k.transpose(-1, -2), total.exp()[..., None]
    written = k * beta[..., None]
    inverse = UnitLowerInverse.apply(((written @ transposed) * decay).tril(-1))
    fresh = inverse @ (v * beta[..., None])  # what each token writes, were the chunk the first
    erased = inverse @ (written * from_start)  # what it takes from the state before the chunk
    inside = (q @ transposed) * decay
    to_end = (k * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2)
    kept = total[..., -1].exp()[..., None, None]
    state = q.new_zeros(batch * heads, dk, dv)
    writes, states = [], []
    for i in range(n):  # the only sequential part: two small products per chunk
        new = torch.baddbmm(fresh[:, i], erased[:, i], state, alpha=-1)
        writes.append(new)
        states.append(state)
        state = torch.baddbmm(state * kept[:, i], to_end[:, i], new)
    o = inside @ torch.stack(writes, 1) + (q * from_start) @ torch.stack(states, 1)
    return o.reshape(batch, heads, n * CHUNK, dv)[:, :, :length]
