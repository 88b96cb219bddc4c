"""Kernels, alone and chained, against recorded values of another implementation (golden/)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from flashrt.core.region import DType
from flashrt.ops.table import ATTENTION_BLOCK
from tests.backend.cases import cursor
from tests.backend.runner import Case, Runner
from tests.tolerances import SUBLAYER_ABSOLUTE, SUBLAYER_RELATIVE

GOLDEN = Path(__file__).parents[1] / "golden"
EPS = 1e-6
ROPE: dict[str, Any] = {"eps": EPS, "shift": 0, "gated": 1, "normed": 1, "magnitude": 1.0}
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Golden:
    """One set: sizes, layer weights in float32, recorded values."""

    config: Mapping[str, Any]
    layers: Mapping[str, int]
    weights: Mapping[str, F32]
    values: Mapping[str, F32]

    def weight(self, kind: str, name: str) -> F32:
        """A weight of the layer of a kind that the values were recorded with."""
        tail = f"layers.{self.layers[kind]}.{name}"
        return next(w for n, w in self.weights.items() if n.endswith(tail) and "mtp" not in n)

    def __getitem__(self, name: str) -> F32:
        return self.values[f"sub.{name}"]


@cache
def golden(name: str) -> Golden:
    folder = GOLDEN / name
    config = json.loads((folder / "config.json").read_text())
    layers = json.loads((folder / "expected.json").read_text())["sub"]
    weights = {n: w.astype(np.float32) for n, w in load_file(folder / "model.safetensors").items()}
    values = load_file(folder / "expected.safetensors")
    return Golden(config.get("text_config", config), layers, weights, values)


@pytest.fixture(params=["tiny", "tiny-untied-odd"])
def model(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def launch(
    runner: Runner, op: str, n: int, operands: Mapping[str, Any], **attrs: float
) -> dict[str, NDArray[Any]]:
    """The operands after one launch of n rows from position 0."""
    arrays = {
        k: np.ascontiguousarray(v) if isinstance(v, np.ndarray) else v for k, v in operands.items()
    }
    return runner.run(Case(op, arrays | {"cursor": cursor(0, n)}, attrs))


def linear(runner: Runner, x: F32, w: F32) -> F32:
    return launch(runner, "linear", len(x), {"x": x, "w": w, "y": (len(x), len(w))})["y"]


def assert_near(runner: Runner, got: NDArray[Any], want: F32) -> None:
    """Element by element, or where activations are bfloat16 by the rms of the difference."""
    difference = got - want.reshape(got.shape)
    if runner.backend.acts.narrow is DType.BF16:
        assert np.mean(difference**2) <= SUBLAYER_RELATIVE**2 * np.mean(want**2)
    else:
        assert np.max(np.abs(difference)) <= SUBLAYER_ABSOLUTE


def test_rmsnorm(runner: Runner, model: Golden) -> None:
    x, w = model["in"], model.weight("mlp_and_rmsnorm_layer", "input_layernorm.weight")
    operands = {"x": x, "w": 1 + w, "y": x.shape}
    assert_near(
        runner, launch(runner, "rmsnorm", len(x), operands, eps=EPS)["y"], model["rmsnorm.out"]
    )


def test_gated_rmsnorm(runner: Runner, model: Golden) -> None:
    x, w = model["gated_rmsnorm.in"], model.weight("linear_layer", "linear_attn.norm.weight")
    operands = {"o": x, "z": model["gated_rmsnorm.gate"], "w": w, "y": x.shape}
    after = launch(runner, "gated_rmsnorm", len(x), operands, eps=EPS)
    assert_near(runner, after["y"], model["gated_rmsnorm.out"])


def test_conv_window(runner: Runner, model: Golden) -> None:
    u, w = model["conv1d.in"].T, model.weight("linear_layer", "linear_attn.conv1d.weight")[:, 0].T
    window = np.zeros((len(w) - 1, u.shape[1]), np.float32)
    after = launch(runner, "conv_window", len(u), {"u": u, "w": w, "window": window, "y": u.shape})
    assert_near(runner, after["y"], model["conv1d.out"].T)
    assert np.array_equal(after["window"], u[len(u) - len(window) :])


def test_delta_rule(runner: Runner, model: Golden) -> None:
    q, k, v = (model[f"delta.{name}"] for name in "qkv")
    (T, Hk, dk), (_, Hv, dv) = q.shape, v.shape
    y = np.concatenate([x.reshape(T, -1) for x in (q, k, v)], axis=1)
    zeros, per_head = np.zeros((T, Hv), np.float32), np.zeros(Hv, np.float32)
    gates = {
        "y": y, "a": zeros, "b": zeros, "a_log": per_head, "dt_bias": per_head,
        "decay": (T, Hv), "beta": (T, Hv),
    }  # fmt: skip
    y = launch(runner, "delta_gates", T, gates, key_heads=Hk, key_dim=dk)["y"]
    operands = {
        "y": y, "decay": np.exp(model["delta.g"]), "beta": model["delta.beta"],
        "state": model["delta.state_in"], "o": (T, Hv * dv),
    }  # fmt: skip
    after = launch(runner, "delta_rule", T, operands, key_heads=Hk)
    assert_near(runner, after["o"], model["delta.out"])
    assert_near(runner, after["state"], model["delta.state_out"])


def test_rope(runner: Runner, model: Golden) -> None:
    """The op norms before it turns: the norm is undone before results are compared."""
    x = model["rope.in"].swapaxes(0, 1)  # [T, Nq, D]
    T, Nq, _ = x.shape
    scale = np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + EPS)
    operands = rope_operands(model, queries_only(x), Nq, 1)
    after = launch(runner, "rope_append", T, operands, **ROPE)
    assert_near(runner, after["q"] * scale, model["rope.out"].swapaxes(0, 1))


def queries_only(x: F32) -> F32:
    """Rows [per head: query, gate | k | v] with zeros but for the queries."""
    T, _, D = x.shape
    q = np.concatenate([x, np.zeros_like(x)], axis=-1).reshape(T, -1)
    return np.concatenate([q, np.zeros((T, 2 * D), np.float32)], axis=1)


def rope_operands(model: Golden, u: F32, Nq: int, Nk: int, **norms: F32) -> dict[str, Any]:
    D, parameters = model.config["head_dim"], model.config["rope_parameters"]
    R = int(D * parameters["partial_rotary_factor"])
    inv_freq = parameters["rope_theta"] ** (-np.arange(0, R, 2) / R)
    ones = np.ones(D, np.float32)
    return {
        "u": u, "q_norm": norms.get("q_norm", ones), "k_norm": norms.get("k_norm", ones),
        "inv_freq": inv_freq.astype(np.float32), "q": (len(u), Nq, D), "keys": (Nk, 128, D),
        "values": (Nk, 128, D), "key_scales": (Nk, 128, 1), "value_scales": (Nk, 128, 1),
    }  # fmt: skip


def test_mlp(runner: Runner, model: Golden) -> None:
    gate, up, down = (
        model.weight("mlp_and_rmsnorm_layer", f"mlp.{n}_proj.weight")
        for n in ("gate", "up", "down")
    )
    u = linear(runner, model["in"], np.concatenate([gate, up]))
    y = launch(runner, "silu_mul", len(u), {"u": u, "y": (len(u), len(gate))})["y"]
    assert_near(runner, linear(runner, y, down), model["mlp.out"])


def test_linear_attention(runner: Runner, model: Golden) -> None:
    c = model.config
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    qkv, z, b, a, out = (
        linear(runner, model["in"], model.weight("linear_layer", f"linear_attn.{n}.weight"))
        if n != "out_proj"
        else model.weight("linear_layer", "linear_attn.out_proj.weight")
        for n in names
    )
    T, Hv, Hk = len(qkv), c["linear_num_value_heads"], c["linear_num_key_heads"]
    dk, dv = c["linear_key_head_dim"], c["linear_value_head_dim"]
    w = model.weight("linear_layer", "linear_attn.conv1d.weight")[:, 0].T
    window = np.zeros((len(w) - 1, w.shape[1]), np.float32)
    y = launch(runner, "conv_window", T, {"u": qkv, "w": w, "window": window, "y": qkv.shape})["y"]
    gates = {
        "y": y, "a": a, "b": b, "a_log": model.weight("linear_layer", "linear_attn.A_log"),
        "dt_bias": model.weight("linear_layer", "linear_attn.dt_bias"), "decay": (T, Hv),
        "beta": (T, Hv),
    }  # fmt: skip
    gated = launch(runner, "delta_gates", T, gates, key_heads=Hk, key_dim=dk)
    rule = {k: gated[k] for k in ("y", "decay", "beta")}
    state = np.zeros((Hv, dk, dv), np.float32)
    o = launch(runner, "delta_rule", T, rule | {"state": state, "o": (T, Hv * dv)}, key_heads=Hk)[
        "o"
    ]
    norm = {
        "o": o,
        "z": z,
        "w": model.weight("linear_layer", "linear_attn.norm.weight"),
        "y": o.shape,
    }
    mixed = launch(runner, "gated_rmsnorm", T, norm, eps=EPS)["y"]
    assert_near(runner, linear(runner, mixed, out), model["linear_attn.out"])


def test_full_attention(runner: Runner, model: Golden) -> None:
    c, part = model.config, "self_attn"
    Nq, Nk, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    q, k, v, o = (model.weight("full_layer", f"{part}.{n}_proj.weight") for n in "qkvo")
    u = linear(runner, model["in"], np.concatenate([q, k, v]))
    norms = {n: 1 + model.weight("full_layer", f"{part}.{n}.weight") for n in ("q_norm", "k_norm")}
    turned = launch(runner, "rope_append", len(u), rope_operands(model, u, Nq, Nk, **norms), **ROPE)
    blocks = -(-128 // ATTENTION_BLOCK)
    operands = {n: turned[n] for n in ("q", "keys", "values", "key_scales", "value_scales")} | {
        "u": u, "partials": (1, Nq, blocks, D + 2), "y": (len(u), Nq * D),
    }  # fmt: skip
    mixed = launch(runner, "attention", len(u), operands, shift=0, gated=1, seen=0)["y"]
    assert_near(runner, linear(runner, mixed, o), model["self_attn.out"])
