"""Elementary functions in kernels: accurate to a few ulp, the same bits in every column."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.backend.cases import cursor, randn
from tests.backend.runner import Case, Runner, rng_for

ULP = 2.0**-23


# Ulps are promised for float32 kernels; these tests are about scalar tails.
pytestmark = pytest.mark.only_on("cpu")


def silu(runner: Runner, x: NDArray[np.float32], I: int) -> NDArray[np.float32]:  # noqa: E741
    """silu of all x, in rows of I columns."""
    gate = np.resize(x, (-(-len(x) // I), I))
    u = np.concatenate([gate, np.ones_like(gate)], axis=1)
    operands = {"u": u, "cursor": cursor(0, len(u)), "y": gate.shape}
    return runner.run(Case("silu_mul", operands))["y"].reshape(-1)[: len(x)]


def gates(runner: Runner, x: NDArray[np.float32], Hv: int) -> dict[str, NDArray[Any]]:
    """decay = exp(-softplus(x)) and beta = sigmoid(x) of all x, in rows of Hv heads."""
    a = np.resize(x, (-(-len(x) // Hv), Hv))
    zeros = np.zeros(Hv, np.float32)
    operands = {
        "y": np.ones((len(a), 2 + Hv), np.float32), "a": a, "b": a, "a_log": zeros,
        "dt_bias": zeros, "cursor": cursor(0, len(a)), "decay": a.shape, "beta": a.shape,
    }  # fmt: skip
    after = runner.run(Case("delta_gates", operands, {"key_heads": 1, "key_dim": 1}))
    return {name: after[name].reshape(-1)[: len(x)] for name in ("decay", "beta")}


def sweep() -> NDArray[np.float32]:
    """Dense around 0 and around 20, where softplus changes its formula."""
    rng = rng_for("sweep")
    near = [rng.normal(c, w, 4000) for c, w in ((0, 1e-3), (0, 3), (20, 1e-3), (0, 30))]
    edges = [0.0, -0.0, 20.0, np.nextafter(np.float32(20), np.float32(30)), -80.0, 80.0]
    return np.clip(np.concatenate([*near, edges]), -80, 80).astype(np.float32)


def test_silu_and_gates_are_accurate(runner: Runner) -> None:
    x = sweep()
    exact = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-exact))
    pairs = {"silu": (silu(runner, x, 64), exact * sigmoid)}
    after = gates(runner, x, 32)
    pairs |= {
        "sigmoid": (after["beta"], sigmoid),
        "decay": (after["decay"], 1 / (1 + np.exp(exact))),
    }
    for name, (got, want) in pairs.items():
        # exp(-s) turns half an ulp of s into s / 2 ulps of the result: 80 is the largest s here
        allowed = np.where(name == "decay", 4 + np.logaddexp(0, exact), 4) * ULP
        error = np.abs(got - want) / np.maximum(np.abs(want), 1e-37)
        assert np.all(error <= allowed), f"{name}: {np.max(error / allowed):.2f} of the bound"


def test_extremes_saturate(runner: Runner) -> None:
    x = np.array([-np.inf, -1e30, -200, 200, 1e30, np.inf], np.float32)
    after = gates(runner, x, 3)
    assert after["beta"].tolist() == [0, 0, 0, 1, 1, 1]
    assert after["decay"].tolist() == [1, 1, 1, 0, 0, 0]
    assert silu(runner, x[1:5], 2).tolist() == [0, 0, 200, np.float32(1e30)]


def test_bits_do_not_depend_on_the_column(runner: Runner) -> None:
    """Vectors and scalar tails agree: the same values in rows of other lengths."""
    x = sweep()
    for width in (1, 3, 17, 31):
        assert silu(runner, x, width).tobytes() == silu(runner, x, 64).tobytes()
        for name, other in gates(runner, x, 64).items():
            assert gates(runner, x, width)[name].tobytes() == other.tobytes(), (
                f"{name}, width {width}"
            )


def test_conv_and_gated_norm_do_not_depend_on_the_column(runner: Runner) -> None:
    T, C, W = 5, 37, 3
    rng = rng_for("columns")
    u, w, window, z = randn(rng, T, C), randn(rng, W + 1, C), randn(rng, W, C), randn(rng, T, C)
    for c in range(0, C, 5):
        one, all_ = (
            runner.run(
                Case(
                    "conv_window",
                    {
                        "u": u[:, s], "w": w[:, s], "window": window[:, s], "cursor": cursor(0, T),
                        "y": u[:, s].shape,
                    },
                )
            )["y"]
            for s in (slice(c, c + 1), slice(0, C))
        )  # fmt: skip
        assert one.tobytes() == all_[:, c : c + 1].tobytes()
    # one head of 37 against the same head among others: its place moves by 37 columns
    many = np.concatenate([u, u, u], axis=1)
    operands = {
        "o": many, "z": np.concatenate([z, z, z], axis=1), "w": w[0], "cursor": cursor(0, T),
        "y": many.shape,
    }  # fmt: skip
    y = runner.run(Case("gated_rmsnorm", operands, {"eps": 1e-6}))["y"].reshape(T, 3, C)
    assert np.array_equal(y[:, 0], y[:, 1]) and np.array_equal(y[:, 0], y[:, 2])
