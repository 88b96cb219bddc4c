"""Promise: the CPU's sums are those of the stated order, chain by chain, down to the last bit.

The order is restated here in scalar steps with libm's fmaf; kernels tile, block and prefetch as
they like.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashrt.backends.cpu.device import CpuDevice
from tests.backend.cases import cursor, randn, weights
from tests.backend.runner import Case, Runner, rng_for

CHAIN, SLICE = 64, 256


@pytest.fixture(scope="module")
def cpu() -> Iterator[Runner]:
    device = CpuDevice(threads=2)
    yield Runner(device)
    device.close()


def _fmaf() -> ctypes._NamedFuncPointer:
    library = ctypes.util.find_library("m")
    if library is None:
        pytest.skip("no libm to take fmaf from")
    function = ctypes.CDLL(library).fmaf
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    return function


def chain(a: Sequence[float], b: Sequence[float]) -> np.float32:
    """fma over ascending index, from +0."""
    fma, total = _fmaf(), 0.0
    for x, y in zip(a, b, strict=True):
        total = fma(x, y, total)
    return np.float32(total)


def in_order(partials: Iterable[np.float32]) -> np.float32:
    """((p0 + p1) + p2) + ..., each sum rounded."""
    return functools.reduce(lambda total, partial: np.float32(total + partial), partials)


@pytest.mark.parametrize("K", [1, 64, 96, 256, 257, 1030])
def test_linear_adds_chains_of_64_in_slices_of_256(cpu: Runner, K: int) -> None:
    T, n, N = 16, 13, 45
    rng = rng_for("cpu exact", K)
    x, w = randn(rng, T, K), weights(rng, N, K)
    y = cpu.run(Case("linear", {"x": x, "w": w, "cursor": cursor(5, n), "y": (T, N)}))["y"]
    for t, col in [(0, 0), (n - 1, N - 1), (6, 15), (7, 16), (12, 32)]:
        slices = [
            in_order(
                chain(w[col, c : c + CHAIN].tolist(), x[t, c : c + CHAIN].tolist())
                for c in range(k, min(k + SLICE, K), CHAIN)
            )
            for k in range(0, K, SLICE)
        ]
        total = in_order(slices)
        assert y[t, col].view(np.uint32) == total.view(np.uint32), (t, col)


@pytest.mark.parametrize("dk,dv", [(16, 16), (33, 41)])
def test_delta_rule_follows_its_chains(cpu: Runner, dk: int, dv: int) -> None:
    T, heads, fma = 3, 2, _fmaf()
    rng = rng_for("cpu exact", dk, dv)
    y = randn(rng, T, heads * (2 * dk + dv), scale=0.3)
    decay, beta = (rng.uniform(0.2, 1, (T, heads)).astype(np.float32) for _ in range(2))
    state = randn(rng, heads, dk, dv)
    operands: dict[str, NDArray[Any] | tuple[int, ...]] = {
        "y": y, "decay": decay, "beta": beta, "state": state, "cursor": cursor(0, T),
        "o": (T, heads * dv),
    }  # fmt: skip
    after = cpu.run(Case("delta_rule", operands, {"key_heads": heads}))
    for head, col in [(0, 0), (1, dv - 1)]:
        column = state[head, :, col].tolist()
        for t in range(T):
            q = y[t, head * dk :][:dk].tolist()
            k = y[t, (heads + head) * dk :][:dk].tolist()
            v = float(y[t, 2 * heads * dk + head * dv + col])
            kv = float(chain(k, column))
            rest = np.float32(fma(-float(decay[t, head]), kv, v))
            delta = float(np.float32(beta[t, head] * rest))
            column = [
                fma(ki, delta, float(np.float32(decay[t, head] * np.float32(si))))
                for ki, si in zip(k, column, strict=True)
            ]
            o = after["o"][t, head * dv + col]
            assert o.view(np.uint32) == chain(q, column).view(np.uint32), (t, head, col)
        assert after["state"][head, :, col].tolist() == column
