"""The fused C kernels as autograd functions, float32 on a CPU.

IS: compiling fused.c on first use, and calling it. IS NOT: needed: without a compiler, or on
another device, model uses torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SOURCE = Path(__file__).parent / "fused.c"
FLAGS = (
    "-O3",
    "-march=native",
    "-ffast-math",
    "-mprefer-vector-width=512",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
SIZES = {(32, 32), (64, 64)}  # (dk, dv) that fused.c has
STATE_EVERY = 32  # tokens between saved states, as in fused.c


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None without a compiler. Cached by the hash of the source."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"train-tiny-{key}.so"
    if not target.exists():
        building = target.with_suffix(f".{torch.initial_seed() % 10**6}.{id(target)}")
        command = ["gcc", *FLAGS, str(SOURCE), "-o", str(building), "-lm"]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        building.rename(target)  # whole or not at all: processes start together
    return ctypes.CDLL(str(target))


def fits(x: Tensor, dk: int, dv: int) -> bool:
    """Whether the kernels can take this layer."""
    return x.device.type == "cpu" and (dk, dv) in SIZES and library() is not None


def call(name: str, tensors: tuple[Tensor, ...], *sizes: int) -> None:
    """Call a kernel: pointers, sizes as long, number of threads."""
    loaded = library()
    assert loaded is not None, "checked by `fits`"
    for t in tensors:
        assert t.is_contiguous() and t.dtype == torch.float32, (name, t.dtype)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    numbers = [ctypes.c_long(n) for n in (*sizes, torch.get_num_threads())]
    getattr(loaded, name)(*pointers, *numbers)


class ConvSilu(torch.autograd.Function):
    """u [B, T, C], taps [4, C] -> silu of the causal convolution."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, taps: Tensor) -> Tensor:
        u, taps = u.contiguous(), taps.contiguous()
        y = torch.empty_like(u)
        call("conv_silu", (u, taps, y), *u.shape)
        ctx.save_for_backward(u, taps)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        u, taps = ctx.saved_tensors
        du, dtaps = torch.empty_like(u), u.new_empty(u.shape[0], 4, u.shape[2])
        call("conv_silu_backward", (u, taps, dy.contiguous(), du, dtaps), *u.shape)
        return du, dtaps.sum(0)


class Delta(torch.autograd.Function):
    """qkv [B, T, H (2 dk + dv)] (not normalised), g, beta [B, T, H] -> o [B, T, H, dv]."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, g: Tensor, beta: Tensor, dk: int, dv: int) -> Tensor:
        qkv, g, beta = qkv.contiguous(), g.contiguous(), beta.contiguous()
        batch, length, heads = g.shape
        o = qkv.new_empty(batch, length, heads, dv)
        states = qkv.new_empty(batch, heads, -(-length // STATE_EVERY), dk, dv)
        call(f"delta_{dk}_{dv}", (qkv, g, beta, o, states), *g.shape)
        ctx.save_for_backward(qkv, g, beta, states)
        ctx.sizes = dk, dv
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, g, beta, states = ctx.saved_tensors
        dqkv, dg, dbeta = torch.empty_like(qkv), torch.empty_like(g), torch.empty_like(beta)
        dk, dv = ctx.sizes
        call(
            f"delta_backward_{dk}_{dv}",
            (qkv, g, beta, states, do.contiguous(), dqkv, dg, dbeta),
            *g.shape,
        )
        return dqkv, dg, dbeta, None, None


class SwiGLU(torch.autograd.Function):
    """silu(a) * b, element by element."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        o = torch.empty_like(a)
        call("swiglu", (a, b, o), a.numel())
        ctx.save_for_backward(a, b)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        da, db = torch.empty_like(a), torch.empty_like(b)
        call("swiglu_backward", (a, b, do.contiguous(), da, db), a.numel())
        return da, db


def gated(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, fused where possible."""
    if a.device.type == "cpu" and library() is not None:
        return SwiGLU.apply(a, b)
    return functional.silu(a) * b
